"""Network, assigner and loss together, against the ancestor's own step from pictures to parameter gradients."""

import json

import numpy as np
import pytest
import torch

from models.assigners.wh_iou import WhIoU
from models.losses import Criterion, TrainStep
from models.losses.yolo import YoloLoss
from tests.models.test_darknet import ZeroPaddedPool, ancestor_network
from utils.boxes import xywh_to_xyxy
from utils.structures import Targets


@pytest.mark.golden_case("darknet_model/*.npz")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_parameter_gradients_equal_the_ancestor(case, tmp_path, dtype):
    data, model = ancestor_network(case, tmp_path)
    if "alt_eval_io_minus_inf_pad" in data:  # the ancestor pads its 2x2 stride-1 pool with zeros, Darknet and we do not
        pools = [spec.index for spec in model.graph.layers if spec.section.type == "maxpool"]
        model.layers[pools[-1]] = ZeroPaddedPool()
    meta = json.loads(str(data["meta"]))
    hyp, num_classes, (height, width) = meta["hyp"], meta["nc"], meta["img_hw"]
    rows = torch.tensor(data["targets"])
    boxes = xywh_to_xyxy(rows[:, 2:] * rows.new_tensor([width, height, width, height]))
    targets = Targets.of(rows[:, 0].long(), rows[:, 1].long(), boxes)
    loss = YoloLoss(num_classes=num_classes, box=hyp["giou"], obj=hyp["obj"], cls=hyp["cls"] * 80 / num_classes)
    step = TrainStep(model.train().to(dtype), Criterion(WhIoU(iou_t=hyp["iou_t"]), loss))

    terms = step(torch.tensor(data["x"]), targets)
    total = sum(terms.values())
    total.backward()
    found = [terms[name].item() for name in ("box", "obj", "cls")] + [total.item()]
    np.testing.assert_allclose(found, data["loss_items"], rtol=1e-5, atol=1e-6)
    parameters, compared = dict(model.named_parameters()), 0
    for name in data.files:
        if not name.startswith("grad/"):
            continue
        ours = name.removeprefix("grad/").replace("module_list", "layers")
        ours = parameters[ours.replace("BatchNorm2d", "norm").replace("Conv2d", "conv")].grad
        gap = np.abs(ours.numpy() - data[name]).max()
        # the ancestor ran in float32: its own rounding through the whole network is 1e-5
        assert gap <= 5e-5 * np.abs(data[name]).max(), name
        compared += 1
    assert compared == len(parameters)

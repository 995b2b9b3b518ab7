"""The YOLOv5 recipe against the peer's own code: assignments exactly, losses to 1e-6, gradients to 1e-5."""

import json

import numpy as np
import pytest
import torch

from models.assigners import build_targets
from models.assigners.ratio import Ratio
from models.coders import SigmoidSquare
from models.losses.yolo import objectness_targets
from models.losses.yolov5 import Yolov5Loss
from tests.models.yolov3_case import Golden
from utils.boxes import paired_ciou, xyxy_to_xywh

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64]

pytestmark = [
    pytest.mark.golden_case("yolov5/*.npz"),
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("dtype", DTYPES),
]


@pytest.fixture(autouse=True)
def needs_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def calls(case, dtype, device) -> list[Golden]:
    """The successive calls of one loss object that a file holds; most hold one."""
    steps = json.loads(str(np.load(case)["meta"]))["steps"]
    prefixes = [f"s{step}/" for step in range(steps)] if steps > 1 else [""]
    return [Golden(case, dtype, device, SigmoidSquare(), prefix) for prefix in prefixes]


def assign(golden):
    return build_targets(golden.preds, golden.targets, Ratio(anchor_t=golden.hyp["anchor_t"]))


def make_loss(golden) -> Yolov5Loss:
    """The peer's loss object: without its trainer's scaling of the gains, which is undone here."""
    hyp, (height, width) = golden.hyp, golden.size
    meta = json.loads(str(golden.data["meta"]))
    loss = Yolov5Loss(
        num_classes=golden.num_classes,
        heads=tuple(golden.anchors),
        box=hyp["box"] * golden.num_levels / 3,
        obj=hyp["obj"] * golden.num_levels / 3 * 640**2 / (height * width),
        cls=hyp["cls"] * golden.num_levels / 3 * 80 / golden.num_classes,
        cls_pw=hyp["cls_pw"],
        obj_pw=hyp["obj_pw"],
        fl_gamma=hyp["fl_gamma"],
        label_smoothing=hyp["label_smoothing"],
        gr=golden.gr,
        duplicates="highest" if meta["sort_obj_iou"] else "last",
        autobalance=meta["autobalance"],
    )
    return loss.to(golden.raws[0].device)


def test_assignments_are_exactly_the_peers(case, dtype, device):
    for golden in calls(case, dtype, device):
        compact = assign(golden).compact()
        for name, rows in golden.rows().items():
            np.testing.assert_array_equal(getattr(compact, name).cpu(), rows, err_msg=name)
        assert not compact.ignore.any()


def test_objectness_targets_equal_the_peers(case, dtype, device):
    for golden in calls(case, dtype, device):
        rows = assign(golden)
        iou = paired_ciou(golden.preds.boxes[rows.image, rows.prior], golden.targets.boxes[rows.target])
        ours = objectness_targets(rows, 1 - golden.gr + golden.gr * iou.clamp(min=0))
        theirs = np.concatenate([golden.data[f"l{level}_tobj"].reshape(len(ours), -1) for level in range(3)], axis=1)
        np.testing.assert_allclose(ours.detach().cpu(), theirs, atol=2e-6)


def test_losses_gradients_and_balance_equal_the_peers(case, dtype, device):
    steps = calls(case, dtype, device)
    loss = make_loss(steps[0])
    num_images = len(steps[0].raws[0])
    np.testing.assert_array_equal(loss.balance.cpu(), steps[0].data["balance_before"])
    for number, golden in enumerate(steps):
        terms = loss(golden.preds, golden.targets, assign(golden))
        total = sum(terms.values()) * num_images  # what the trainer does for a loss that sums_images
        total.backward()

        ours = np.array([terms[name].item() for name in ("box", "obj", "cls")])
        np.testing.assert_allclose(ours, golden.data["loss_items"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(ours, golden.data["loss_items_v60"][number], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(total.item(), golden.data["loss_total"].item(), rtol=1e-6)
        largest = max(np.abs(golden.data[f"grad_p{level}"]).max() for level in range(golden.num_levels))
        for level, raw in enumerate(golden.raws):
            gap = np.abs(raw.grad.cpu().numpy() - golden.data[f"grad_p{level}"]).max()
            assert gap <= 1e-5 * largest
        # the peer moved its weights by float32 losses
        np.testing.assert_allclose(loss.balance.cpu(), golden.data["balance_after"], rtol=1e-9)
    assert loss.sums_images


def ciou_with_constants(strides):
    """The peer's CIoU: in cells, and with 1e-7 added to denominators, where ours in pixels has a floor."""

    def ciou(boxes1, boxes2):
        (x1, y1, w1, h1), (x2, y2, w2, h2) = (
            xyxy_to_xywh(b / strides.repeat(1, 2)).unbind(1) for b in (boxes1, boxes2)
        )
        left, right = torch.maximum(x1 - w1 / 2, x2 - w2 / 2), torch.minimum(x1 + w1 / 2, x2 + w2 / 2)
        top, bottom = torch.maximum(y1 - h1 / 2, y2 - h2 / 2), torch.minimum(y1 + h1 / 2, y2 + h2 / 2)
        shared = (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
        iou = shared / (w1 * h1 + w2 * h2 - shared + 1e-7)
        hull_w = torch.maximum(x1 + w1 / 2, x2 + w2 / 2) - torch.minimum(x1 - w1 / 2, x2 - w2 / 2)
        hull_h = torch.maximum(y1 + h1 / 2, y2 + h2 / 2) - torch.minimum(y1 - h1 / 2, y2 - h2 / 2)
        distance = ((x1 - x2) ** 2 + (y1 - y2) ** 2) / (hull_w**2 + hull_h**2 + 1e-7)
        aspect = 4 / torch.pi**2 * (torch.atan(w2 / h2) - torch.atan(w1 / h1)) ** 2
        return iou - distance - aspect * (aspect / (aspect - iou + 1 + 1e-7)).detach()

    return ciou


def test_the_rest_of_the_gap_is_the_peers_constants(case, dtype, device):
    """In float64 we are 4e-8 from the peer; with its own constants in the CIoU nothing is left."""
    steps = calls(case, torch.float64, device)
    loss = make_loss(steps[0])
    for golden in steps:
        rows = assign(golden).compact()
        loss.iou = ciou_with_constants(golden.preds.priors.stride[rows.prior])
        terms = loss(golden.preds, golden.targets, rows)
        ours = np.array([terms[name].item() for name in ("box", "obj", "cls")])
        np.testing.assert_allclose(ours, golden.data["loss_items_f64"], rtol=1e-9, atol=1e-12)

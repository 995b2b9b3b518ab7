"""The whole chain on real weights against Darknet's own run, and the predictor's behaviour."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from darknet_input import darknet_input

from models.cfg import parse_cfg, read_cfg
from models.darknet import Darknet
from models.darknet_weights import read_weights
from models.postprocess import postprocess
from models.predictor import Predictor
from models.section import CfgError
from utils.errors import UserError

SMALL = """[net]
width=64
height=64
channels=3
[convolutional]
batch_normalize=1
filters=8
size=3
stride=16
pad=1
activation=leaky
[convolutional]
filters=14
activation=linear
[yolo]
mask=0,1
anchors=10,14, 23,27
classes=2
num=2
"""


def _small(extra: str = "") -> Darknet:
    torch.manual_seed(0)
    return Darknet(parse_cfg(SMALL + extra))


def _images(num: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def _layer_output(head, raw: torch.Tensor) -> torch.Tensor:
    """What Darknet's [yolo] layer holds: anchor, value, row, column, activated."""
    values, scale = raw.unflatten(0, (head.num_anchors, head.num_values)).clone(), head.coder.scale_x_y
    values[:, :2] = values[:, :2].sigmoid() * scale - (scale - 1) / 2
    values[:, 4:] = values[:, 4:].sigmoid()
    return values.flatten()


@pytest.mark.golden_case("darknet/detections/*.json")
def test_detections_equal_darknet(case, data_dir):
    """From the JPEG to the boxes after NMS: outputs to 2e-5, boxes (relative to the picture) and scores to 1e-5."""
    recorded = json.loads(case.read_text())
    weights = data_dir / "weights" / recorded["model"]
    model = Darknet(read_cfg(weights.with_name(weights.name + ".cfg"))).eval()
    read_weights(model, weights.with_name(weights.name + ".weights"))
    size = recorded["net_height"], recorded["net_width"]
    image, (left, top, width, height) = darknet_input(
        data_dir / "images" / recorded["image"], size[1], size[0], bool(recorded["letter_box"])
    )
    np.testing.assert_allclose(
        image.ravel()[recorded["net_input"]["index"]], recorded["net_input"]["sample"], atol=1e-7
    )

    with torch.no_grad():
        outputs = model(torch.from_numpy(image.copy())[None])
    for head, raw, layer in zip(model.heads, outputs, recorded["raw"]):
        found = _layer_output(head, raw[0])[layer["index"]].numpy()
        np.testing.assert_allclose(found, layer["sample"], rtol=0, atol=2e-5)

    predictor = Predictor(model, conf_thres=recorded["threshold"], iou_thres=recorded["nms_iou"])
    assert predictor.options["kind"] == recorded["nms_kind"]
    preds = model.decode(outputs, size)
    # Darknet measures distances between boxes in widths and heights of the picture, we in pixels of the input: the same
    # but for the letterboxed case, where it decides on 1 box of 38
    corner, sides = torch.tensor([left, top, left, top]), torch.tensor([width, height, width, height])
    preds = replace(preds, boxes=(preds.boxes - corner) / sides * size[0])
    (found,) = postprocess(preds, **predictor.options)
    boxes = found.boxes / size[0]
    rows = [[d["center_x"], d["center_y"], d["width"], d["height"]] for d in recorded["detections"]]
    expected = torch.tensor(rows)
    expected = torch.cat([expected[:, :2] - expected[:, 2:] / 2, expected[:, :2] + expected[:, 2:] / 2], dim=1)
    scores = torch.tensor([d["confidence"] for d in recorded["detections"]])
    order = scores.argsort(descending=True, stable=True)
    assert found.labels.tolist() == [recorded["detections"][row]["class_id"] for row in order]
    torch.testing.assert_close(found.scores, scores[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(boxes, expected[order], rtol=0, atol=1e-5)


def test_is_predict_and_postprocess():
    model, images = _small(), _images()
    predictor = Predictor(model, conf_thres=0.001, iou_thres=0.3, max_det=5)
    model.train()
    found = predictor(images)
    assert not model.training
    with torch.no_grad():
        preds = model.predict(images.float() / 255)
    for one, other in zip(found, postprocess(preds, conf_thres=0.001, iou_thres=0.3, max_det=5)):
        assert len(one) and torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes, other.boxes)
        assert one.boxes.dtype == torch.float32
    assert set(predictor.timer.seconds) == {"pre", "inference", "nms"}


def test_training_goes_on_after_a_prediction():
    model = _small()
    Predictor(model)(_images())
    model.train().predict(_images().float() / 255).boxes.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_precisions_agree():
    model, images = _small(), _images()
    plain = Predictor(model, conf_thres=0.001, iou_thres=1.0, max_det=40)(images)
    mixed = Predictor(model, conf_thres=0.001, iou_thres=1.0, max_det=40, amp=torch.bfloat16)(images)
    wide = Predictor(_small().double(), conf_thres=0.001, iou_thres=1.0, max_det=40)(images)
    for one, half, double in zip(plain, mixed, wide):
        assert double.boxes.dtype == torch.float64
        torch.testing.assert_close(double.scores.float(), one.scores)
        torch.testing.assert_close(half.scores, one.scores, rtol=0.1, atol=1e-3)


def test_overlap_is_the_last_heads_choice():
    assert Predictor(_small()).options["kind"] == "default"
    options = Predictor(_small("nms_kind=diounms\nbeta_nms=0.8\n")).options
    assert options["kind"] == "diounms" and options["beta_nms"] == 0.8
    assert Predictor(_small("nms_kind=diounms\n"), kind="default").options["kind"] == "default"


def test_bad_input():
    with pytest.raises(CfgError, match=r"<text>:20: nms_kind=cornersnms \(known: default, greedynms, diounms\)"):
        Predictor(_small("nms_kind=cornersnms\n"))
    with pytest.raises(UserError, match=r"classes: 2: expected 0\.\.1"):
        Predictor(_small(), classes=[2])(_images())
    with pytest.raises(AssertionError, match="uint8"):
        Predictor(_small())(_images().float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_on_the_gpu():
    here = Predictor(_small().double(), conf_thres=0.001)(_images())
    there = Predictor(_small().double(), conf_thres=0.001, device="cuda")(_images())
    for one, other in zip(here, there):
        assert torch.equal(one.labels, other.cpu().labels)
        torch.testing.assert_close(other.cpu().boxes, one.boxes)

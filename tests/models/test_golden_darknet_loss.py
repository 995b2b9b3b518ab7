"""Darknet's own [yolo] training: the C program's deltas to 1e-5, and the value it prints."""

import numpy as np
import pytest
import torch

from models.assigners import build_targets
from models.assigners.best_anchor import BestAnchor
from models.cfg import parse_cfg
from models.darknet import Darknet
from models.losses.darknet import DarknetLoss
from models.structures import Predictions
from utils.boxes import xywh_to_xyxy
from utils.structures import Targets

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = [
    pytest.mark.golden_case("darknet/loss/*.npz"),
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("dtype", [torch.float32, torch.float64]),
]


@pytest.fixture(autouse=True)
def needs_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def run(case, dtype, device):
    """(data, gradients [image, anchor, value, row, column], terms) of one file."""
    data = np.load(case)
    cfg = parse_cfg(str(data["cfg"]))
    heads = tuple(Darknet(cfg).to(device).heads)
    logits = torch.tensor(data["logits"], dtype=dtype, device=device).requires_grad_()
    preds = Predictions.cat([heads[0].decode(logits.flatten(1, 2), (cfg.height, cfg.width))])
    image = np.repeat(np.arange(len(data["boxes"])), data["box_count"])
    rows = np.concatenate([boxes[:count] for boxes, count in zip(data["boxes"], data["box_count"])])
    boxes = xywh_to_xyxy(torch.tensor(rows[:, :4])) * torch.tensor([cfg.width, cfg.height] * 2)
    targets = Targets.of(torch.tensor(image), torch.tensor(rows[:, 4]).long(), boxes).to(device)
    loss = DarknetLoss(heads=heads).to(device)
    terms = loss(preds, targets, build_targets(preds, targets, BestAnchor(heads=heads)))
    (sum(terms.values()) * len(logits)).backward()
    return data, logits.grad.cpu().numpy(), terms


def test_gradients_are_darknets_deltas(case, dtype, device):
    data, gradients, _ = run(case, dtype, device)
    expected = -data["delta"]
    if "new_coords=1" in str(data["cfg"]):  # the convolution before [yolo] takes the sigmoid, and its derivative
        output = 1 / (1 + np.exp(-data["logits"].astype(np.float64)))
        expected = expected * output * (1 - output)
    np.testing.assert_allclose(gradients, expected, atol=1e-5, rtol=1e-5)
    assert (np.abs(expected[:, :, :4]).max(axis=(1, 2, 3, 4)) > 0.01).all()


def test_values_are_what_darknet_prints(case, dtype, device):
    data, _, terms = run(case, dtype, device)
    total = sum(terms.values()).item() * len(data["logits"])
    assert total == pytest.approx(data["cost"].item(), rel=2e-6)

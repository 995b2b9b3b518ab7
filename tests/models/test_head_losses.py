"""Losses head by head: those of a sum over levels add up to the whole, and looking changes nothing."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "utils"))

from tiny import CFG, tiny_batch, tiny_step  # noqa: E402

from models.cfg import read_cfg  # noqa: E402
from models.darknet import Darknet  # noqa: E402
from models.head_losses import head_losses  # noqa: E402
from models.losses import TrainStep, build_criterion  # noqa: E402
from utils.config import read_recipe  # noqa: E402


@pytest.mark.parametrize("name", ["matchbox", "yolov5", "yolox", "tal", "atss"])
def test_every_head_has_finite_losses_and_nothing_changes(name):
    torch.manual_seed(0)
    model, recipe = Darknet(read_cfg(ROOT / "cfg" / "matchbox.cfg")).eval(), read_recipe(f"{name}")
    criterion = build_criterion(recipe.assigner, recipe.loss, model.num_classes, name, model.heads)
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    found = head_losses(model, criterion, tiny_batch(range(4)))
    assert {key.rpartition("/")[0] for key in found} == {"head/stride8", "head/stride16"} and len(found) >= 4
    assert all(value == value and abs(value) < float("inf") for value in found.values())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_levels_add_up_to_the_whole_of_a_loss_that_sums_them():
    model = Darknet(read_cfg(ROOT / "cfg" / "matchbox.cfg")).eval()
    criterion = build_criterion({"name": "wh_iou"}, {"name": "yolo"}, model.num_classes, "test", model.heads)
    batch = tiny_batch(range(4))
    found = head_losses(model, criterion, batch)
    with torch.no_grad():
        whole = TrainStep(model, criterion)(batch.images, batch.targets)
    for name, value in whole.items():
        parts = [part for key, part in found.items() if key.endswith(f"/{name}")]
        assert sum(parts) == pytest.approx(value.item(), rel=1e-5)


def test_one_head_alone_is_the_whole():
    step, batch = tiny_step(CFG), tiny_batch(range(4))
    step.eval()
    with torch.no_grad():
        whole = step(batch.images, batch.targets)
    found = head_losses(step.model, step.criterion, batch)
    assert list(found.values()) == pytest.approx([value.item() for value in whole.values()], rel=1e-5)

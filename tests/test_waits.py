"""A training step never asks the device what it has computed: each question would make the host wait for it.

Here on the CPU, operation by operation; on a GPU ``python -m benchmarks.gpu`` counts what CUDA itself sees.
"""

import traceback
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.assigners import task_aligned
from models.cfg import parse_cfg
from models.darknet import Darknet
from models.losses import TrainStep, build_criterion
from models.structures import Assignment
from tests.models.test_every_pair import HEADS, NET
from tests.models.yolov3_case import OBJECTS, make_targets
from utils.config import read_recipe
from utils.ema import EMA
from utils.run import PRECISIONS
from utils.structures import Batch
from utils.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
# two-stage and rcnn with a second stage are not here: non-maximum suppression of proposals waits for its own result
RECIPES = {
    "matchbox": "yolo",
    "yolov3": "yolo",
    "yolov5": "yolo",
    "darknet": "yolo",
    "rcnn": "yolo",
    "atss": "yolo",
    "tal": "yolox",
    "yolox": "yolox",
    "fcos": "fcos",
    "autoassign": "fcos",
}
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim"}
READS |= {"unique_consecutive", "nms"}


class Watch(TorchDispatchMode):
    """Notes every operation that would wait for a device, with the line of ours that asked."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if reads(func, args, kwargs or {}):
            lines = [f for f in traceback.extract_stack() if f.filename.startswith((f"{ROOT}/models", f"{ROOT}/utils"))]
            place = f"{Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else "backward"
            self.found.append(f"{func} at {place}")
        return func(*args, **(kwargs or {}))


def reads(func, args, kwargs) -> bool:
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):
        masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return masked and (name == "index" or args[2].numel() > 1)  # a single value is filled in where the mask says
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("_to_copy", "copy_"):  # between two devices
        other = kwargs.get("device") if name == "_to_copy" else args[1].device
        return other is not None and torch.device(other).type != args[0].device.type
    return name in READS or (name == "lift_fresh" and args[0].device.type != "cpu")  # torch.tensor(values, device=...)


def small_step(recipe: str) -> TrainStep:
    torch.manual_seed(0)
    model = Darknet(parse_cfg(NET + HEADS[RECIPES[recipe]]))
    sections = read_recipe(recipe, [])
    return TrainStep(model, build_criterion(sections.assigner, sections.loss, model.num_classes, recipe, model.heads))


def small_batch() -> Batch:
    targets = make_targets(OBJECTS, ignore=[(1, 0, 0, 64, 96)])
    return Batch(images=torch.randint(256, (2, 3, 96, 128), dtype=torch.uint8), targets=targets, infos=())


def test_the_watch_sees_what_would_wait():
    values = torch.arange(4.0)
    mask = values > 1
    asks = {
        "item": lambda: values[0].item(),
        "if": lambda: bool(mask[0]),
        "mask": lambda: values[mask],
        "nonzero": lambda: mask.nonzero(),
        "write": lambda: values.__setitem__(mask, torch.ones(2)),
        "repeat": lambda: values.repeat_interleave(torch.tensor([1, 2, 0, 1])),
        "move": lambda: values.to("meta"),
        "make": lambda: torch.tensor([1.0], device="meta"),
    }
    for name, ask in asks.items():
        with Watch() as watch:
            ask()
        assert watch.found, name
    with Watch() as watch:
        values[mask] = 0.0
        values[torch.tensor([0, 1])] + values.masked_fill(mask, 1).where(mask, 0).sum()
    assert watch.found == []


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_step_reads_nothing(recipe, precision, monkeypatch):
    """From the picture to the moved weights and their average; the losses are read every few steps, not by a step."""
    monkeypatch.setattr(Assignment, "compact", lambda assignment: assignment)  # on the CPU alone
    monkeypatch.setattr(task_aligned, "LISTS", {})  # what it lists elsewhere
    step, optim = small_step(recipe), replace(read_recipe(recipe, []).optim, nominal_batch=2)
    trainer = Trainer(
        step,
        optim=optim,
        device=torch.device("cpu"),
        precision=PRECISIONS[precision],
        num_batches=3,
        batch_size=2,
        epochs=2,
    )
    batches = repeat(small_batch())
    with Watch() as watch:
        trainer.train_epoch(batches)
    assert watch.found == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_brings_nothing_from_the_host(recipe):
    """On the meta device nothing has a value, and whatever is made on the CPU and moved there is seen."""
    step, batch = small_step(recipe).to("meta"), small_batch().to("meta")
    for _ in range(2):  # the priors of a grid are made and moved once
        with Watch() as watch:
            outputs = step.model(batch.images / 255)
            terms = step.criterion(step.model.decode(outputs, batch.images.shape[-2:]), batch.targets)
            sum(terms.values()).backward()
    assert watch.found == []
    assert all(parameter.grad.device.type == "meta" for parameter in step.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("head", HEADS)
def test_a_network_compiles_in_one_piece(head):
    """What ``train.py --compile`` needs: no break in the graph, the same maps, nothing of it in the average's copy."""
    model = Darknet(parse_cfg(NET + HEADS[head]))
    images = torch.rand(2, 3, 96, 128)
    expected = model(images)
    model.compile(backend="eager", fullgraph=True, dynamic=False)
    for one, other in zip(model(images), expected, strict=True):
        torch.testing.assert_close(one, other)
    copied = EMA(model).module
    assert copied._compiled_call_impl is None and copied.state_dict().keys() == model.state_dict().keys()

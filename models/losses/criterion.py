"""Assigner and loss as one thing to train against, and the step that data-parallel training wraps."""

import inspect
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from models.assigners import ASSIGNERS, Assigner, build_targets
from models.losses.autoassign import AutoAssignLoss
from models.losses.darknet import DarknetLoss
from models.losses.rcnn import RCNNLoss
from models.losses.two_stage import TwoStageLoss
from models.losses.yolo import YoloLoss
from models.losses.yolov5 import Yolov5Loss
from models.losses.yolox import YoloxLoss
from models.raw_predictions import RawPredictions
from models.structures import Predictions
from utils.config import Located, build
from utils.errors import UserError, nearest
from utils.structures import Targets

LOSSES: dict[str, type[nn.Module]] = {
    "yolo": YoloLoss,
    "rcnn": RCNNLoss,
    "yolov5": Yolov5Loss,
    "darknet": DarknetLoss,
    "yolox": YoloxLoss,
    "autoassign": AutoAssignLoss,
    "two_stage": TwoStageLoss,
}


class Criterion(nn.Module):
    """Predictions and targets -> weighted loss terms. A module, because some losses learn parameters of their own."""

    def __init__(self, assigner: Assigner, loss: nn.Module):
        super().__init__()
        self.assigner, self.loss = assigner, loss

    @property
    def sums_images(self) -> bool:
        """Whether a step is taken on the sum over its images instead of their mean (YOLOv5)."""
        return getattr(self.loss, "sums_images", False)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Tell a loss that changes with the epoch (YOLOX) which one begins, counted from 0, of how many."""
        if hasattr(self.loss, "set_epoch"):
            self.loss.set_epoch(epoch, epochs)

    def forward(self, preds: Predictions, targets: Targets) -> dict[str, Tensor]:
        return self.loss(preds, targets, build_targets(preds, targets, self.assigner))


def compute_loss(
    outputs: Sequence[Tensor | tuple[Tensor, ...]],
    targets: Targets,
    model: nn.Module,
    criterion: Criterion,
    size: tuple[int, int],
) -> dict[str, Tensor]:
    """Weighted scalar terms of raw maps; the total is their sum.

    Args:
        outputs: what each head of ``model`` returned. Half maps (autocast) are decoded in float32: exp and IoU need it.
        size: height and width of the images, pixels.
    """
    with torch.autocast(outputs[0].device.type, enabled=False):
        return criterion(RawPredictions(model.heads, outputs, size), targets)


class TrainStep(nn.Module):
    """Network and criterion as one module: what DistributedDataParallel wraps, so that it averages both's gradients."""

    def __init__(self, model: nn.Module, criterion: Criterion):
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Loss terms of images [B, C, H, W]: uint8 in 0..255, or float in 0..1. The memory format is kept."""
        dtype = next(self.model.parameters()).dtype
        images = images.to(dtype).div_(255) if images.dtype == torch.uint8 else images.to(dtype)
        return compute_loss(self.model(images), targets, self.model, self.criterion, images.shape[-2:])


def build_criterion(
    assigner: Mapping, loss: Mapping, num_classes: int, where: object = "recipe", heads: Iterable[nn.Module] = ()
) -> Criterion:
    """A criterion from the ``assigner`` and ``loss`` sections of a recipe, for a network with these heads.

    Args:
        assigner, loss: ``name`` (a row of ``ASSIGNERS``, ``LOSSES``) and what that one takes.
        num_classes: of the network.
        where: the recipe's file, for errors about a key whose line is not known.
        heads: of the network. An assigner or loss whose signature names ``num_classes`` or ``heads`` is told.

    Raises:
        UserError: an unknown name, a key that the chosen one never reads, a value of the wrong type or out of range; at
            the cfg's line: a head that has not what the chosen one ``needs``.
    """
    facts = {"num_classes": num_classes, "heads": tuple(heads)}
    return Criterion(
        _choose("assigner", ASSIGNERS, assigner, facts, where),
        _choose("loss", LOSSES, loss, facts, where),
    )


SOURCES = {"num_classes": "the data", "heads": "the cfg"}  # of what a recipe may not say


def _choose(kind: str, known: Mapping, section: Mapping, facts: dict, where: object):
    name = section.get("name")
    if name not in known:
        raise UserError(_place(section, "name", where), f"unknown {kind} '{name}'", nearest(name, known))
    for key, source in SOURCES.items():
        if key in section:
            raise UserError(_place(section, key, where), f"{key} comes from {source}, not from a recipe")
    _check_needs(kind, name, known[name], facts["heads"])
    options = {key: value for key, value in section.items() if key != "name"}
    asked = {key: fact for key, fact in facts.items() if key in inspect.signature(known[name]).parameters}
    places = getattr(section, "places", {})
    return build(known[name], Located({**options, **asked}, places=places), f"{where}: {kind} {name}")


def _check_needs(kind: str, name: str, chosen: type, heads: Iterable[nn.Module]) -> None:
    """Every head must offer all that the chosen assigner or loss needs, and no loss may pass over a head."""
    needs = getattr(chosen, "needs", ())
    for head in heads:
        if kind == "loss" and not head.demands.issubset(needs):
            message = f"loss '{name}' does not teach [{head.section.type}]"
            raise head.section.error(message, hint="a recipe with loss two_stage does")
        for need in needs:
            if need not in head.offers:
                message = f"{kind} '{name}' needs {need}, which [{head.section.type}] does not have"
                raise head.section.error(message, hint=f"choose another {kind}, or another head")


def _place(section: Mapping, key: str, where: object) -> object:
    return getattr(section, "places", {}).get(key, where)

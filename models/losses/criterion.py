"""Assigner and loss as one thing to train against, and the step that data-parallel training wraps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.assigners import ASSIGNERS, Assigner, build_targets
from models.losses.yolo import YoloLoss
from models.structures import Predictions
from utils.boxes import at_least_float32
from utils.config import Located, build
from utils.errors import UserError, nearest
from utils.structures import Targets

LOSSES: dict[str, type[nn.Module]] = {"yolo": YoloLoss}


class Criterion(nn.Module):
    """Predictions and targets -> weighted loss terms. A module, because some losses learn parameters of their own."""

    def __init__(self, assigner: Assigner, loss: nn.Module):
        super().__init__()
        self.assigner, self.loss = assigner, loss

    def forward(self, preds: Predictions, targets: Targets) -> dict[str, Tensor]:
        return self.loss(preds, targets, build_targets(preds, targets, self.assigner))


def compute_loss(
    outputs: list[Tensor], targets: Targets, model: nn.Module, criterion: Criterion, size: tuple[int, int]
) -> dict[str, Tensor]:
    """Weighted scalar terms of raw maps; the total is their sum.

    Args:
        outputs: one map [B, A * (5 + C), h, w] per head, from ``model``. Half maps (autocast) are decoded in float32:
            exp and IoU need it, and the maps are small beside the network.
        size: height and width of the images, pixels.
    """
    with torch.autocast(outputs[0].device.type, enabled=False):
        preds = model.decode([at_least_float32(output) for output in outputs], size)
        return criterion(preds, targets)


class TrainStep(nn.Module):
    """Network and criterion as one module: what DistributedDataParallel wraps, so that it averages both's gradients."""

    def __init__(self, model: nn.Module, criterion: Criterion):
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Loss terms of images [B, C, H, W]: uint8 in 0..255, or float in 0..1. The memory format is kept."""
        dtype = next(self.model.parameters()).dtype
        images = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        return compute_loss(self.model(images), targets, self.model, self.criterion, images.shape[-2:])


def build_criterion(assigner: Mapping, loss: Mapping, num_classes: int, where: object = "recipe") -> Criterion:
    """A criterion from the ``assigner`` and ``loss`` sections of a recipe.

    Args:
        assigner, loss: ``name`` (a row of ``ASSIGNERS``, ``LOSSES``) and what that one takes.
        num_classes: of the network; every loss is told.
        where: the recipe's file, for errors about a key whose line is not known.

    Raises:
        UserError: an unknown name, a key that the chosen one never reads, a value of the wrong type or out of range.
    """
    if "num_classes" in loss:
        raise UserError(_place(loss, "num_classes", where), "num_classes comes from the data, not from a recipe")
    facts = {"num_classes": num_classes}
    return Criterion(
        _choose("assigner", ASSIGNERS, assigner, {}, where),
        _choose("loss", LOSSES, loss, facts, where),
    )


def _choose(kind: str, known: Mapping, section: Mapping, facts: dict, where: object):
    name = section.get("name")
    if name not in known:
        raise UserError(_place(section, "name", where), f"unknown {kind} '{name}'", nearest(name, known))
    options = {key: value for key, value in section.items() if key != "name"}
    places = getattr(section, "places", {})
    return build(known[name], Located({**options, **facts}, places=places), f"{where}: {kind} {name}")


def _place(section: Mapping, key: str, where: object) -> object:
    return getattr(section, "places", {}).get(key, where)

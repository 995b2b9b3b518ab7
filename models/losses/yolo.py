"""The YOLO loss: how well matched boxes fit, which slots hold an object, and of which class.

Letters: B images, P slots, K rows of the assignment, C classes, L levels (heads).
"""

from functools import partial

import torch
from torch import Tensor, nn

from models.losses.functional import bce, focal, smooth_targets
from models.structures import Assignment, Grid, Predictions
from utils.boxes import IOUS, at_least_float32
from utils.distributed import all_reduce_mean
from utils.errors import nearest
from utils.structures import Targets


class YoloLoss(nn.Module):
    """Box, objectness and class loss of the YOLOv3 archive; the defaults are its own.

    * box: per level the mean of 1 - IoU over its rows, summed over levels;
    * obj: per level the mean BCE over all its slots, ignored ones left out. The target of a slot that answers for an
      object is ``(1 - gr) + gr * max(IoU, 0)`` without gradient, 0 elsewhere. Of several rows on one slot the last one
      names it, on every device (the peer: on CPU);
    * cls: per level the mean BCE over rows and classes; nothing when there is one class.

    A level without rows adds 0 to box and cls. Means are weighted by ``Assignment.weight`` and normalised by the count
    averaged over all processes, so that data-parallel training equals one process with the whole batch.

    Args:
        num_classes: of the network. The gain ``cls`` is meant for 80 classes and scaled by ``num_classes / 80``, as the
            archive's trainer does.
        iou: which of ``IOUS``, for the box loss and the objectness target.
        box, obj, cls: gains.
        cls_pw, obj_pw: weight of the positive part of a BCE.
        fl_gamma: 0 is plain BCE; above, focal loss (alpha 0.25) for obj and cls.
        gr: how far the objectness target follows the IoU, 0..1.
        label_smoothing: 0..1, of the class targets (the archive fixes it at 0).

    Raises:
        ValueError: a value out of range, naming it.

    Source: ultralytics/yolov3 archive, ``compute_loss``, whose factor batch size / 64 belongs to the trainer's nominal
    batch and is not applied here.
    """

    needs = ("objectness",)

    def __init__(
        self,
        *,
        num_classes: int,
        iou: str = "giou",
        box: float = 3.54,
        obj: float = 64.3,
        cls: float = 37.4,
        cls_pw: float = 1.0,
        obj_pw: float = 1.0,
        fl_gamma: float = 0.0,
        gr: float = 1.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        if iou not in IOUS:
            raise ValueError(f"iou is '{iou}', {nearest(iou, IOUS)}")
        for name, value in {"box": box, "obj": obj, "cls": cls, "fl_gamma": fl_gamma}.items():
            if value < 0:
                raise ValueError(f"{name} is {value}, expected 0 or more")
        for name, value in {"cls_pw": cls_pw, "obj_pw": obj_pw}.items():
            if value <= 0:
                raise ValueError(f"{name} is {value}, expected more than 0")
        for name, value in {"gr": gr, "label_smoothing": label_smoothing}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, expected 0 to 1")
        self.num_classes = num_classes
        self.iou = IOUS[iou]
        self.gains = {"box": box, "obj": obj, "cls": cls * num_classes / 80}
        self.cls_pw, self.obj_pw, self.gr, self.label_smoothing = cls_pw, obj_pw, gr, label_smoothing
        self.score = partial(focal, gamma=fl_gamma) if fl_gamma > 0 else bce  # of obj and cls
        self.objectness_targets = objectness_targets

    def forward(self, preds: Predictions, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
        """Weighted scalars ``box``, ``obj``, ``cls``; the total is their sum."""
        levels = self.per_level(preds, targets, assignment)
        return {name: gain * levels[name].sum() for name, gain in self.gains.items()}

    def per_level(self, preds: Predictions, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
        """The three terms [L] of every level, before gains: what a loss with level weights starts from."""
        image, prior, target = assignment.image, assignment.prior, assignment.target
        grids = preds.priors.grids
        said = preds.read(image, prior)
        matched = at_least_float32(said.boxes)
        iou = self.iou(matched, targets.boxes[target].to(matched.dtype))

        level = torch.arange(len(grids), device=prior.device)[:, None]
        share = (preds.priors.level[prior] == level) * assignment.weight.to(iou.dtype)  # [L, K]
        keep = (~assignment.ignore).to(iou.dtype)  # [B, P]
        counts = all_reduce_mean(torch.cat([share.sum(1), sum_levels(keep, grids)]))
        counts = torch.where(counts > 0, counts, 1)  # a level without rows has only zeros to sum
        num_rows, num_slots = counts.split(len(grids))

        strength = (1 - self.gr) + self.gr * iou.detach().clamp(min=0)
        wanted = self.objectness_targets(assignment, strength)
        objectness = keep * self.score(said.objectness, wanted, pos_weight=self.obj_pw)
        terms = {
            "box": (share * (1 - iou)).sum(1) / num_rows,
            "obj": sum_levels(objectness, grids) / num_slots,
            "cls": torch.zeros_like(num_rows),
        }
        if self.num_classes > 1:
            smooth = smooth_targets(targets.labels[target], self.num_classes, self.label_smoothing, iou.dtype)
            classes = self.score(said.cls, smooth, pos_weight=self.cls_pw)
            terms["cls"] = (share * classes.mean(1)).sum(1) / num_rows
        return terms


def sum_levels(values: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """Sums [L] over the images and slots of each level of [B, P]."""
    return torch.stack([values[:, grid.slots].sum() for grid in grids])


def objectness_targets(assignment: Assignment, strength: Tensor) -> Tensor:
    """Targets [B, P]: the strength [K] of the last row with weight on a slot, 0 where there is none.

    Writing by index would leave the winner among duplicates to chance on a GPU; of the values added to a slot here all
    but one are zero.
    """
    shape = assignment.ignore.shape
    slot = assignment.image * shape[1] + assignment.prior
    wins = last_rows(slot, assignment.weight > 0)
    return strength.new_zeros(shape.numel()).scatter_add(0, slot, strength * wins).view(shape)


def last_rows(numbers: Tensor, holds: Tensor) -> Tensor:
    """Which [K] of the rows that hold [K] are the last with their number [K], which is 0 or more."""
    numbers, order = torch.where(holds, numbers, -1).sort(stable=True)
    is_last = torch.ones_like(holds)
    is_last[:-1] = numbers[1:] != numbers[:-1]
    return holds & torch.empty_like(holds).scatter(0, order, is_last)

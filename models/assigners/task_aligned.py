"""Task-aligned assignment: the slots that are already good at both class and box of an object answer for it.

Letters: B images, N objects, P slots, k candidates of an object.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from models.assigners.base import ignored_slots
from models.assigners.points import first_largest, inside, level_strides, wins
from models.structures import Assignment, Predictions, Priors
from utils.boxes import paired_ciou, paired_iou, xywh_to_xyxy, xyxy_to_xywh
from utils.structures import Targets

EPS = 1e-9  # added to the best alignment of an object before dividing by it


class Rows(NamedTuple):
    """A table [N, k]: which object each candidate answers for, and whether it does."""

    target: Tensor
    taken: Tensor


def settle_among_choosers(slots: Tensor, taken: Tensor, image: Tensor, overlap: Tensor, num_images: int) -> Rows:
    """A contested slot goes to the object among its choosers that it overlaps most."""
    num_objects, num_slots = overlap.shape
    slot = (image[:, None] * num_slots + slots).flatten()
    keep = wins(slot, overlap.gather(1, slots).flatten(), taken.flatten(), num_images * num_slots)
    rows = torch.arange(num_objects, device=slots.device)
    return Rows(rows[:, None].expand_as(slots), keep.view_as(taken))


def settle_among_all(slots: Tensor, taken: Tensor, image: Tensor, overlap: Tensor, num_images: int) -> Rows:
    """A contested slot goes to the object of the picture that it overlaps most, whether or not that one chose it."""
    num_objects, num_slots = overlap.shape
    num_all = num_images * num_slots
    slot = (image[:, None] * num_slots + slots).flatten()
    rows = torch.arange(num_objects, device=slots.device)[:, None]
    every = (image[:, None] * num_slots + torch.arange(num_slots, device=slots.device)).flatten()
    best = wins(every, overlap.flatten(), torch.ones_like(every, dtype=torch.bool), num_all)
    owner = torch.zeros(num_all, dtype=torch.int64, device=slots.device)
    owner = owner.scatter_add(0, every, rows.expand_as(overlap).flatten() * best)
    choosers = torch.zeros_like(owner).scatter_add(0, slot, taken.flatten().long())
    target = torch.where(choosers[slot].view_as(slots) > 1, owner[slot].view_as(slots), rows)
    keep = wins(slot, torch.zeros_like(slot, dtype=overlap.dtype), taken.flatten(), num_all)
    return Rows(target, keep.view_as(taken))


class Variant(NamedTuple):
    """How the peers differ."""

    iou: Callable
    margin: float  # pixels a point has to be within the box
    smallest: float  # boxes with a shorter side are tested as this long, in strides of the second finest level
    ranked: Callable  # alignment and inside [N, P] -> what the best are chosen by
    settle: Callable


VARIANTS = {
    "tood": Variant(paired_iou, 0.01, 0.0, lambda alignment, within: alignment, settle_among_choosers),
    "v8_3": Variant(paired_ciou, EPS, 0.0, torch.mul, settle_among_all),
    "v8_4": Variant(paired_ciou, EPS, 1.0, torch.mul, settle_among_all),
}


@dataclass(frozen=True, kw_only=True)
class TaskAligned:
    """Alignment is ``score^alpha * IoU^beta`` with ``score = sigmoid(obj) * sigmoid(cls of the object)`` and the IoU of
    the predicted box. The ``topk`` best aligned slots answer for the object if their point lies inside its box.

    The weight of a row is the normalised alignment: scaled so that the best slot of an object has its best IoU. A slot
    without any alignment, also one among the best, has weight 0 and counts for nothing, as in the peers' losses. Row
    order object that chose, then best first (of equal ones the lowest slot).

    Args:
        variant: which peer, where they disagree.
            ``tood`` ranks all slots, then drops those outside the box; plain IoU; a contested slot goes to the object
            among its choosers that it overlaps most.
            ``v8_3`` (ultralytics 8.3.0) ranks the slots inside the box; CIoU, at least 0; a contested slot goes to
            the object that it overlaps most, even one that did not choose it.
            ``v8_4`` (ultralytics 8.4.190) also stretches sides shorter than the second stride to it before the inside
            test, so that an object between the points has candidates.
        topk, alpha, beta: 13, 1, 6 in TOOD; 10, 0.5, 6 in ultralytics.

    Source: Feng et al. 2021 (TOOD), section 3.2; mmdetection 3.3.0 and ultralytics, ``TaskAlignedAssigner``. TOOD
    adds 1e-7 instead of 1e-9 where it normalises.
    """

    needs: ClassVar = ()

    variant: Literal["tood", "v8_3", "v8_4"] = "tood"
    topk: int = 13
    alpha: float = 1.0
    beta: float = 6.0

    def __post_init__(self):
        for name, low in {"topk": 1, "alpha": 0, "beta": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {low}")

    def __call__(self, preds: Predictions, targets: Targets) -> Assignment:
        priors, (num_images, num_slots) = preds.priors, preds.obj.shape
        rule, objects = VARIANTS[self.variant], targets.image
        within = inside(priors.center, self.tested_boxes(priors, targets.boxes), rule.margin)
        alignment, overlap = self.alignment(preds, targets)
        slots = first_largest(rule.ranked(alignment, within), min(self.topk, num_slots))  # [N, k]
        taken = within.gather(1, slots) & (alignment.gather(1, slots) > 0)
        target, taken = rule.settle(slots, taken, objects, overlap * within, num_images)

        pairs = target, slots
        weight = normalised(alignment[pairs], overlap[pairs], target, taken, len(targets))
        image, prior = objects[:, None].expand_as(slots).flatten(), slots.flatten()
        ignore = ignored_slots(priors, targets, num_images, image, prior, weight.flatten())
        return Assignment(image=image, prior=prior, target=target.flatten(), weight=weight.flatten(), ignore=ignore)

    def alignment(self, preds: Predictions, targets: Targets) -> tuple[Tensor, Tensor]:
        """Alignment and IoU [N, P] of every object with every slot of its picture, both >= 0."""
        image = targets.image
        score = preds.obj[image].sigmoid() * preds.cls[image, :, targets.labels].sigmoid()
        boxes = targets.boxes[:, None].to(preds.boxes.dtype)
        overlap = VARIANTS[self.variant].iou(preds.boxes[image], boxes).clamp(min=0)
        return score.pow(self.alpha) * overlap.pow(self.beta), overlap

    def tested_boxes(self, priors: Priors, boxes: Tensor) -> Tensor:
        """Boxes [N, 4] that points have to lie in."""
        strides = level_strides(priors).sort().values
        shortest = VARIANTS[self.variant].smallest * strides[min(1, len(strides) - 1)]
        center, size = xyxy_to_xywh(boxes).split(2, dim=-1)
        stretched = xywh_to_xyxy(torch.cat([center, torch.maximum(size, shortest)], dim=-1))
        short = (size < shortest).repeat(1, 2)
        return torch.where(short, stretched, boxes)


def normalised(alignment: Tensor, overlap: Tensor, target: Tensor, taken: Tensor, num_objects: int) -> Tensor:
    """Weights [N, k], float32: alignment / best alignment * best IoU of the object's slots; 0 where not ``taken``."""
    alignment, overlap = alignment * taken, overlap * taken
    best_alignment, best_overlap = (
        values.new_zeros(num_objects).scatter_reduce(0, target.flatten(), values.flatten(), "amax")[target]
        for values in (alignment, overlap)
    )
    return (alignment * best_overlap / (best_alignment + EPS)).float()

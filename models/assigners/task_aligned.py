"""Task-aligned assignment: the slots that are already good at both class and box of an object answer for it.

Letters: B images, N objects, P slots, M pairs of an object and a slot, k candidates of an object.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from models.assigners.base import ignored_slots
from models.assigners.points import inside, level_strides, sort_keys, wins
from models.structures import Assignment, Predictions, Priors
from utils.boxes import paired_ciou, paired_iou, xywh_to_xyxy, xyxy_to_xywh
from utils.structures import Targets

EPS = 1e-9  # added to the best alignment of an object before dividing by it


class Pairs(NamedTuple):
    """M pairs of an object and a slot of its picture, object by object, slots ascending: all that could match."""

    target: Tensor  # int64 [M]
    slot: Tensor  # int64 [M]
    place: Tensor  # int64 [M]: the slot among those of all pictures
    inside: Tensor  # bool [M]: the slot's point lies in the object's box
    alignment: Tensor  # [M] >= 0
    overlap: Tensor  # [M] >= 0


def settle_among_choosers(chosen: Tensor, taken: Tensor, pairs: Pairs, num_places: int) -> tuple[Tensor, Tensor]:
    """A contested slot goes to the object among its choosers that it overlaps most.

    ``chosen`` [N * k] are numbers of pairs, ``taken`` whether they count; the same two are returned.
    """
    return chosen, wins(pairs.place[chosen], pairs.overlap[chosen], taken, num_places)


def settle_among_all(chosen: Tensor, taken: Tensor, pairs: Pairs, num_places: int) -> tuple[Tensor, Tensor]:
    """A contested slot goes to the object of the picture that it overlaps most, whether or not that one chose it."""
    place = pairs.place[chosen]
    best = wins(pairs.place, pairs.overlap, pairs.inside, num_places)
    number = torch.arange(len(best), device=best.device)
    owner = torch.zeros(num_places, dtype=torch.int64, device=best.device)
    owner = owner.scatter_add(0, pairs.place, number * best)
    choosers = torch.zeros_like(owner).scatter_add(0, place, taken.long())
    keep = wins(place, torch.zeros_like(pairs.overlap[chosen]), taken, num_places)
    return torch.where(choosers[place] > 1, owner[place], chosen), keep


class Variant(NamedTuple):
    """How the peers differ."""

    iou: Callable
    margin: float  # pixels a point has to be within the box
    smallest: float  # boxes with a shorter side are tested as this long, in strides of the second finest level
    looked_at: Callable  # inside [N, P], predicted boxes [B, P, 4], targets -> which pairs [N, P] could match
    settle: Callable


VARIANTS = {
    "tood": Variant(paired_iou, 0.01, 0.0, lambda within, *both: overlapping(*both), settle_among_choosers),
    "v8_3": Variant(paired_ciou, EPS, 0.0, lambda within, *both: within, settle_among_all),
    "v8_4": Variant(paired_ciou, EPS, 1.0, lambda within, *both: within, settle_among_all),
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
        for name, low in {"topk": 1, "alpha": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {low}")
        if self.beta <= 0:  # boxes that miss the object are not looked at
            raise ValueError(f"beta is {self.beta}, expected more than 0")

    def __call__(self, preds: Predictions, targets: Targets) -> Assignment:
        priors, (num_images, num_slots) = preds.priors, preds.obj.shape
        pairs = self.pairs(preds, targets)
        chosen, taken = best_of_each(pairs, len(targets), min(self.topk, num_slots))
        taken = taken & pairs.inside[chosen]
        chosen, taken = VARIANTS[self.variant].settle(chosen, taken, pairs, num_images * num_slots)

        weight = normalised(pairs, chosen, taken, len(targets))
        target, prior = pairs.target[chosen], pairs.slot[chosen]
        image = targets.image[target]
        ignore = ignored_slots(priors, targets, num_images, image, prior, weight)
        return Assignment(image=image, prior=prior, target=target, weight=weight, ignore=ignore)

    def pairs(self, preds: Predictions, targets: Targets) -> Pairs:
        """Every object with the slots of its picture that could match, and how well they do."""
        rule, num_slots = VARIANTS[self.variant], len(preds.priors)
        within = inside(preds.priors, self.tested_boxes(preds.priors, targets.boxes), rule.margin)
        possible = rule.looked_at(within, preds.boxes, targets)
        target, slot = LISTS.get(within.device.type, list_all)(possible)
        image = targets.image[target]
        score = preds.obj[image, slot].sigmoid() * preds.cls[image, slot, targets.labels[target]].sigmoid()
        overlap = rule.iou(preds.boxes[image, slot], targets.boxes[target].to(preds.boxes.dtype)).clamp(min=0)
        alignment = score.pow(self.alpha) * overlap.pow(self.beta) * possible[target, slot]
        return Pairs(target, slot, image * num_slots + slot, within[target, slot], alignment, overlap)

    def tested_boxes(self, priors: Priors, boxes: Tensor) -> Tensor:
        """Boxes [N, 4] that points have to lie in."""
        strides = level_strides(priors).sort().values
        shortest = VARIANTS[self.variant].smallest * strides[min(1, len(strides) - 1)]
        center, size = xyxy_to_xywh(boxes).split(2, dim=-1)
        stretched = xywh_to_xyxy(torch.cat([center, torch.maximum(size, shortest)], dim=-1))
        short = (size < shortest).repeat(1, 2)
        return torch.where(short, stretched, boxes)


def list_few(possible: Tensor) -> tuple[Tensor, Tensor]:
    """Object and slot [M] of the pairs that are ``possible`` (bool [N, P]), and of each object's first slot.

    Waits for the device.
    """
    listed = possible.clone()
    listed[:, :1] = True  # no object is without a pair
    return listed.nonzero().unbind(1)


def list_all(possible: Tensor) -> tuple[Tensor, Tensor]:
    """Object and slot [N * P] of all pairs."""
    num_objects, num_slots = possible.shape
    numbers = torch.arange(num_objects * num_slots, device=possible.device)
    return numbers // num_slots, numbers % num_slots


LISTS = {"cpu": list_few}  # elsewhere all: a device does more work sooner than it answers


def overlapping(boxes: Tensor, targets: Targets) -> Tensor:
    """Bool [N, P]: objects and the predicted boxes [B, P, 4] of their pictures that have an area in common."""
    left, top, right, bottom = (side[targets.image] for side in boxes.unbind(-1))
    low_x, low_y, high_x, high_y = targets.boxes.to(boxes.dtype)[:, :, None].unbind(1)
    return (left < high_x) & (right > low_x) & (top < high_y) & (bottom > low_y)


def best_of_each(pairs: Pairs, num_objects: int, count: int) -> tuple[Tensor, Tensor]:
    """Numbers [N * count] of each object's best aligned pairs, and which are real.

    Best first, of equal ones the lowest slot, compared by ``sort_keys``. Where there are fewer of any alignment, the
    object's first pair fills up.
    """
    order = ((pairs.target << 32) - sort_keys(pairs.alignment)).argsort(stable=True)
    target = pairs.target[order]
    num = torch.zeros(num_objects, dtype=torch.int64, device=order.device).scatter_add(
        0, target, torch.ones_like(target)
    )
    first = num.cumsum(0) - num
    rank = torch.arange(len(order), device=order.device) - first[target]
    table = torch.zeros(num_objects, count + 1, dtype=torch.int64, device=order.device)
    table = table.view(-1).scatter(0, target * (count + 1) + rank.clamp(max=count), order).view(table.shape)[:, :count]
    real = (torch.arange(count, device=order.device) < num[:, None]) & (pairs.alignment[table] > 0)
    return torch.where(real, table, first[:, None]).flatten(), real.flatten()


def normalised(pairs: Pairs, chosen: Tensor, taken: Tensor, num_objects: int) -> Tensor:
    """Weights [N * k], float32: alignment / best alignment * best IoU of the object's slots; 0 where not ``taken``."""
    target = pairs.target[chosen]
    # not times taken: a box that is no number stays one, and what fills up a table may be such a box
    alignment, overlap = (torch.where(taken, values[chosen], 0) for values in (pairs.alignment, pairs.overlap))
    best_alignment, best_overlap = (
        values.new_zeros(num_objects).scatter_reduce(0, target, values, "amax")[target]
        for values in (alignment, overlap)
    )
    return (alignment * best_overlap / (best_alignment + EPS)).float()

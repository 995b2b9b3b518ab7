"""YOLOX's SimOTA: slots near an object's centre compete for it by cost; how many win, the object's best IoUs say.

Letters: B images, N objects, P slots, C classes, S slots looked at per object, U columns of a picture's candidates,
K = 10 * N rows.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from models.assigners.base import ignored_slots
from models.assigners.points import window
from models.structures import Assignment, Predictions, Priors, Reading
from utils.boxes import at_least_float32, paired_iou
from utils.structures import Targets

NUM_BEST = 10  # IoUs that are summed to an object's number of slots, which is therefore at most 10
LOWEST_LOG = -100.0  # of a probability, as in torch's binary cross-entropy


class Table(NamedTuple):
    """Every object against the candidates of its picture; ``columns`` are slots in ascending order."""

    columns: Tensor  # int64 [B, U]
    real: Tensor  # bool [B, U]: the others fill up the table
    iou: Tensor  # float [N, U], 0 where not real
    cost: Tensor  # float64 [N, U], inf where not real


@dataclass(frozen=True, kw_only=True)
class SimOTA:
    """Each object takes its k cheapest candidates, k = whole part of the sum of its 10 best IoUs, at least 1.

    * candidates of a picture: slots whose cell's middle is less than ``center_radius`` strides from the centre of any
      of its objects, in x and in y (``region: center``), or that or inside any box (``box_or_center``);
    * cost of a pair: sum over classes of BCE(sqrt(class * objectness), one-hot) + 3 * -ln(IoU + 1e-8), and ``penalty``
      where the slot is not in that region of this very object (``box_or_center``: in both, box and centre);
    * a slot taken by several objects goes to the one with the lowest cost of all objects of the picture, also if that
      one had not taken it; the first of equals.

    Row order: picture, then slot. The defaults are YOLOX since 2023; ``region=box_or_center, center_radius=2.5,
    penalty=1e5`` are 0.1 to 0.3. A duplicate of an object gets nothing, as in the peer.

    Deviations on purpose: an object far outside of its picture, without any candidate, is answered by nobody where the
    peer raises; of equal costs the lowest slot is taken where the peer leaves it to topk; costs are compared in
    float64, because in float32 the penalty rounds what it is added to to 1/16. Only pairs of an object with candidates
    of its own picture are looked at, never all slots.

    Source: Ge et al. 2021, section 2.1; YOLOX, ``get_assignments`` and ``simota_matching``.
    """

    needs: ClassVar[tuple[str, ...]] = ("objectness",)

    region: Literal["center", "box_or_center"] = "center"
    center_radius: float = 1.5  # strides
    penalty: float = 1e6

    def __post_init__(self):
        for name in ("center_radius", "penalty"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")

    def __call__(self, preds: Predictions, targets: Targets) -> Assignment:
        if len(targets) == 0:
            image = prior = target = torch.zeros_like(targets.image)
            weight = targets.boxes.new_zeros(0, dtype=torch.float32)
        else:
            table = self.table(preds, targets)
            owner = owners(table, targets.image)
            slot, taken = compact((owner < len(targets)).view(1, -1), NUM_BEST * len(targets))
            slot, weight = slot[0], taken[0].to(torch.float32)
            target = owner.view(-1)[slot].clamp(max=len(targets) - 1)
            image, prior = targets.image[target], table.columns.view(-1)[slot]
        ignore = ignored_slots(preds.priors, targets, len(preds.obj), image, prior, weight)
        return Assignment(image=image, prior=prior, target=target, weight=weight, ignore=ignore)

    def table(self, preds: Predictions, targets: Targets) -> Table:
        """All that the choice depends on. At least one object."""
        columns, real = self.candidates(preds, targets)
        priors, image = preds.priors, targets.image
        picture = torch.arange(len(columns), device=columns.device)[:, None].expand_as(columns)
        said = preds.read(picture.flatten(), columns.flatten())
        boxes = at_least_float32(said.boxes).unflatten(0, columns.shape)
        iou = paired_iou(targets.boxes[:, None].to(boxes.dtype), boxes[image]) * real[image]
        cost = class_cost(said, columns, targets) - 3 * (iou + 1e-8).log()
        regions = self.regions(priors.center[columns][image], priors.stride[columns][image], targets.boxes[:, None])
        outside = ~torch.stack(regions).all(0)
        cost = torch.where(real[image], cost.double() + self.penalty * outside, math.inf)
        return Table(columns, real, iou, cost)

    def candidates(self, preds: Predictions, targets: Targets) -> tuple[Tensor, Tensor]:
        """Columns [B, U] of the slots in a region of any object of the picture, and which of them are real."""
        priors, shape = preds.priors, preds.obj.shape
        slots = self.slots(priors, targets)  # [N, S]
        regions = self.regions(priors.center[slots], priors.stride[slots], targets.boxes[:, None])
        inside = torch.stack(regions).any(0).to(torch.int32)
        mask = inside.new_zeros(shape.numel())
        mask = mask.scatter_reduce(0, (targets.image[:, None] * shape[1] + slots).flatten(), inside.flatten(), "amax")
        return compact(mask.view(shape) > 0, min(shape[1], slots.shape[1] * targets.max_per_image))

    def slots(self, priors: Priors, targets: Targets) -> Tensor:
        """Slots [N, S] that may lie in an object's region: those around its centre, or all where boxes count."""
        if self.region == "box_or_center":
            return torch.arange(len(priors), device=targets.image.device).expand(len(targets), -1)
        centers, side = (targets.boxes[:, :2] + targets.boxes[:, 2:]) / 2, math.ceil(2 * self.center_radius)
        return torch.cat([window(centers, priors, grid, side).flatten(1) for grid in priors.grids], dim=1)

    def regions(self, points: Tensor, strides: Tensor, boxes: Tensor) -> list[Tensor]:
        """Whether points [..., 2] lie in the centre region, and in the box where it counts, of boxes [..., 4]."""
        low, high = boxes[..., :2], boxes[..., 2:]
        found = [((points - (low + high) / 2).abs() < self.center_radius * strides).all(-1)]
        if self.region == "box_or_center":
            found.append(((points > low) & (points < high)).all(-1))
        return found


def class_cost(said: Reading, columns: Tensor, targets: Targets) -> Tensor:
    """Sum over classes of BCE(sqrt(class * objectness), one-hot of the object), float32 [N, U]; columns [B, U].

    ``said`` is what the slots of all columns say, picture by picture.

    The sum of all classes as if they were wrong belongs to the slot, so that a pair only exchanges the term of its own
    class: no table of pairs and classes. In float32 as in the peer, whatever the predictions are.
    """
    classes = said.cls.unflatten(0, columns.shape).float()
    objectness = said.objectness.gather(1, columns).float()
    probability = (classes.sigmoid() * objectness.sigmoid()[..., None]).sqrt()  # [B, U, C]
    wrong = -(-probability).log1p().clamp(min=LOWEST_LOG).sum(-1)
    own = probability[targets.image, :, targets.labels]  # [N, U]
    exchange = (-own).log1p().clamp(min=LOWEST_LOG) - own.log().clamp(min=LOWEST_LOG)
    return wrong[targets.image] + exchange


def owners(table: Table, image: Tensor) -> Tensor:
    """The object [B, U] that each candidate answers for; N for none. ``image`` [N] says whose row is whose."""
    iou, cost = table.iou, table.cost
    most = min(NUM_BEST, cost.shape[1])
    count = iou.topk(most, dim=1).values.sum(1, keepdim=True).long().clamp(1, most)  # [N, 1]
    last = cost.topk(most, dim=1, largest=False).values.gather(1, count - 1)
    below, level = cost < last, cost == last
    chosen = below | (level & (level.cumsum(1) <= count - below.sum(1, keepdim=True)))
    chosen = chosen & table.real[image]

    shape, row = table.columns.shape, image[:, None].expand_as(cost)
    choosers = torch.zeros(shape, dtype=torch.int64, device=cost.device).scatter_add(0, row, chosen.long())
    lowest = cost.new_full(shape, math.inf).scatter_reduce(0, row, cost, "amin")
    claims = torch.where(choosers[image] > 1, cost == lowest[image], chosen)
    number = torch.arange(len(image), device=image.device)[:, None]
    claimed = torch.where(claims, number, len(image))
    return torch.full(shape, len(image), device=image.device).scatter_reduce(0, row, claimed, "amin")


def compact(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Columns [R, width] of the True entries of each row of ``mask`` [R, M], ascending, and which of them are real.

    What does not fit is left out; what fills up is column 0. Unlike ``nonzero``, nobody waits for the device.
    """
    place = torch.where(mask, mask.cumsum(1) - 1, width).clamp(max=width)
    number = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    columns = torch.zeros(len(mask), width + 1, dtype=torch.int64, device=mask.device).scatter(1, place, number)
    real = torch.arange(width, device=mask.device) < mask.sum(1, keepdim=True)
    return torch.where(real, columns[:, :width], 0), real

"""The network's nouns.

Letters: B images, P output slots of the whole network, C classes, K rows of an assignment, A anchors, R ignore regions.

Slots run head by head in the order of the cfg and, inside a head, anchor, then row, then column.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """One head's slots: ``start + (anchor * rows + row) * columns + column``. Plain integers: no device sync."""

    start: int  # first slot
    anchors: int
    rows: int
    columns: int

    @property
    def count(self) -> int:
        return self.anchors * self.rows * self.columns

    @property
    def slots(self) -> slice:
        return slice(self.start, self.start + self.count)


@dataclass(frozen=True, kw_only=True)
class Priors:
    """What each of the P output slots stands for before the network speaks. Pixels of the network's input."""

    center: Tensor  # float32 [P, 2]: x, y of the slot's point, the middle of its cell ([fcos] offset=0: the corner)
    size: Tensor  # float32 [P, 2]: width, height of the slot's anchor (anchor-free heads: the stride)
    stride: Tensor  # float32 [P, 2]: cell width, height
    level: Tensor  # int64 [P]: which head
    anchor: Tensor  # int64 [P]: which anchor of that head
    grids: tuple[Grid, ...]  # one per head

    @classmethod
    def cat(cls, parts: list["Priors"]) -> "Priors":
        """Join the priors of several heads, renumbering levels and slots."""
        grids, start = [], 0
        for part in parts:
            for grid in part.grids:
                grids.append(grid._replace(start=start))
                start += grid.count
        joined = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in ("center", "size", "stride", "anchor")
        }
        level = torch.cat([torch.full_like(part.level, number) for number, part in enumerate(parts)])
        return cls(level=level, grids=tuple(grids), **joined)

    def __len__(self) -> int:
        return len(self.center)


class Reading(NamedTuple):
    """What a loss asks a network: the objectness of every slot, and everything of K slots. With gradient."""

    objectness: Tensor  # float [B, P], logits
    boxes: Tensor  # float [K, 4] xyxy, pixels of the network's input
    deltas: Tensor  # float [K, 4]
    cls: Tensor  # float [K, C], logits


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the network says about every slot, decoded, with gradient.

    ``sigmoid(obj) * sigmoid(cls)`` is the score whatever the head: a head that uses another activation hands over the
    logits that give its probabilities. ``quality`` is a further factor some heads know (Gaussian: 1 - mean sigma).
    """

    boxes: Tensor  # float [B, P, 4] xyxy, pixels of the network's input; [B, P, C, 4] where each class has its own
    deltas: Tensor  # float [B, P, 4]: the raw regression outputs
    obj: Tensor  # float [B, P]: objectness logits
    cls: Tensor  # float [B, P, C]: class logits
    priors: Priors
    quality: Tensor | None = None  # float [B, P] in 0..1
    refine: Mapping[str, object] = field(default_factory=dict)  # second stage: section type -> its ``Branch``, if any

    def read(self, image: Tensor, slot: Tensor) -> Reading:
        """Objectness of all, and what slots ``slot`` of pictures ``image`` (int64 [K] both) say."""
        return Reading(self.obj, *(part[image, slot] for part in (self.boxes, self.deltas, self.cls)))

    @classmethod
    def cat(cls, parts: list["Predictions"]) -> "Predictions":
        """Join the predictions of several heads."""
        if len(parts) == 1:
            return parts[0]
        quality = None
        if any(part.quality is not None for part in parts):
            quality = torch.cat([torch.ones_like(p.obj) if p.quality is None else p.quality for p in parts], dim=1)
        joined = {
            name: torch.cat([getattr(part, name) for part in parts], dim=1)
            for name in ("boxes", "deltas", "obj", "cls")
        }
        refine = {name: branch for part in parts for name, branch in part.refine.items()}
        return cls(priors=Priors.cat([part.priors for part in parts]), quality=quality, refine=refine, **joined)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Who answers for whom: in picture ``image[k]``, slot ``prior[k]`` answers for object ``target[k]``.

    0-based; a slot that answers for nobody is absent. A row of weight 0 counts for nothing at all: assigners may hand
    over their fixed-size table of candidates with a weight instead of a list whose length only the device knows.
    Rows are in a fixed order; of several rows on one slot, the last one with weight > 0 names its objectness target.
    """

    image: Tensor  # int64 [K]
    prior: Tensor  # int64 [K], 0..P-1
    target: Tensor  # int64 [K], row of Targets
    weight: Tensor  # float32 [K] >= 0
    ignore: Tensor  # bool [B, P]: slots that are neither right nor wrong: no gradient

    def compact(self) -> "Assignment":
        """The same without rows of weight 0 (a device sync: for tests, pictures and reports)."""
        rows = (self.weight > 0).nonzero().squeeze(1)
        return Assignment(
            image=self.image[rows],
            prior=self.prior[rows],
            target=self.target[rows],
            weight=self.weight[rows],
            ignore=self.ignore,
        )

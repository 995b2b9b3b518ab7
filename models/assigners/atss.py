"""ATSS: of the nearest slots of every level, those that overlap the object unusually well answer for it.

Letters: B images, N objects, P slots, A anchors of a head, W cells of a window, M candidates of an object.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.assigners.base import ignored_slots
from models.assigners.points import window, wins
from models.structures import Assignment, Predictions, Priors
from utils.boxes import paired_iou, xywh_to_xyxy
from utils.structures import Targets


@dataclass(frozen=True, kw_only=True)
class Atss:
    """Per level the ``topk`` cells nearest to the object's centre are candidates, with all their anchors. A candidate
    answers for the object if the IoU of its prior box with it is at least mean + standard deviation of all the object's
    candidates, and its point lies inside the box (by more than 0.01 pixels).

    The threshold adapts: high where one level fits well, low where all fit badly. A slot chosen by several objects goes
    to the one it overlaps most (of equal ones the first). Weight 1. Row order object, level, distance (of equal ones
    the lowest cell), anchor.

    Args:
        topk: cells per level.
        scale: side of the prior box of an anchor-free head, in strides. Such a head is known by priors as large as
            their cells; heads with anchors have their own boxes.

    Source: Zhang et al. 2020 (ATSS), algorithm 1; mmdetection 3.3.0, ``ATSSAssigner``. The standard deviation is that
    of a sample (n - 1) as in both; a lone candidate has 0 instead of NaN. Threshold in float64, so that equal IoUs have
    exactly themselves as mean.
    """

    needs: ClassVar = ()

    topk: int = 9
    scale: float = 8.0

    def __post_init__(self):
        if self.topk < 1:
            raise ValueError(f"topk is {self.topk}, expected at least 1")
        if self.scale <= 0:
            raise ValueError(f"scale is {self.scale}, expected more than 0")

    def __call__(self, preds: Predictions, targets: Targets) -> Assignment:
        """Predictions only say which slots there are."""
        priors, (num_images, num_slots) = preds.priors, preds.obj.shape
        slots = self.candidates(priors, targets.boxes)  # [N, M]
        iou = paired_iou(self.prior_boxes(priors)[slots], targets.boxes[:, None])
        precise = iou.double()
        mean = precise.mean(1, keepdim=True)
        spread = ((precise - mean).square().sum(1, keepdim=True) / max(1, iou.shape[1] - 1)).sqrt()
        match = precise >= mean + spread
        match = match & inside_each(priors.center[slots], targets.boxes)

        image, prior = targets.image[:, None].expand_as(slots).flatten(), slots.flatten()
        target = torch.arange(len(targets), device=slots.device)[:, None].expand_as(slots).flatten()
        keep = wins(image * num_slots + prior, iou.flatten(), match.flatten(), num_images * num_slots)
        weight = keep.float()
        ignore = ignored_slots(priors, targets, num_images, image, prior, weight)
        return Assignment(image=image, prior=prior, target=target, weight=weight, ignore=ignore)

    def candidates(self, priors: Priors, boxes: Tensor) -> Tensor:
        """Slots [N, M] of the cells nearest to the centres of boxes [N, 4], level by level, nearest first."""
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        levels = []
        for grid in priors.grids:
            # the topk nearest cells are at most topk apart, also on a map of one row
            around = window(centers, priors, grid, self.topk)  # [N, A, W]
            distance = (priors.center[around[:, 0]] - centers[:, None]).square().sum(-1)
            nearest = distance.sort(dim=1, stable=True).indices[:, : self.topk]
            levels.append(around.gather(2, nearest[:, None].expand(-1, grid.anchors, -1)).transpose(1, 2).flatten(1))
        return torch.cat(levels, dim=1)

    def prior_boxes(self, priors: Priors) -> Tensor:
        """Boxes [P, 4] around the points."""
        anchor_free = (priors.size == priors.stride).all(-1, keepdim=True)
        size = torch.where(anchor_free, self.scale * priors.stride, priors.size)
        return xywh_to_xyxy(torch.cat([priors.center, size], dim=-1))


def inside_each(points: Tensor, boxes: Tensor, margin: float = 0.01) -> Tensor:
    """Bool [N, M]: points [N, M, 2] more than ``margin`` pixels within the box [N, 4] of their row."""
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    return ((points - low > margin) & (high - points > margin)).all(-1)

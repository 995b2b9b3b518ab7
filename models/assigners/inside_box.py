"""AutoAssign: every point inside an object's box answers for it; how much, the loss learns.

Letters: B images, N objects, P slots, K = N * P rows.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from models.assigners.base import ignored_slots
from models.assigners.points import first_largest, inside
from models.structures import Assignment, Predictions
from utils.structures import Targets


@dataclass(frozen=True, kw_only=True)
class InsideBox:
    """Match every slot whose point lies strictly inside the box, with weight 1: no scale rule, no centre rule.

    The table holds every pair of object and slot, row order object, slot. A point in several boxes answers for all of
    them. An object that lies between the points of all levels has none, unless ``force_topk`` gives it some.

    Args:
        force_topk: how many points an object without any gets: those nearest to its centre, in strides. 0 is AutoAssign
            as published, 9 the peer's number where it is switched on. The peer ranks by the learned centre prior, which
            here belongs to the loss; at its start (mean 0, sigma 1) that is this order.

    Source: Zhu et al. 2020 (AutoAssign), section 3.2; mmdetection 3.3.0, ``CenterPrior``.
    """

    needs: ClassVar = ()

    force_topk: int = 0

    def __post_init__(self):
        if self.force_topk < 0:
            raise ValueError(f"force_topk is {self.force_topk}, expected 0 or more")

    def __call__(self, preds: Predictions, targets: Targets) -> Assignment:
        """Predictions only say which slots there are."""
        priors, (num_images, num_slots) = preds.priors, preds.obj.shape
        match = inside(priors, targets.boxes)
        if self.force_topk:
            match = match | self._nearest(preds, targets) & ~match.any(1, keepdim=True)
        slots = torch.arange(num_slots, device=match.device)
        rows = torch.arange(len(targets), device=match.device)[:, None]
        image = targets.image[:, None].expand_as(match).flatten()
        prior, target = slots.expand_as(match).flatten(), rows.expand_as(match).flatten()
        weight = match.flatten().float()
        ignore = ignored_slots(priors, targets, num_images, image, prior, weight)
        return Assignment(image=image, prior=prior, target=target, weight=weight, ignore=ignore)

    def _nearest(self, preds: Predictions, targets: Targets) -> torch.Tensor:
        """Bool [N, P]: the slots nearest to each centre."""
        priors = preds.priors
        centers = (targets.boxes[:, None, :2] + targets.boxes[:, None, 2:]) / 2
        distance = ((priors.center - centers) / priors.stride).square().sum(-1)
        slots = first_largest(1 / (1 + distance), min(self.force_topk, len(priors)))
        return torch.zeros_like(distance, dtype=torch.bool).scatter(1, slots, True)

"""FCOS: the points around an object's centre answer for it, on the one level that its size belongs to.

Letters: B images, N objects, P slots, L levels, M slots around a centre.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.assigners.base import ignored_slots
from models.assigners.points import level_strides, window, wins
from models.structures import Assignment, Predictions, Priors
from utils.structures import Targets


@dataclass(frozen=True, kw_only=True)
class CenterSampling:
    """Match the slots whose point lies strictly inside the box and less than ``radius`` strides from its centre in x
    and in y, on the level where the farthest of the four sides is between ``reach`` strides of the next finer level
    and ``reach`` strides of its own (both included; the coarsest level has no end).

    A point of several objects goes to the smallest one (of equal ones the first). Weight 1. Row order object, level,
    anchor, row, column. With several anchors per cell all of them answer.

    Args:
        radius: in strides.
        reach: in strides. 8 is the published 64, 128, 256, 512 pixels for strides 8, 16, 32, 64, 128.

    Source: Tian et al. 2019 (FCOS), section 3.2, and its centre sampling; mmdetection 3.3.0, ``FCOSHead.get_targets``.
    """

    needs: ClassVar = ()

    radius: float = 1.5
    reach: float = 8.0

    def __post_init__(self):
        for name in ("radius", "reach"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")

    def __call__(self, preds: Predictions, targets: Targets) -> Assignment:
        """Predictions only say which slots there are."""
        priors, (num_images, num_slots) = preds.priors, preds.obj.shape
        boxes = targets.boxes[:, None]
        centers = (boxes[..., :2] + boxes[..., 2:]) / 2
        slots = self.candidates(priors, centers[:, 0])  # [N, M]
        points, reach = priors.center[slots], self.radius * priors.stride[slots]
        low = torch.maximum(centers - reach, boxes[..., :2])
        high = torch.minimum(centers + reach, boxes[..., 2:])
        farthest = torch.maximum(points - boxes[..., :2], boxes[..., 2:] - points).amax(-1)
        shortest, longest = self.ranges(priors)[:, priors.level[slots]]
        match = ((points > low) & (points < high)).all(-1) & (farthest >= shortest) & (farthest <= longest)

        image, prior = targets.image[:, None].expand_as(slots).flatten(), slots.flatten()
        target = torch.arange(len(targets), device=slots.device)[:, None].expand_as(slots).flatten()
        area = (boxes[..., 2:] - boxes[..., :2]).prod(-1).expand_as(slots).flatten()
        weight = wins(image * num_slots + prior, -area, match.flatten(), num_images * num_slots).float()
        ignore = ignored_slots(priors, targets, num_images, image, prior, weight)
        return Assignment(image=image, prior=prior, target=target, weight=weight, ignore=ignore)

    def candidates(self, priors: Priors, centers: Tensor) -> Tensor:
        """Slots [N, M] of the windows that hold every point within the radius of ``centers`` [N, 2]."""
        side = math.ceil(2 * self.radius) + 2  # an open interval of 2 r cells, and one more for rounding on either side
        return torch.cat([window(centers, priors, grid, side).flatten(1) for grid in priors.grids], dim=1)

    def ranges(self, priors: Priors) -> Tensor:
        """Smallest and largest distance [2, L], in pixels, that a level answers for, whatever the order of levels."""
        strides = level_strides(priors)
        finer = torch.where(strides < strides[:, None], strides, 0).amax(1)
        longest = torch.where(strides == strides.amax(), math.inf, self.reach * strides)
        return torch.stack([self.reach * finer, longest])

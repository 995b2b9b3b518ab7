"""Two thresholds on an IoU matrix: object, background, or neither. Knows nothing of boxes.

Letters: B images, N objects, P slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Two IoUs that differ by less than this share are a tie. With float equality, as in detectron2, which of two equally
# good slots wins would hang on the last bit, hence on the device and the dtype.
TIE = 1e-5


@dataclass(frozen=True, kw_only=True)
class IoUMatcher:
    """Label slots by the IoU with their best object: at least ``positive_iou`` 1, below ``negative_iou`` 0, between -1.

    The low-quality rule then makes positive, at any IoU above 0, the best slots of every object (all of a tie), so that
    no object that touches a slot stays alone. Such a slot answers for *its* best object, which may be another one.

    Source: detectron2 ``Matcher``, Faster R-CNN section 3.1.2. There an object that overlaps no slot makes positive
    every slot that overlaps nothing, thousands of them; here it gets none.
    """

    negative_iou: float = 0.3
    positive_iou: float = 0.7
    low_quality: bool = True

    def __post_init__(self):
        if not 0 <= self.negative_iou <= self.positive_iou <= 1:
            found = f"negative_iou is {self.negative_iou}, positive_iou {self.positive_iou}"
            raise ValueError(f"{found}; expected 0 <= negative_iou <= positive_iou <= 1")

    def __call__(self, iou: Tensor, image: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
        """Match every slot of every picture.

        Args:
            iou: float [N, P] of all objects of the batch with the slots, which all pictures share.
            image: int64 [N], the picture of each object.

        Returns:
            row: int64 [B, P], the object with the highest IoU, the first of a tie; N where a picture has none.
            labels: int8 [B, P], 1, 0 or -1.
        """
        num_objects, num_slots = iou.shape
        picture = image[:, None].expand_as(iou)
        best = iou.new_zeros(num_images, num_slots).scatter_reduce(0, picture, iou, "amax")
        number = torch.arange(num_objects, device=iou.device)[:, None]
        contender = torch.where(iou >= best[image] * (1 - TIE), number, num_objects)
        row = torch.full_like(best, num_objects, dtype=torch.int64).scatter_reduce(0, picture, contender, "amin")

        labels = (best >= self.positive_iou).to(torch.int8) - (
            (best >= self.negative_iou) & (best < self.positive_iou)
        ).to(torch.int8)
        if self.low_quality and num_objects:
            highest = iou.amax(1, keepdim=True)
            chosen = (iou >= highest * (1 - TIE)) & (highest > 0)
            chosen = torch.zeros_like(best).scatter_reduce(0, picture, chosen.to(best.dtype), "amax")
            labels = torch.where(chosen > 0, 1, labels)
        return row, labels

"""Region proposal network: an anchor is an object if it overlaps one enough, and only a few anchors are learned from.

Letters: B images, N objects, P slots, S largest number of positives drawn in a picture, K = B * S rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.assigners.base import ignored_slots
from models.assigners.iou_matcher import IoUMatcher
from models.assigners.sampling import subsample, tickets
from models.structures import Assignment, Predictions, Priors
from utils.boxes import box_iou, xywh_to_xyxy
from utils.structures import Targets


@dataclass(frozen=True, kw_only=True)
class RPN:
    """Match anchors with objects by IoU, then draw ``num_samples`` of them per picture.

    Negatives are the slots that are neither in the table nor in ``ignore``: between the thresholds, over the border,
    inside an ignore region or not drawn is ignored. Row order: picture, slot. One object per slot.

    Args:
        negative_iou, positive_iou, low_quality: see ``IoUMatcher``.
        border: anchors that reach further than this many pixels over the border are ignored; none: they count (the
            pyramids of today; Faster R-CNN dropped them with 0). The rule comes last, as in detectron2: it may take an
            object's only anchor.
        num_samples: per picture; none: no lottery. 256 is the published number; a picture with more than about 100
            objects asks for more (docs/assigners/rpn.md has the study).
        positive_fraction: at most this share of the samples is positive.
        seed: of the lottery (``sampling.tickets``).

    Source: detectron2 ``RPN.label_and_sample_anchors``; Faster R-CNN, section 3.1.2 and 3.1.3.
    """

    needs = ("anchors",)

    negative_iou: float = 0.3
    positive_iou: float = 0.7
    low_quality: bool = True
    border: float | None = None
    num_samples: int | None = 256
    positive_fraction: float = 0.5
    seed: int = 0

    def __post_init__(self):
        self.matcher()
        if self.border is not None and self.border < 0:
            raise ValueError(f"border is {self.border}, expected 0 or more, or none")
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}, expected 1 or more, or none")
        if not 0 < self.positive_fraction <= 1:
            raise ValueError(f"positive_fraction is {self.positive_fraction}, expected above 0 and at most 1")

    def matcher(self) -> IoUMatcher:
        """The rule that labels anchors before any is drawn."""
        return IoUMatcher(negative_iou=self.negative_iou, positive_iou=self.positive_iou, low_quality=self.low_quality)

    def __call__(self, preds: Predictions, targets: Targets) -> Assignment:
        """Predictions only say which slots there are, and stir the lottery."""
        row, labels = self.label(preds.priors, targets, len(preds.obj))
        num_positives = len(preds.priors)
        if self.num_samples is not None:
            labels = subsample(labels, tickets(preds.obj, self.seed), self.num_samples, self.positive_fraction)
            num_positives = min(num_positives, int(self.num_samples * self.positive_fraction))
        return _table(row, labels, targets, num_positives)

    def label(self, priors: Priors, targets: Targets, num_images: int) -> tuple[Tensor, Tensor]:
        """Before the lottery: the object [B, P] (row of ``targets``) and the label [B, P] of every slot."""
        anchors = anchor_boxes(priors)
        row, labels = self.matcher()(box_iou(targets.boxes.to(anchors.dtype), anchors), targets.image, num_images)
        if self.border is not None:
            labels = torch.where(_inside(anchors, priors, self.border), labels, -1)
        nobody = targets.image.new_zeros(0)
        in_region = ignored_slots(priors, targets, num_images, nobody, nobody, targets.boxes.new_zeros(0))
        return row, torch.where(in_region & (labels == 0), -1, labels)


def anchor_boxes(priors: Priors) -> Tensor:
    """Boxes [P, 4] of the anchors themselves."""
    return xywh_to_xyxy(torch.cat([priors.center, priors.size], dim=-1))


def _inside(anchors: Tensor, priors: Priors, margin: float) -> Tensor:
    """Which boxes [P] stay within the picture, give or take ``margin`` pixels."""
    grid = priors.grids[0]
    stride_x, stride_y = priors.stride[grid.start].unbind()
    x1, y1, x2, y2 = anchors.unbind(-1)
    inside_x = (x1 >= -margin) & (x2 < stride_x * grid.columns + margin)
    return inside_x & (y1 >= -margin) & (y2 < stride_y * grid.rows + margin)


def _table(row: Tensor, labels: Tensor, targets: Targets, num_positives: int) -> Assignment:
    """Rows of the positives of each picture, by slot; what is left of the ``num_positives`` places has weight 0."""
    ignore, num_slots = labels < 0, labels.shape[1]
    if len(targets) == 0:
        none = targets.image
        return Assignment(image=none, prior=none, target=none, weight=none.float(), ignore=ignore)
    countdown = torch.arange(num_slots, 0, -1, device=labels.device)
    left = torch.where(labels == 1, countdown, 0).topk(num_positives, dim=1).values
    prior = (num_slots - left) % num_slots
    # an empty place points at the first object of the batch: a picture need not have one of its own
    target = torch.where(left > 0, row.gather(1, prior), 0).flatten()
    return Assignment(
        image=targets.image[target],
        prior=prior.flatten(),
        target=target,
        weight=(left > 0).float().flatten(),
        ignore=ignore,
    )

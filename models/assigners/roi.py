"""Second stage: a proposal answers for the object it overlaps by half, and a few proposals are learned from.

Letters: B images, N objects, R proposals of the fullest picture, G objects of the fullest picture, K regions drawn,
C classes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.assigners.iou_matcher import IoUMatcher
from models.assigners.sampling import subsample, tickets
from models.proposals import Proposals
from utils.boxes import paired_iou
from utils.structures import Targets


@dataclass(frozen=True, kw_only=True)
class Regions:
    """The proposals that a step learns from, picture by picture."""

    image: Tensor  # int64 [K]
    boxes: Tensor  # float [K, 4] xyxy, pixels of the network's input
    labels: Tensor  # int64 [K], C for background
    target: Tensor  # int64 [K], row of Targets, N for background

    def __getitem__(self, rows: Tensor) -> "Regions":
        return Regions(**{name: values[rows] for name, values in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class RoiSampler:
    """Match proposals with objects by IoU, then draw ``num_samples`` of them per picture.

    The objects themselves join the proposals: a network that proposes nothing yet still sees positives. Background
    whose middle lies in an ignore region is left out.

    Args:
        positive_iou: from here on a proposal answers for its best object; below it is background.
        num_samples: per picture; fewer where there are not so many.
        positive_fraction: at most this share of them is positive.
        seed: of the lottery (``sampling.tickets``), which the proposals' logits stir.

    Source: detectron2 ``ROIHeads.label_and_sample_proposals``; Fast R-CNN, section 2.3.
    """

    positive_iou: float = 0.5
    num_samples: int = 512
    positive_fraction: float = 0.25
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.positive_iou <= 1:
            raise ValueError(f"positive_iou is {self.positive_iou}, expected above 0 and at most 1")
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}, expected 1 or more")
        if not 0 < self.positive_fraction <= 1:
            raise ValueError(f"positive_fraction is {self.positive_fraction}, expected above 0 and at most 1")

    @torch.no_grad()
    def __call__(self, proposals: Proposals, targets: Targets, num_classes: int) -> Regions:
        proposals = with_objects(proposals, targets)
        row, labels = self.label(proposals, targets)
        labels = subsample(labels, tickets(proposals.logits, self.seed), self.num_samples, self.positive_fraction)
        image, slot = (labels >= 0).nonzero(as_tuple=True)
        target = torch.where(labels == 1, row, len(targets))[image, slot]
        names = torch.cat([targets.labels, targets.labels.new_full((1,), num_classes)])
        return Regions(image=image, boxes=proposals.boxes[image, slot], labels=names[target], target=target)

    def label(self, proposals: Proposals, targets: Targets) -> tuple[Tensor, Tensor]:
        """Before the lottery: the best object [B, R] (row of ``targets``) of every proposal, and 1, 0 or -1 [B, R]."""
        matcher = IoUMatcher(negative_iou=self.positive_iou, positive_iou=self.positive_iou, low_quality=False)
        iou = paired_iou(targets.boxes[:, None], proposals.boxes[targets.image])  # [N, R]
        row, labels = matcher(iou, targets.image, len(proposals.boxes))
        ignored = in_ignore_regions(proposals.boxes, targets) & (labels == 0)
        return row, torch.where(proposals.valid & ~ignored, labels, -1)


def with_objects(proposals: Proposals, targets: Targets) -> Proposals:
    """The proposals [B, R] and, behind them, the objects of each picture: [B, R + G], G at least 1."""
    shape = (len(proposals.boxes), max(targets.max_per_image, 1))
    counts = torch.zeros(shape[0], dtype=torch.int64, device=targets.image.device)
    counts = counts.scatter_add(0, targets.image, torch.ones_like(targets.image))
    starts = counts.cumsum(0) - counts
    place = targets.image * shape[1] + torch.arange(len(targets), device=starts.device) - starts[targets.image]
    boxes = proposals.boxes.new_zeros(shape[0] * shape[1], 4)
    boxes = boxes.index_copy(0, place, targets.boxes.to(boxes.dtype)).view(*shape, 4)
    valid = torch.zeros(shape, dtype=torch.bool, device=starts.device).flatten().index_fill(0, place, True).view(shape)
    return replace(
        proposals,
        boxes=torch.cat([proposals.boxes, boxes], dim=1),
        logits=torch.cat([proposals.logits, torch.zeros_like(boxes[..., 0])], dim=1),
        valid=torch.cat([proposals.valid, valid], dim=1),
    )


def in_ignore_regions(boxes: Tensor, targets: Targets) -> Tensor:
    """Which boxes [B, R, 4] have their middle in an ignore region of their picture, bool [B, R]."""
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    low, high = targets.ignore_boxes[:, None, :2], targets.ignore_boxes[:, None, 2:]
    mine = middle[targets.ignore_image]
    inside = ((mine >= low) & (mine <= high)).all(-1)  # per region
    num_regions = torch.zeros(boxes.shape[:2], dtype=torch.int32, device=boxes.device)
    return num_regions.index_add(0, targets.ignore_image, inside.int()) > 0

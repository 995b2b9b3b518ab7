"""The losses of both stages: what the RPN learns, then what the second stage learns of the RPN's own proposals.

Letters: B images, N objects, K regions drawn, F of them that answer for an object, C classes, S cells of a mask's side.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.assigners.roi import Regions, RoiSampler
from models.coders import Coder
from models.losses.functional import bce
from models.losses.rcnn import RCNNLoss
from models.proposals import propose
from models.structures import Assignment, Predictions
from utils.boxes import xyxy_to_xywh
from utils.errors import UserError
from utils.structures import Targets


class TwoStageLoss(nn.Module):
    """``rpn_obj`` and ``rpn_box`` (see ``RCNNLoss``); of the sampled proposals ``cls``, ``box`` and ``mask``.

    * cls: cross-entropy over C classes and background, the mean over all K regions drawn in all pictures;
    * box: smooth L1 on the deltas of the true class, summed over the F regions with an object, divided by K, not F: a
      region counts the same whether few or many others found something;
    * mask: BCE on the true class's mask, the mean over F x S x S. Only where the network has a [mask].

    All are 0 where there is nothing to learn from; nothing proposed leaves the objects themselves.

    Args:
        num_classes, heads: of the network.
        beta: where smooth L1 turns from a parabola into a line, in deltas, of both stages. 0 is exactly L1.
        batch_size_per_image: of the RPN, its assigner's ``num_samples``.
        pre_nms, post_nms: proposals per level and per picture while training; more than at inference, which the cfg
            says, because those close to an object are what the second stage learns from.
        num_samples, positive_fraction, positive_iou, seed: see ``RoiSampler``.
        rpn_obj, rpn_box, cls, box, mask: gains.

    Raises:
        ValueError: a value out of range, naming it. UserError: a [mask] is to be taught and the data has no masks.

    Source: detectron2 ``StandardROIHeads.losses``; He et al. 2017, section 3.
    """

    needs = ("proposals",)

    def __init__(
        self,
        *,
        num_classes: int,
        heads: tuple = (),
        beta: float = 0.0,
        batch_size_per_image: int = 256,
        pre_nms: int = 2000,
        post_nms: int = 1000,
        num_samples: int = 512,
        positive_fraction: float = 0.25,
        positive_iou: float = 0.5,
        seed: int = 0,
        rpn_obj: float = 1.0,
        rpn_box: float = 1.0,
        cls: float = 1.0,
        box: float = 1.0,
        mask: float = 1.0,
    ):
        super().__init__()
        for name, value in {"cls": cls, "box": box, "mask": mask, "rpn_obj": rpn_obj, "rpn_box": rpn_box}.items():
            if value < 0:
                raise ValueError(f"{name} is {value}, expected 0 or more")
        for name, value in {"pre_nms": pre_nms, "post_nms": post_nms}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        self.first = RCNNLoss(
            num_classes=1,
            heads=tuple(head for head in heads if not head.demands),
            beta=beta,
            batch_size_per_image=batch_size_per_image,
            obj=rpn_obj,
            box=rpn_box,
        )
        self.sampler = RoiSampler(
            positive_iou=positive_iou, num_samples=num_samples, positive_fraction=positive_fraction, seed=seed
        )
        self.num_classes, self.beta, self.pre_nms, self.post_nms = num_classes, beta, pre_nms, post_nms
        self.gains = {"cls": cls, "box": box, "mask": mask}

    def forward(self, preds: Predictions, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
        """Weighted scalars; the total is their sum."""
        first = self.first(preds, targets, assignment)
        roi, regions = preds.refine["roi"], self.regions(preds, targets)
        logits, deltas = roi(regions.image, regions.boxes)
        rows = (regions.labels < self.num_classes).nonzero().squeeze(1)
        found = regions[rows]
        objects = targets.boxes[found.target].to(found.boxes.dtype)
        distance = box_loss(deltas[rows, found.labels], found.boxes, objects, roi.head.coder, self.beta)
        second = {
            "cls": F.cross_entropy(logits, regions.labels, reduction="sum") / max(len(logits), 1),
            "box": distance / max(len(logits), 1),
        }
        if "mask" in preds.refine:
            masks = object_masks(targets)[found.target]
            logits = preds.refine["mask"](found.image, found.boxes)
            logits = logits[torch.arange(len(rows), device=rows.device), found.labels]
            second["mask"] = mask_loss(logits, region_masks(masks, objects, found.boxes, logits.shape[-1]))
        terms = {name: self.gains[name] * term for name, term in second.items()}
        return {"rpn_obj": first["obj"], "rpn_box": first["box"], **terms}

    def regions(self, preds: Predictions, targets: Targets) -> Regions:
        """The proposals of these predictions that the second stage learns from."""
        roi = preds.refine["roi"]
        rule = replace(roi.head.rule, pre_nms=self.pre_nms, post_nms=self.post_nms)
        return self.sampler(propose(preds, roi.size, rule), targets, self.num_classes)


def box_loss(deltas: Tensor, boxes: Tensor, objects: Tensor, coder: Coder, beta: float) -> Tensor:
    """Summed smooth L1 of deltas [F, 4], said of regions ``boxes`` [F, 4] that answer for ``objects`` [F, 4]."""
    where = xyxy_to_xywh(boxes)
    wanted = coder.encode(objects, where[:, :2], where[:, 2:], where[:, 2:])
    return F.smooth_l1_loss(deltas, wanted, beta=beta, reduction="sum")


def object_masks(targets: Targets) -> Tensor:
    """Masks uint8 [N, M, M] of the objects. UserError where the data has none."""
    if targets.masks is None:
        hint = "take a cfg without [mask], or data with outlines"
        raise UserError("data", "has no masks, but the network has a [mask] head", hint)
    return targets.masks


def mask_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean BCE of logits [F, S, S]; 0 where there is no region."""
    return bce(logits, wanted).sum() / max(logits.numel(), 1)


def region_masks(masks: Tensor, objects: Tensor, boxes: Tensor, cells: int) -> Tensor:
    """What an object covers of a region's ``cells`` x ``cells``, 0 or 1: [F, S, S].

    Args:
        masks: uint8 [F, M, M], each in the frame of its object's box.
        objects: float [F, 4], those boxes.
        boxes: float [F, 4], the regions.

    A cell is the object where at least half of it is, as in detectron2.
    """
    from torchvision.ops import roi_align  # takes a second to import, and networks without masks never do

    low, extent = objects[:, :2].repeat(1, 2), (objects[:, 2:] - objects[:, :2]).repeat(1, 2)
    inside = (boxes - low) / extent.clamp(min=torch.finfo(extent.dtype).tiny) * masks.shape[-1]
    number = torch.arange(len(boxes), device=boxes.device)[:, None].to(boxes.dtype)
    share = roi_align(masks[:, None].to(boxes.dtype), torch.cat([number, inside], dim=1), cells, aligned=True)
    return (share[:, 0] >= 0.5).to(boxes.dtype)

"""At inference: what the second stage says of the first stage's proposals, then of the boxes that are left.

Letters: B images, R proposals of the fullest picture, C classes, n detections of a picture, S cells of a mask's side.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from models.heads import CERTAIN, softmax_logits
from models.proposals import propose
from models.roi_heads import Branch
from models.structures import Predictions
from utils.boxes import clip_boxes, xyxy_to_xywh
from utils.structures import Detections


def refined(preds: Predictions) -> Predictions:
    """Predictions whose slots are the proposals, a box per class; of a one-stage network the same as before.

    Scores are a softmax over classes and background, objectness has no more say. ``boxes`` are [B, R, C, 4], cut at the
    border of the input. ``priors`` stay those of the first stage. detectron2 ``fast_rcnn_inference``.
    """
    if "roi" not in preds.refine:
        return preds
    roi = preds.refine["roi"]
    proposals = propose(preds, roi.size, roi.head.rule)
    shape = proposals.valid.shape
    image = torch.arange(shape[0], device=proposals.boxes.device).repeat_interleave(shape[1])
    logits, deltas = roi(image, proposals.boxes.flatten(0, 1))
    where = xyxy_to_xywh(proposals.boxes)[:, :, None]
    deltas = deltas.unflatten(0, shape)
    # a place without proposal is silent; no number where the first stage says none, so that somebody counts it
    unheard = torch.where(preds.obj.isnan().any(1, keepdim=True), torch.nan, -torch.inf)
    boxes = roi.head.coder.decode(deltas, where[..., :2], where[..., 2:], where[..., 2:])
    return replace(
        preds,
        boxes=clip_boxes(boxes, roi.size),
        deltas=deltas,
        obj=torch.where(proposals.valid, CERTAIN, unheard).to(logits.dtype),
        cls=softmax_logits(logits)[:, :-1].unflatten(0, shape),
    )


def with_masks(branch: Branch, detections: Sequence[Detections]) -> list[Detections]:
    """The same detections with what the [mask] head sees in each box: masks [n, S, S], probabilities."""
    boxes, labels = (torch.cat([getattr(found, name) for found in detections]) for name in ("boxes", "labels"))
    counts = [len(found) for found in detections]
    image = torch.cat([torch.full((count,), row, device=boxes.device) for row, count in enumerate(counts)])
    masks = branch(image, boxes)[torch.arange(len(boxes), device=boxes.device), labels].sigmoid()
    return [replace(found, masks=part) for found, part in zip(detections, masks.split(counts))]

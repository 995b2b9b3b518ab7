"""From the first stage's slots to the few boxes that the second stage is asked about.

Letters: B images, P slots of the first stage, T of them that are looked at, R proposals of the fullest picture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.structures import Predictions
from utils.boxes import clip_boxes


@dataclass(frozen=True, kw_only=True)
class ProposalRule:
    """The best ``pre_nms`` slots of each level, cut at the border, too small ones dropped, those left that overlap a
    better one of their level by more than ``nms_thresh`` dropped, the best ``post_nms`` of the picture.

    ``min_size`` is a side in pixels of the network's input; boxes must be larger. Source: detectron2
    ``find_top_rpn_proposals``; Faster R-CNN, section 3.3; levels apart as in FPN.
    """

    pre_nms: int = 1000
    post_nms: int = 1000
    nms_thresh: float = 0.7
    min_size: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """Boxes per picture, best first, padded to the fullest one."""

    boxes: Tensor  # float [B, R, 4] xyxy, pixels of the network's input
    logits: Tensor  # float [B, R], objectness
    valid: Tensor  # bool [B, R]: not padding


@torch.no_grad()
def propose(preds: Predictions, size: tuple[int, int], rule: ProposalRule) -> Proposals:
    """Proposals of the first stage for images of ``size`` (H, W), without gradient.

    Boxes that are not finite are no proposals. Waits for the device: how many survive is not known before.
    """
    from torchvision.ops import batched_nms  # takes a second to import, and one-stage networks never do

    best = [
        preds.obj[:, grid.slots].topk(min(rule.pre_nms, grid.count), dim=1).indices + grid.start
        for grid in preds.priors.grids
    ]
    slots = torch.cat(best, dim=1)  # [B, T]
    logits, level = preds.obj.gather(1, slots), preds.priors.level[slots]
    boxes = preds.boxes.gather(1, slots[..., None].expand(-1, -1, 4))
    finite = boxes.isfinite().all(-1) & logits.isfinite()
    boxes = clip_boxes(boxes, size)
    large = (boxes[..., 2:] - boxes[..., :2] > rule.min_size).all(-1)
    kept = []
    for row, usable in enumerate(finite & large):
        usable = usable.nonzero().squeeze(1)
        order = batched_nms(boxes[row, usable], logits[row, usable], level[row, usable], rule.nms_thresh)
        kept.append(usable[order[: rule.post_nms]])
    rows = pad_sequence(kept, batch_first=True, padding_value=-1)
    valid = rows >= 0
    rows = rows.clamp(min=0)
    return Proposals(
        boxes=torch.where(valid[..., None], boxes.gather(1, rows[..., None].expand(-1, -1, 4)), 0.0),  # not nan
        logits=logits.gather(1, rows),
        valid=valid,
    )

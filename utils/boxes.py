"""Geometry of boxes: pure functions, xyxy, pixels.

Letters: N, M boxes.

A box is ``x1, y1, x2, y2`` with ``x1 <= x2`` and ``y1 <= y2``, in the last dimension. Values and gradients are finite
on every finite box: zero width or height, points, identical, touching, disjoint. Half and integer inputs are computed
in float32, float64 stays float64. ``box_iou`` pairs every row with every row, ``paired_*`` row with row.
"""

import math

import torch
from torch import Tensor

# Areas and squared diagonals below this (px^2) count as this in a denominator, without gradient: the IoU of two points
# is 0, not 0/0. Peers add a constant instead (1e-16, 1e-7, 1e-6), which moves every value a little; a floor moves none.
EPS = 1e-7


def at_least_float32(tensor: Tensor) -> Tensor:
    """The same in float32, or unchanged if float64: the area of a 256 pixel box overflows half."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre x, centre y, width, height [..., 4] -> corners [..., 4]. (COCO files hold the top-left corner instead.)"""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Corners [..., 4] -> centre x, centre y, width, height [..., 4]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] cut at the borders of an image of ``size`` (height, width)."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area [...] in px^2 of boxes [..., 4]."""
    x1, y1, x2, y2 = at_least_float32(boxes).unbind(-1)
    return (x2 - x1) * (y2 - y1)


def _overlap(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union of boxes whose leading dimensions broadcast."""
    left1, top1, right1, bottom1 = boxes1.unbind(-1)
    left2, top2, right2, bottom2 = boxes2.unbind(-1)
    width = (torch.minimum(right1, right2) - torch.maximum(left1, left2)).clamp(min=0)
    height = (torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)).clamp(min=0)
    intersection = width * height
    union = (box_area(boxes1) + box_area(boxes2) - intersection).clamp(min=EPS)
    return intersection / union, union


def _hull(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of the smallest box around both."""
    low = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    high = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    return (high - low).unbind(-1)


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU [N, M] of every box of [N, 4] with every box of [M, 4].

    torchvision's ``box_iou`` with the one difference that two boxes without area give 0 instead of NaN; importing
    torchvision for it would add 1.6 s to every start.
    """
    return _overlap(at_least_float32(boxes1)[:, None], at_least_float32(boxes2)[None])[0]


def wh_iou(sizes1: Tensor, sizes2: Tensor) -> Tensor:
    """IoU [N, M] of sizes [N, 2] and [M, 2] (width, height) laid on one corner: how alike two shapes are."""
    width1, height1 = at_least_float32(sizes1)[:, None].unbind(-1)
    width2, height2 = at_least_float32(sizes2)[None].unbind(-1)
    intersection = torch.minimum(width1, width2) * torch.minimum(height1, height2)
    return intersection / (width1 * height1 + width2 * height2 - intersection).clamp(min=EPS)


def paired_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU [N] of row with row, in 0..1."""
    return _overlap(at_least_float32(boxes1), at_least_float32(boxes2))[0]


def paired_giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU [N] in -1..1: IoU less the share of the hull that neither box covers.

    Rezatofighi et al. 2019, algorithm 1. Equals yolov3, yolov5, YOLOX since 2021 (0.1.0 subtracted the intersection
    instead of the union), fvcore and mmdetection.
    """
    boxes1, boxes2 = at_least_float32(boxes1), at_least_float32(boxes2)
    iou, union = _overlap(boxes1, boxes2)
    width, height = _hull(boxes1, boxes2)
    hull = (width * height).clamp(min=EPS)
    return iou - (hull - union) / hull


def paired_diou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Distance IoU [N] in -1..1: IoU less the squared distance of the centres in units of the hull's diagonal.

    Zheng et al. 2020, equation 7. Equals yolov3, yolov5, detectron2 and mmdetection.
    """
    boxes1, boxes2 = at_least_float32(boxes1), at_least_float32(boxes2)
    width, height = _hull(boxes1, boxes2)
    diagonal = (width.square() + height.square()).clamp(min=EPS)
    offset = (boxes1[..., :2] + boxes1[..., 2:] - boxes2[..., :2] - boxes2[..., 2:]) / 2
    return _overlap(boxes1, boxes2)[0] - offset.square().sum(-1) / diagonal


def paired_ciou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Complete IoU [N]: distance IoU less a term for different aspect ratios, whose weight takes no gradient.

    Zheng et al. 2020, equations 8 to 11. Equals yolov5 v6.0, and yolov3, yolov5 v7.0 and detectron2 wherever they are
    finite: they give NaN for identical boxes (here 1), for points and for boxes without height (the angle of a point is
    0). mmdetection differs on purpose: it drops the aspect term up to IoU 0.5.
    """
    boxes1, boxes2 = at_least_float32(boxes1), at_least_float32(boxes2)
    diou = paired_diou(boxes1, boxes2)
    aspect = (4 / math.pi**2) * (_angle(boxes2) - _angle(boxes1)).square()
    with torch.no_grad():
        weight = aspect / (1 - paired_iou(boxes1, boxes2) + aspect).clamp(min=EPS)
    return diou - weight * aspect


def _angle(boxes: Tensor) -> Tensor:
    """atan(width / height) in 0..pi/2, with a bounded gradient where there is no height."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return torch.atan(width / height.clamp(min=EPS))


IOUS = {"iou": paired_iou, "giou": paired_giou, "diou": paired_diou, "ciou": paired_ciou}

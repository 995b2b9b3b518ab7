"""By how much Darknet moves a box to overlap its object more.

Letters: K pairs of boxes. Boxes are in shares of the image's sides, as Darknet's are: on images that are not square an
aspect ratio or a distance differs from the one in pixels.
"""

import math

import torch
from torch import Tensor

from utils.boxes import EPS, paired_diou, paired_giou, paired_iou, xywh_to_xyxy, xyxy_to_xywh


def overlap_delta(kind: str, boxes: Tensor, truths: Tensor) -> Tensor:
    """Delta [K, 4] of centre x, centre y, width, height of ``boxes`` [K, 4] towards ``truths`` [K, 4], both xyxy.

    It is the gradient of the overlap (one of iou, giou, diou, ciou), except that

    * the IoU and GIoU parts of width and height are twice the derivative (there the moves of both sides are added);
    * in the distance part of DIoU and CIoU, what a shift of the centre does to the hull's diagonal has the wrong sign;
    * the aspect part of CIoU is not divided by w^2 + h^2, and its weight is taken as constant.

    Boxes that do not meet have no IoU part: they move by the GIoU or distance part alone; with kind iou they stay.

    Source: Darknet, ``box.c`` (facts only).
    """
    shared = _gradient(paired_giou if kind == "giou" else paired_iou, boxes, truths)
    delta = torch.cat([shared[:, :2], 2 * shared[:, 2:]], dim=1)
    if kind in ("diou", "ciou"):
        delta = delta + _distance_delta(boxes, truths)
    if kind == "ciou":
        delta = delta + _aspect_delta(boxes, truths)
    return delta


def _gradient(overlap, boxes: Tensor, truths: Tensor) -> Tensor:
    """Gradient [K, 4] of ``overlap`` by centre and size of the boxes."""
    with torch.enable_grad():
        boxes = xyxy_to_xywh(boxes).detach().requires_grad_()
        return torch.autograd.grad(overlap(xywh_to_xyxy(boxes), truths).sum(), boxes)[0]


def _distance_delta(boxes: Tensor, truths: Tensor) -> Tensor:
    true = _gradient(paired_diou, boxes, truths) - _gradient(paired_iou, boxes, truths)
    hull = torch.maximum(boxes[:, 2:], truths[:, 2:]) - torch.minimum(boxes[:, :2], truths[:, :2])
    apart = (truths - boxes)[:, :2] + (truths - boxes)[:, 2:]  # twice the way between the centres
    of_centres = apart / hull.square().sum(1, keepdim=True).clamp(min=EPS)
    return torch.cat([2 * of_centres - true[:, :2], true[:, 2:]], dim=1)


def _aspect_delta(boxes: Tensor, truths: Tensor) -> Tensor:
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    gap = _angle(truths) - _angle(boxes)
    aspect = 4 / math.pi**2 * gap.square()
    weight = aspect / (1 - paired_iou(boxes, truths) + aspect + 1e-6)
    turn = weight * 8 / math.pi**2 * gap
    return torch.stack([torch.zeros_like(turn), torch.zeros_like(turn), turn * height, -turn * width], dim=1)


def _angle(boxes: Tensor) -> Tensor:
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    return torch.atan2(width, height)

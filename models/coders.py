"""Box codes: what the four regression numbers of a slot mean. The only place where a box is encoded or decoded.

Letters: ... any leading dimensions, which broadcast (usually [B, P] against [P]).

Every code is a pair of inverse functions between raw regression outputs ``deltas`` [..., 4] and ``boxes`` [..., 4]
(xyxy, pixels of the network's input), given what the slot stands for, in pixels: ``center`` [..., 2] is the middle of
its cell (or of a proposal), ``size`` [..., 2] its anchor's width and height, ``stride`` [..., 2] its cell's. They keep
the dtype of their arguments and are differentiable; no size output, however large, makes a box or a gradient infinite.
Encoding is the exact inverse within a code's reach; outside of it the deltas stay finite.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from utils.boxes import xywh_to_xyxy, xyxy_to_xywh

MAX_FACTOR = 1000.0  # of an anchor's size, as in the YOLOv3 archive; Darknet and YOLOX have no limit and can overflow


class Coder(Protocol):
    """What heads, losses and assigners may ask of a code."""

    def decode(self, deltas: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor: ...

    def encode(self, boxes: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor: ...


def _boxes(center: Tensor, size: Tensor) -> Tensor:
    return xywh_to_xyxy(torch.cat([center, size], dim=-1))


def _center_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    boxes = xyxy_to_xywh(boxes)
    return boxes[..., :2], boxes[..., 2:]


def _factor(logs: Tensor, limit: float) -> Tensor:
    """exp, at most ``limit``. Clamped before exp: afterwards the gradient beyond would be 0 * inf."""
    return logs.clamp(max=math.log(limit)).exp()


def _log_factor(factor: Tensor, limit: float) -> Tensor:
    return factor.clamp(torch.finfo(factor.dtype).tiny, limit).log()


def _per_column(operation: Callable, deltas: Tensor, numbers: tuple[float, ...]) -> Tensor:
    """``operation(column, number)`` column by column: a tensor of the numbers would be a copy to the device."""
    return torch.stack([operation(column, number) for column, number in zip(deltas.unbind(-1), numbers)], dim=-1)


def _logit(fraction: Tensor) -> Tensor:
    margin = torch.finfo(fraction.dtype).eps
    return fraction.clamp(margin, 1 - margin).logit()


@dataclass(frozen=True)
class SigmoidExp:
    """YOLOv2, YOLOv3 and YOLOv4: sigmoid for the center, exp for the size.

    ``center + scale_x_y * (sigmoid(xy) - 1/2) * stride``, ``exp(wh) * size``. That is Darknet's
    ``corner + (s * sigmoid - (s - 1) / 2) * stride``: growing the reach around the middle of the cell.
    """

    scale_x_y: float = 1.0

    def decode(self, deltas: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor:
        offset = (deltas[..., :2].sigmoid() - 0.5) * self.scale_x_y
        return _boxes(center + offset * stride, _factor(deltas[..., 2:], MAX_FACTOR) * size)

    def encode(self, boxes: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor:
        middle, extent = _center_size(boxes)
        xy = _logit((middle - center) / (stride * self.scale_x_y) + 0.5)
        return torch.cat([xy, _log_factor(extent / size, MAX_FACTOR)], dim=-1)


@dataclass(frozen=True)
class SigmoidSquare:
    """Scaled-YOLOv4 (new_coords), YOLOv5 and YOLOv7: ``(2 * sigmoid(wh))^2 * size``, at most four anchors wide.

    YOLOv5's center, ``corner + (2 * sigmoid - 0.5) * stride``, is the case scale_x_y = 2.
    """

    scale_x_y: float = 2.0

    def decode(self, deltas: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor:
        fraction = deltas.sigmoid()
        offset = (fraction[..., :2] - 0.5) * self.scale_x_y
        return _boxes(center + offset * stride, (2 * fraction[..., 2:]).square() * size)

    def encode(self, boxes: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor:
        middle, extent = _center_size(boxes)
        xy = (middle - center) / (stride * self.scale_x_y) + 0.5
        wh = (extent / size).clamp(min=0).sqrt() / 2
        return _logit(torch.cat([xy, wh], dim=-1))


@dataclass(frozen=True)
class CornerOffsetExp:
    """YOLOX: offset from the cell's top left corner in cells, exp for the size in cells (``size`` is the stride)."""

    def decode(self, deltas: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor:
        middle = center + (deltas[..., :2] - 0.5) * stride
        return _boxes(middle, _factor(deltas[..., 2:], MAX_FACTOR) * size)

    def encode(self, boxes: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor:
        middle, extent = _center_size(boxes)
        xy = (middle - center) / stride + 0.5
        return torch.cat([xy, _log_factor(extent / size, MAX_FACTOR)], dim=-1)


@dataclass(frozen=True)
class Distances:
    """FCOS, AutoAssign: distances from the point to the left, top, right and bottom side, in cells; never negative."""

    def decode(self, deltas: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor:
        reach = deltas.clamp(min=0)
        return torch.cat([center - reach[..., :2] * stride, center + reach[..., 2:] * stride], dim=-1)

    def encode(self, boxes: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor:
        reach = torch.cat([(center - boxes[..., :2]) / stride, (boxes[..., 2:] - center) / stride], dim=-1)
        return reach.clamp(min=0)


@dataclass(frozen=True)
class AnchorDeltas:
    """R-CNN: center shift in anchor sizes, log of the size factor, each times a weight (Faster R-CNN, section 3.1.2).

    The size factor is at most 1000/16, applied after dividing by the weight, as in detectron2.
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    max_factor: float = 1000.0 / 16

    def decode(self, deltas: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor:
        deltas = _per_column(torch.div, deltas, self.weights)
        return _boxes(center + deltas[..., :2] * size, _factor(deltas[..., 2:], self.max_factor) * size)

    def encode(self, boxes: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> Tensor:
        middle, extent = _center_size(boxes)
        deltas = torch.cat([(middle - center) / size, _log_factor(extent / size, math.inf)], dim=-1)
        return _per_column(torch.mul, deltas, self.weights)


CODERS = {
    "yolov3": SigmoidExp,
    "region": SigmoidExp,  # its anchors are written in cells; priors hold them in pixels
    "new_coords": SigmoidSquare,
    "yolov5": SigmoidSquare,
    "yolox": CornerOffsetExp,
    "ltrb": Distances,
    "rcnn": AnchorDeltas,
}

"""Pooling as Darknet does it: padding is a total, mostly right and below, and outside counts as nothing at all.

Outside is minus infinity for a maximum (the PyTorch ancestor pads the 2x2 stride-1 pool with zeros, which shows where
all values of a window are negative) and is left out of a mean. Letters: B images, C channels, H W height and width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.convolutional import blur_of, strides


def _outer_padding(length: int, size: int, stride: int, total: int) -> tuple[int, int]:
    """(before, after) of one axis: windows start at -(total // 2); there are (length + total - size) // stride + 1."""
    before = total // 2
    windows = (length + total - size) // stride + 1
    return before, max((windows - 1) * stride + size - length - before, 0)


class _Pool(nn.Module):
    """Windows of [maxpool] and [local_avgpool]: ``padding`` is the total of both sides, by default size - 1."""

    def __init__(self, size: int, stride: tuple[int, int], padding: int, blur: nn.Module):
        super().__init__()
        self.size, self.stride, self.padding, self.blur = size, stride, padding, blur

    @classmethod
    def from_spec(cls, spec) -> nn.Module:
        section = spec.section
        size = section.int("size", section.int("stride", 1))
        blurred = section.int("antialiasing", 0)  # the pool then runs with stride 1 and the blur strides
        stride = (1, 1) if blurred else strides(section)
        return cls(size, stride, section.int("padding", size - 1), blur_of(section, strides(section)))

    def outside(self, x: Tensor) -> tuple[int, int, int, int]:
        """Pixels to add: left, right, top, bottom."""
        vertical, horizontal = (
            _outer_padding(length, self.size, stride, self.padding) for length, stride in zip(x.shape[-2:], self.stride)
        )
        return *horizontal, *vertical

    def extra_repr(self) -> str:
        return f"size={self.size}, stride={self.stride}, padding={self.padding}"


class MaxPool(_Pool):
    """[maxpool]: outside counts as minus infinity; an odd total puts the extra pixel right and below.

    Size 2 stride 2 so rounds odd sizes up, size 2 stride 1 keeps the size.
    """

    @classmethod
    def from_spec(cls, spec) -> nn.Module:
        return MaxPoolDepth.from_spec(spec) if spec.section.flag("maxpool_depth") else super().from_spec(spec)

    def forward(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self.outside(x)
        if left == top and right <= left and bottom <= top:  # torch's own padding is symmetric, and free
            return self.blur(F.max_pool2d(x, self.size, self.stride, left))
        return self.blur(F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-math.inf), self.size, self.stride))


class MaxPoolDepth(nn.Module):
    """[maxpool] with ``maxpool_depth``: output channel g of n is the maximum of channels g, g + n, g + 2n, ..."""

    def __init__(self, num_outputs: int):
        super().__init__()
        self.num_outputs = num_outputs

    @classmethod
    def from_spec(cls, spec) -> "MaxPoolDepth":
        return cls(spec.section.int("out_channels", 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, start :: self.num_outputs].amax(1) for start in range(self.num_outputs)], dim=1)


class LocalAvgPool(_Pool):
    """[local_avgpool]: the mean of the pixels of the window that lie inside the map."""

    def forward(self, x: Tensor) -> Tensor:
        outside = self.outside(x)
        inside = F.pad(torch.ones_like(x[:1, :1]), outside)
        return F.avg_pool2d(F.pad(x, outside), self.size, self.stride) / F.avg_pool2d(inside, self.size, self.stride)


class AvgPool(nn.Module):
    """[avgpool]: the mean of each channel. Output [B, C, 1, 1]."""

    @classmethod
    def from_spec(cls, spec) -> "AvgPool":
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

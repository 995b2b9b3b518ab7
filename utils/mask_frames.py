"""Masks in the frame of their boxes: from one box to another, and onto the picture.

Letters: n masks, S side of a mask, H W height and width of the picture, h w of a patch of it.

A mask is S x S values at the middles of the cells that divide its box evenly. Between them it is read bilinearly, and
beyond them as zero (detectron2's pasting): separable, hence two small matrix products.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

THRESHOLD = 0.5  # of a probability that counts as the object


class Patch(NamedTuple):
    """One object's pixels: a part of a picture that holds all of them."""

    top: int
    left: int
    pixels: np.ndarray  # bool [h, w]

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.pixels))

    @property
    def window(self) -> tuple[int, int, int, int]:
        """left, top, right, bottom."""
        return self.left, self.top, self.left + self.pixels.shape[1], self.top + self.pixels.shape[0]

    def cut(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """The pixels in a window that lies within the patch."""
        return self.pixels[top - self.top : bottom - self.top, left - self.left : right - self.left]


def reframe(masks: Tensor, boxes: Tensor, frames: Tensor) -> Tensor:
    """Masks [n, S, S] of boxes [n, 4] as masks [n, S, S] of other boxes (``frames`` [n, 4] xyxy, the same pixels)."""
    steps = (torch.arange(masks.shape[-1], dtype=boxes.dtype, device=boxes.device) + 0.5) / masks.shape[-1]
    points = frames[:, None, :2] + steps[:, None] * (frames[:, None, 2:] - frames[:, None, :2])  # [n, S, 2]
    return sample_masks(masks, boxes, points[..., 0], points[..., 1])


def sample_masks(masks: Tensor, boxes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values [n, h, w] of masks [n, S, S] of boxes [n, 4] at the crossings of columns x [n, w] and rows y [n, h]."""
    across = _weights(x, boxes[:, 0], boxes[:, 2], masks.shape[-1])
    down = _weights(y, boxes[:, 1], boxes[:, 3], masks.shape[-1])
    return down @ masks.to(down.dtype) @ across.transpose(1, 2)


def _weights(places: Tensor, low: Tensor, high: Tensor, side: int) -> Tensor:
    """Share [n, k, S] of each cell in the value at places [n, k] of the interval low..high ([n]): hat functions."""
    extent = (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    position = (places - low[:, None]) / extent[:, None] * side - 0.5
    return (1 - (position[..., None] - torch.arange(side, device=places.device)).abs()).clamp(min=0)


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[Patch]:
    """The pixels of each object in a picture of ``size`` (H, W): those in whose middle its mask is at least a half.

    Args:
        masks: float [n, S, S] in 0..1, on the CPU.
        boxes: float [n, 4] xyxy, pixels of the picture.
    """
    limit = torch.tensor([size[1], size[0]] * 2)
    whole = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1).nan_to_num(0)
    windows = torch.minimum(whole.clamp(min=0), limit).int().tolist()
    patches = []
    for row, (left, top, right, bottom) in enumerate(windows):
        x = torch.arange(left, max(left, right), dtype=boxes.dtype) + 0.5
        y = torch.arange(top, max(top, bottom), dtype=boxes.dtype) + 0.5
        values = sample_masks(masks[row : row + 1], boxes[row : row + 1], x[None], y[None])[0]
        patches.append(Patch(top, left, (values >= THRESHOLD).numpy()))
    return patches

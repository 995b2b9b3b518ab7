"""Anchors by rule instead of by table: sizes x ratios, as R-CNN's region proposal network has them.

Letters: A anchors of a cell, P = A * h * w slots.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from models.heads import _priors
from models.structures import Priors


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Width and height, pixels, of the A = sizes x ratios anchors of a cell, sizes outermost.

    An anchor covers ``size`` squared; ``ratio`` is height by width (detectron2 ``DefaultAnchorGenerator``).
    """
    return tuple((size / ratio**0.5, size * ratio**0.5) for size in sizes for ratio in ratios)


def anchor_priors(
    anchors: Sequence[tuple[float, float]],
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    offset: float = 0.0,
    device=None,
    dtype=torch.float32,
) -> Priors:
    """The P slots of anchors (width, height) on every cell of a ``grid`` (h, w) over an input of ``size`` (H, W).

    Args:
        offset: where in its cell an anchor is centred, in cells: 0 the top left corner (detectron2, torchvision),
            0.5 the middle (YOLO).
    """
    priors = _priors(tuple(anchors), tuple(grid), tuple(size), torch.device(device or "cpu"), dtype)
    return replace(priors, center=priors.center + (offset - 0.5) * priors.stride)

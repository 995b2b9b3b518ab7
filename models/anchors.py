"""Where output slots stand, and which anchors they carry: by table, or by rule as in R-CNN.

Letters: A anchors of a cell, h w rows and columns of a map, P = A * h * w slots, H W of the network's input.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from models.structures import Grid, Priors

Anchors = tuple[tuple[float, float], ...]  # width and height of each, pixels


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Anchors:
    """The A = sizes x ratios anchors of a cell of a region proposal network, sizes outermost.

    An anchor covers ``size`` squared; ``ratio`` is height by width (detectron2 ``DefaultAnchorGenerator``).
    """
    return tuple((size / ratio**0.5, size * ratio**0.5) for size in sizes for ratio in ratios)


def cell_centers(rows: int, columns: int, offset: float, stride: Tensor) -> Tensor:
    """The points [rows * columns, 2] (x, y, pixels) ``offset`` cells inside their cells; ``stride`` [2] is x, y."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return (torch.stack([column, row], dim=-1).to(stride.dtype) + offset).flatten(0, 1) * stride


@lru_cache(maxsize=64)
def grid_priors(
    anchors: Anchors, offset: float, grid: tuple[int, int], size: tuple[int, int], device: torch.device, dtype
) -> Priors:
    """The P slots of one map (h, w) on an input of ``size`` (H, W).

    Kept, as multi-scale training comes back to the same few sizes; never written to.

    Args:
        offset: where in its cell a slot's point stands, in cells: 0.5 the middle (YOLO), 0 the top left corner
            (detectron2, AutoAssign).
    """
    rows, columns = grid
    with torch.inference_mode(False), torch.no_grad():  # else training could not use what inference has cached
        stride = torch.tensor([size[1] / columns, size[0] / rows], dtype=dtype)
        num = len(anchors)
        parts = {
            "center": cell_centers(rows, columns, offset, stride).repeat(num, 1),
            "size": torch.tensor(anchors, dtype=dtype).repeat_interleave(rows * columns, dim=0),
            "stride": stride.repeat(num * rows * columns, 1),
            "level": torch.zeros(num * rows * columns, dtype=torch.int64),
            "anchor": torch.arange(num).repeat_interleave(rows * columns),
        }
        grids = (Grid(start=0, anchors=num, rows=rows, columns=columns),)
        return Priors(grids=grids, **{name: part.to(device) for name, part in parts.items()})

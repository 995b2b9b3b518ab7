"""What the point-based assigners share: points inside boxes, cells around a centre, and choices with one answer.

Letters: B images, N objects, P slots, K rows, A anchors of a head, W cells of a window.

A slot's point is ``Priors.center``. Where values are equal the first row or slot is chosen, on every device: plain
``topk`` and writing by index leave that to chance.
"""

import math

import torch
from torch import Tensor

from models.structures import Grid, Priors


def inside(priors: Priors, boxes: Tensor, margin: float = 0.0) -> Tensor:
    """Bool [N, P]: points more than ``margin`` pixels away from every side of boxes [N, 4], within them.

    Points stand in grids: what holds for a column and for a row of them says all.
    """
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # [N, 1] each
    parts = []
    for grid in priors.grids:
        cells = priors.center[grid.start : grid.start + grid.rows * grid.columns]
        x, y = cells[: grid.columns, 0], cells[:: grid.columns, 1]
        across, down = (x - left > margin) & (right - x > margin), (y - top > margin) & (bottom - y > margin)
        parts.append((down[:, :, None] & across[:, None]).flatten(1).repeat(1, grid.anchors))
    return torch.cat(parts, dim=1)


def window(centers: Tensor, priors: Priors, grid: Grid, side: int) -> Tensor:
    """Slots [N, A, W] of the ``side`` x ``side`` cells whose points are nearest to ``centers`` [N, 2] (pixels).

    Row by row. At a border the window moves inwards, on a smaller map it is the map: W depends on shapes alone.
    """
    height, width = min(side, grid.rows), min(side, grid.columns)
    first, stride = priors.center[grid.start], priors.stride[grid.start]
    column, row = ((centers - first) / stride).unbind(-1)
    left = (column - (width - 1) / 2).round().clamp(0, grid.columns - width).long()
    top = (row - (height - 1) / 2).round().clamp(0, grid.rows - height).long()
    rows = top[:, None] + torch.arange(height, device=top.device)
    columns = left[:, None] + torch.arange(width, device=top.device)
    cells = (rows[:, :, None] * grid.columns + columns[:, None]).flatten(1)  # [N, W]
    anchors = grid.start + torch.arange(grid.anchors, device=top.device) * (grid.rows * grid.columns)
    return anchors[:, None] + cells[:, None]


def level_strides(priors: Priors) -> Tensor:
    """Pixels per cell [L] of each head, the larger of both directions."""
    return torch.stack([priors.stride[grid.start].amax() for grid in priors.grids])


def sort_keys(values: Tensor) -> Tensor:
    """int64 [...], of 31 bits, in the order of ``values`` [...] >= 0 as float32; not a number counts as 0.

    The bits of floats >= 0 are in the order of the floats.
    """
    return values.float().nan_to_num(0, posinf=math.inf).contiguous().view(torch.int32).long()


def first_largest(values: Tensor, count: int) -> Tensor:
    """Slots [N, count] of the largest of ``values`` [N, P] >= 0, largest first, of equal ones the lowest slot.

    Compared by ``sort_keys``, with the slot behind them, so that no two are equal.
    """
    last = values.shape[1] - 1
    keys = (sort_keys(values) << 32) + torch.arange(last, -1, -1, device=values.device)
    return last - (keys.topk(count, dim=1).values & 0xFFFFFFFF)


def wins(slot: Tensor, value: Tensor, taken: Tensor, num_slots: int) -> Tensor:
    """Bool [K]: among the ``taken`` rows [K] on its ``slot`` [K], this one has the largest ``value`` [K], or is the
    first of those. ``slot`` is a row of all slots of the batch, 0..num_slots-1."""
    value = torch.where(taken, value, -math.inf)
    best = value.new_full((num_slots,), -math.inf).scatter_reduce(0, slot, value, "amax")
    is_best = taken & (value == best[slot])
    number = torch.where(is_best, torch.arange(len(slot), device=slot.device), len(slot))
    first = slot.new_full((num_slots,), len(slot)).scatter_reduce(0, slot, number, "amin")
    return is_best & (first[slot] == number)

"""YOLOv5: every anchor of roughly the object's shape answers for it, in its cell and in the two nearest ones.

Letters: N objects, A anchors of a head, S = 5 places: own cell, left, up, right, down; K = sum of S * A * N rows.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.assigners.base import anchors_of, cells_of, ignored_slots
from models.structures import Assignment, Grid, Predictions, Priors
from utils.boxes import xyxy_to_xywh
from utils.structures import Targets

PLACES = ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1))  # steps x, y to own cell, left, up, right, down


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Match where neither width nor height of object and anchor differ by a factor of ``anchor_t``, in up to 3 cells.

    Beside its own cell an object takes the left one if its centre lies in the left half of the cell, else the right
    one, and likewise above or below; neither on an exact half, none across the border of the image. A centre exactly
    between two cells counts twice for its own, as in the peer. Hence three times as many positives as YOLOv3, and
    offsets of -0.5..1.5 cells for the head to reach (``scale_x_y=2``). An object may be answered for by several anchors
    and heads, or by nobody. Row order: head, place (own, left, up, right, down), anchor, object; pairs that do not
    match have weight 0. Where two objects meet in one slot, both rows stand.

    Source: ultralytics/yolov5 v7.0, ``ComputeLoss.build_targets`` (identical in v6.0).
    """

    needs: ClassVar = ("anchors",)

    anchor_t: float = 4.0  # a factor above 1; strictly below it matches

    def __post_init__(self):
        if self.anchor_t <= 1:
            raise ValueError(f"anchor_t is {self.anchor_t}, expected more than 1")

    def __call__(self, preds: Predictions, targets: Targets) -> Assignment:
        """Predictions only say which slots there are: the match depends on shapes and places alone."""
        priors = preds.priors
        objects = xyxy_to_xywh(targets.boxes)
        rows = torch.arange(len(targets), device=targets.boxes.device)
        tables = []
        for grid in priors.grids:
            like = self._is_like(anchors_of(priors, grid), objects[:, 2:])  # [A, N]
            row, column, near = _cells_around(objects[:, :2], priors, grid)  # [S, N]
            first = grid.start + torch.arange(grid.anchors, device=rows.device)[:, None] * (grid.rows * grid.columns)
            prior = first + (row * grid.columns + column)[:, None]  # [S, A, N]
            weight = (like & near[:, None]).to(torch.float32)
            columns = targets.image.expand_as(prior), prior, rows.expand_as(prior), weight
            tables.append([column.flatten() for column in columns])
        image, prior, target, weight = (torch.cat(column) for column in zip(*tables))
        ignore = ignored_slots(priors, targets, len(preds.obj), image, prior, weight)
        return Assignment(image=image, prior=prior, target=target, weight=weight, ignore=ignore)

    def _is_like(self, anchors: Tensor, sizes: Tensor) -> Tensor:
        """Whether [A, N] of anchors [A, 2] and sizes [N, 2] both sides differ by less than ``anchor_t``."""
        ratio = sizes / anchors[:, None]
        return (torch.maximum(ratio, 1 / ratio) < self.anchor_t).all(-1)


def _cells_around(centers: Tensor, priors: Priors, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and whether it is one of the object's [S, N], for ``centers`` [N, 2] in pixels."""
    stride = priors.stride[grid.start]
    x, y = (centers / stride).unbind(-1)
    from_right, from_bottom = grid.columns - x, grid.rows - y
    near = [torch.ones_like(x, dtype=torch.bool)]
    near += [(distance % 1 < 0.5) & (distance > 1) for distance in (x, y, from_right, from_bottom)]
    cells = [
        cells_of(
            torch.stack([centers[:, 0] + dx * stride[0] / 2, centers[:, 1] + dy * stride[1] / 2], dim=-1), priors, grid
        )
        for dx, dy in PLACES
    ]
    row, column = (torch.stack(part) for part in zip(*cells))
    return row, column, torch.stack(near)

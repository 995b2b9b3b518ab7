"""YOLOv3 archive: every anchor whose shape is like the object's answers for it, in the cell of the object's centre.

Letters: N objects, A anchors of a head, K = sum over the heads of A * N rows.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from models.assigners.base import anchors_of, cells_of, ignored_slots
from models.structures import Assignment, Predictions
from utils.boxes import wh_iou, xyxy_to_xywh
from utils.structures import Targets


@dataclass(frozen=True, kw_only=True)
class WhIoU:
    """Match where the IoU of object and anchor, laid on one corner, is above ``iou_t``.

    An object may be answered for by several anchors and several heads, or by nobody when its shape is like no anchor's;
    no best-anchor rule, no neighbour cells. The table holds every pair of anchor and object, row order head, anchor,
    object; pairs that do not match have weight 0. Where two objects meet in one slot, both rows stand.

    Source: ultralytics/yolov3 archive, ``build_targets``. Unlike its tag v7, a centre on the right or lower border
    belongs to the last cell instead of crashing.
    """

    needs: ClassVar = ("anchors",)

    iou_t: float = 0.20  # in 0..1; strictly above

    def __post_init__(self):
        if not 0 <= self.iou_t < 1:
            raise ValueError(f"iou_t is {self.iou_t}, expected at least 0 and below 1")

    def __call__(self, preds: Predictions, targets: Targets) -> Assignment:
        """Predictions only say which slots there are: the match depends on shapes alone."""
        priors, num_images = preds.priors, len(preds.obj)
        objects = xyxy_to_xywh(targets.boxes)
        rows = torch.arange(len(targets), device=targets.boxes.device)
        tables = []
        for grid in priors.grids:
            anchors = anchors_of(priors, grid)
            row, column = cells_of(objects[:, :2], priors, grid)
            first = grid.start + torch.arange(grid.anchors, device=rows.device)[:, None] * (grid.rows * grid.columns)
            prior = first + row * grid.columns + column  # [A, N]
            weight = (wh_iou(anchors, objects[:, 2:]) > self.iou_t).to(torch.float32)
            columns = targets.image.expand_as(prior), prior, rows.expand_as(prior), weight
            tables.append([column.flatten() for column in columns])
        image, prior, target, weight = (torch.cat(column) for column in zip(*tables))
        ignore = ignored_slots(priors, targets, num_images, image, prior, weight)
        return Assignment(image=image, prior=prior, target=target, weight=weight, ignore=ignore)

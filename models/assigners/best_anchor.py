"""Darknet native: the anchor most like an object answers for it, wherever in the network that anchor is used.

Letters: B images, N objects, P slots, A anchors of a head, M anchors of the cfg's whole table, n objects of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.assigners.base import cells_of, ignored_slots, slots_with_rows
from models.structures import Assignment, Grid, Predictions, Priors
from models.yolo_keys import YoloKeys
from utils.boxes import IOUS, paired_iou, xywh_to_xyxy, xyxy_to_xywh
from utils.structures import Targets

CHUNK = 64  # objects compared with all slots at once: bounds the memory, not the result
CONFIDENT = 0.25  # a slot none of whose classes is above this is never forgiven by ignore_thresh


@dataclass(frozen=True, kw_only=True)
class BestAnchor:
    """One anchor per object, further ones by ``iou_thresh``, slots already right by ``truth_thresh``; some forgiven.

    All thresholds are keys of each ``[yolo]`` section; a recipe has none. Per head:

    * the anchor with the best shape IoU among all of the cfg's table answers in the cell of the object's centre, if the
      head's mask has it. With ``iou_thresh`` < 1 so does every further anchor of the mask above it (by
      ``iou_thresh_kind``). So an object has an anchor in one head at least, and never none;
    * with ``truth_thresh`` < 1 a slot whose predicted box overlaps an object by more answers for it as well (the object
      it overlaps most; the first of equals);
    * a slot whose box overlaps any object by more than ``ignore_thresh`` is ignored, if one of its class probabilities
      is above 0.25. With ``objectness_smooth`` it is not: the loss then gives it a soft target.

    Row order: head; then the slots by ``truth_thresh``, where it is on, picture by picture; then object, anchor. Rows
    that do not hold have weight 0.

    Source: Darknet, ``yolo_layer.c`` (facts only). Deviation: an object without area is answered for by nobody; there
    it takes the first anchor.
    """

    needs: ClassVar = ("anchors",)

    heads: tuple

    def __call__(self, preds: Predictions, targets: Targets) -> Assignment:
        priors, num_images = preds.priors, len(preds.obj)
        keys = [YoloKeys.read(head.section) for head in self.heads]
        overlap = best_overlap(preds, targets)
        forgivable = overlap * is_confident(preds)
        tables, forgiven = [], []
        for head, key, grid in zip(self.heads, keys, priors.grids, strict=True):
            if key.truth_thresh < 1:
                tables.append(_by_overlap(preds, targets, overlap, key, grid))
            tables.append(_by_shape(priors, targets, head, key, grid))
            over = forgivable[:, grid.slots] > key.ignore_thresh
            forgiven.append(torch.zeros_like(over) if key.objectness_smooth else over)
        image, prior, target, weight = (torch.cat(column) for column in zip(*tables))
        answers = slots_with_rows(overlap.shape, image, prior, weight)
        ignore = ignored_slots(priors, targets, num_images, image, prior, weight)
        ignore = ignore | (torch.cat(forgiven, dim=1) & ~answers)
        return Assignment(image=image, prior=prior, target=target, weight=weight, ignore=ignore)


def _by_shape(priors: Priors, targets: Targets, head, key: YoloKeys, grid: Grid) -> list[Tensor]:
    """Rows of a head's anchors [N * A] for the objects whose shape they are most, or enough, like."""
    objects = xyxy_to_xywh(targets.boxes)
    # [region] writes its anchors in cells: pixels follow from an anchor that both tables have
    anchors, all_anchors = head.anchors.to(priors.size), head.all_anchors.to(priors.size)
    table = all_anchors * (priors.size[grid.start] / anchors[0])
    shapes = _shape_ious("iou", table, objects[:, 2:])  # [M, N]
    best = shapes.argmax(0)  # the first of equals
    holds = torch.stack([best == number for number in head.mask], dim=1) & (shapes.amax(0) > 0)[:, None]  # [N, A]
    if key.iou_thresh < 1:
        alike = _shape_ious(key.iou_thresh_kind, table, objects[:, 2:]) > key.iou_thresh
        holds = holds | torch.stack([alike[number] for number in head.mask], dim=1)
    row, column = cells_of(objects[:, :2], priors, grid)
    first = grid.start + torch.arange(grid.anchors, device=row.device) * (grid.rows * grid.columns)
    prior = first + (row * grid.columns + column)[:, None]
    image, target = targets.image[:, None], torch.arange(len(targets), device=row.device)[:, None]
    columns = image.expand_as(prior), prior, target.expand_as(prior), holds.to(torch.float32)
    return [part.flatten() for part in columns]


def _shape_ious(kind: str, sizes1: Tensor, sizes2: Tensor) -> Tensor:
    """IoU [M, N] of one kind between sizes [M, 2] and [N, 2] laid on one centre."""
    boxes1, boxes2 = (xywh_to_xyxy(torch.cat([torch.zeros_like(sizes), sizes], dim=1)) for sizes in (sizes1, sizes2))
    return IOUS[kind](boxes1[:, None], boxes2[None])


def _by_overlap(preds: Predictions, targets: Targets, overlap: Tensor, key: YoloKeys, grid: Grid) -> list[Tensor]:
    """A row for every slot of a head in every picture [B * slots], of weight 1 where its box already fits an object.

    A row of weight 0 names some object all the same, and that object's picture. Without any object there is no row.
    """
    target = _overlapped_most(preds, targets, overlap)[:, grid.slots][: None if len(targets) else 0]
    slot = torch.arange(grid.start, grid.start + grid.count, device=overlap.device).expand_as(target)
    holds = (overlap[: len(target), grid.slots] > key.truth_thresh).to(torch.float32)
    return [part.flatten() for part in (targets.image[target], slot, target, holds)]


def best_overlap(preds: Predictions, targets: Targets) -> Tensor:
    """Largest IoU [B, P] of a slot's predicted box with an object of its picture; 0 where there is none."""
    best = preds.boxes.new_zeros(preds.obj.shape)
    for image, _, iou in _overlaps(preds, targets):
        best = best.scatter_reduce(0, image.expand_as(iou), iou, "amax")
    return best


def is_confident(preds: Predictions) -> Tensor:
    """Whether [B, P] any class of a slot is above 0.25."""
    return preds.cls.amax(-1).sigmoid() > CONFIDENT


def _overlapped_most(preds: Predictions, targets: Targets, best: Tensor) -> Tensor:
    """Which object [B, P] a slot overlaps by ``best``: the first of equals, and object 0 where there is none."""
    none = len(targets)
    found = torch.full(best.shape, none, dtype=torch.int64, device=best.device)
    for image, number, iou in _overlaps(preds, targets):
        candidate = torch.where((iou == best[image[:, 0]]) & (iou > 0), number, none)
        found = found.scatter_reduce(0, image.expand_as(iou), candidate, "amin")
    return torch.where(found == none, 0, found)


def _overlaps(preds: Predictions, targets: Targets) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(picture [n, 1], number [n, 1], IoU [n, P] with all slots of the picture) of some objects at a time."""
    boxes, numbers = preds.boxes.detach(), torch.arange(len(targets), device=preds.boxes.device)
    for start in range(0, len(targets), CHUNK):
        rows = slice(start, start + CHUNK)
        image = targets.image[rows]
        iou = paired_iou(boxes[image], targets.boxes[rows, None].to(boxes.dtype))
        yield image[:, None], numbers[rows, None], iou

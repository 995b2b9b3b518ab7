"""All detections and all truths of a data set as flat arrays, and the pairs of them that overlap.

Letters: N detections, M truths, P pairs, C classes, R recall points.
"""

from dataclasses import dataclass

import numpy as np
import torch

from utils.structures import Detections, Record

PAIRS_AT_ONCE = 1 << 21  # bounds memory: a block of pairs with its temporaries stays below 0.4 GB


@dataclass(frozen=True, kw_only=True)
class FlatDetections:
    """The detections of all pictures, picture after picture, each picture's in the order they were given."""

    image: np.ndarray  # int64 [N], non-decreasing
    label: np.ndarray  # int64 [N]
    score: np.ndarray  # float [N]
    boxes: np.ndarray  # float64 [N, 4] xyxy, original pixels
    area: np.ndarray  # float64 [N], of the box, or of the mask where masks are measured
    row: np.ndarray  # int64 [N], place before any was dropped or moved

    def __len__(self) -> int:
        return len(self.score)

    def __getitem__(self, rows) -> "FlatDetections":
        return FlatDetections(**{name: value[rows] for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class FlatTruths:
    """The annotated boxes of all pictures, picture after picture. ``crowd`` rows are also ``ignore`` rows."""

    image: np.ndarray  # int64 [M], non-decreasing
    label: np.ndarray  # int64 [M]
    boxes: np.ndarray  # float64 [M, 4] xyxy, original pixels
    area: np.ndarray  # float64 [M], as annotated (masks), not width * height
    ignore: np.ndarray  # bool [M]
    crowd: np.ndarray  # bool [M]

    def __len__(self) -> int:
        return len(self.label)


def flatten(collected: list[tuple[Detections, Record]]) -> tuple[FlatDetections, FlatTruths, int]:
    """Per-picture results -> flat arrays, and how many detections were dropped as no numbers.

    Pictures are put in the order of ``picture_order``. A detection with a non-finite box or score or with swapped
    corners is dropped: such a box compares false with everything, which pycocotools takes for a perfect match.
    """
    order = picture_order([record for _, record in collected])
    detections, records = [collected[i][0] for i in order], [collected[i][1] for i in order]
    boxes = torch.cat([torch.zeros(0, 4), *(d.boxes for d in detections)]).double().numpy()
    found = FlatDetections(
        image=np.repeat(np.arange(len(detections)), [len(d) for d in detections]),
        label=torch.cat([torch.zeros(0, dtype=torch.int64), *(d.labels for d in detections)]).numpy(),
        score=torch.cat([torch.zeros(0), *(d.scores for d in detections)]).double().numpy(),
        boxes=boxes,
        area=box_areas(boxes),
        row=np.arange(len(boxes)),
    )
    valid = np.isfinite(found.boxes).all(axis=1) & np.isfinite(found.score)
    valid &= (found.boxes[:, 2:] >= found.boxes[:, :2]).all(axis=1)
    truths = FlatTruths(
        image=np.repeat(np.arange(len(records)), [len(r.labels) for r in records]),
        label=_join([r.labels for r in records], (0,), np.int64),
        boxes=_join([r.boxes for r in records], (0, 4), np.float64),
        area=_join([r.area for r in records], (0,), np.float64),
        ignore=_join([r.ignore for r in records], (0,), bool),
        crowd=_join([r.crowd for r in records], (0,), bool),
    )
    num_invalid = int((~valid).sum()) + sum(d.num_invalid for d in detections)
    return found[valid] if num_invalid else found, truths, num_invalid


def picture_order(records: list[Record]) -> list[int]:
    """Places of the records by their id (by their path where a data set has none).

    The order in which pictures were seen must not decide between equal scores.
    """
    by_id = all(isinstance(record.image_id, int) for record in records)
    return sorted(range(len(records)), key=lambda i: records[i].image_id if by_id else records[i].path)


def falling_places(score: np.ndarray) -> np.ndarray:
    """Place of each of [n] scores when they are sorted, the largest first; equal scores keep their order. int64 [n]."""
    places = np.empty(len(score), np.int64)
    places[np.argsort(-score, kind="stable")] = np.arange(len(score))
    return places


def order_by(group: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Order by group (int64 [n]), in each by place (int64 [n], all different).

    One integer for both: numpy sorts integers ten times faster than pairs.
    """
    return np.argsort(group * (place.max(initial=0) + 1) + place)


def _join(parts: list[np.ndarray], empty: tuple[int, ...], dtype) -> np.ndarray:
    return np.concatenate([np.zeros(empty, dtype), *parts]).astype(dtype, copy=False)


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """Width times height of boxes [n, 4] -> float64 [n]."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def paired_overlap(boxes: np.ndarray, truth_boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Overlap of row i with row i, float64 [P]: IoU, or intersection over the detection's area where ``crowd``.

    Source: COCO API, ``maskApi.c`` (the order of operations is kept, so that results are equal to the last bit).
    """
    corner = np.minimum(boxes[:, 2:], truth_boxes[:, 2:])
    sides = np.maximum(corner - np.maximum(boxes[:, :2], truth_boxes[:, :2]), 0)
    inter, area = sides[:, 0] * sides[:, 1], box_areas(boxes)
    union = np.where(crowd, area, area + box_areas(truth_boxes) - inter)
    return np.divide(inter, union, out=np.zeros_like(inter), where=inter > 0)


def overlapping_pairs(
    found: FlatDetections, truths: FlatTruths, found_group: np.ndarray, truth_group: np.ndarray, floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of equal group whose overlap is at least ``floor`` (> 0).

    Returns:
        Row of ``found`` [P] (non-decreasing), row of ``truths`` [P], overlap float64 [P].
    """
    order = np.argsort(truth_group, kind="stable")
    groups = truth_group[order]
    first = np.searchsorted(groups, found_group, side="left")
    count = np.searchsorted(groups, found_group, side="right") - first
    rows = np.flatnonzero(count)
    blocks = np.cumsum(count[rows]) // PAIRS_AT_ONCE
    pairs = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for block in np.split(rows, np.flatnonzero(np.diff(blocks)) + 1):
        num = count[block]
        i = np.repeat(block, num)
        k = order[np.arange(len(i)) + np.repeat(first[block] - (np.cumsum(num) - num), num)]
        overlap = paired_overlap(found.boxes[i], truths.boxes[k], truths.crowd[k])
        near = np.flatnonzero(overlap >= floor)
        pairs.append((i[near], k[near], overlap[near]))
    return tuple(np.concatenate(column) for column in zip(*pairs))


def mean_of_known(values: np.ndarray) -> float:
    """Over what is not nan; nan where nothing is known."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def precision_at(points: np.ndarray, cell, recall, precision, num_cells: int) -> np.ndarray:
    """Best precision at a recall of at least each point.

    A cell is one curve, for example one (class, threshold). It is enough to know the curve at its true positives:
    between them recall stands still and precision falls.

    Args:
        points: ascending recall points [R].
        cell: int [n], the curve to which a true positive belongs.
        recall, precision: float64 [n], there.

    Returns:
        float64 [num_cells, R], 0 where a curve does not reach the point.
    """
    best = np.zeros((num_cells, len(points)))
    np.maximum.at(best, (cell, np.searchsorted(points, recall, side="right") - 1), precision)
    return np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]

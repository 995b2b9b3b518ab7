"""The COCO protocol: average precision and recall over ten thresholds and four area ranges, equal to pycocotools.

Letters: N detections, M truths, P pairs, D contenders (detections that overlap a truth), A area ranges, T thresholds,
C classes, R recall points.

pycocotools walks picture by picture, class by class, detection by detection. Here one step of the walk is made for all
pictures, classes, area ranges and thresholds at once: step (r, c) offers the r-th best contender of every (picture,
class) its c-th choice among the truths. Only pairs that overlap enough for the lowest threshold take part.

Source: COCO API, ``cocoeval.py``; Lin et al. 2014, section "Evaluation metrics" of cocodataset.org.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.metrics.flat import (
    FlatDetections,
    FlatTruths,
    falling_places,
    mean_of_known,
    order_by,
    overlapping_pairs,
    precision_at,
)

AREA_RANGES = {
    "all": (0.0, 1e10),
    "s": (0.0, 32.0**2),
    "m": (32.0**2, 96.0**2),
    "l": (96.0**2, 1e10),
}  # both ends included
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100  # per picture and class


@dataclass(frozen=True, kw_only=True)
class CocoResult:
    """Precision and recall in all their dimensions; classes without truth in an area range are nan."""

    precision: np.ndarray  # float64 [A, T, C, R]
    recall: dict[int, np.ndarray]  # best 1, 10 or 100 detections of each picture and class -> float64 [A, T, C]
    num_truths: np.ndarray  # int64 [A, C], without ignored ones
    label: np.ndarray  # int64 [n]: the detections that count at IoU 0.5 in any size ...
    score: np.ndarray  # float [n]
    right: np.ndarray  # bool [n]: ... and whether they are true positives

    def ap(self) -> np.ndarray:
        """Average precision per threshold and class, float64 [T, C]."""
        return self.precision[0].mean(axis=-1)

    def numbers(self) -> dict[str, float]:
        """The twelve numbers of the COCO table; nan where no class has a truth."""
        out = {
            "AP": mean_of_known(self.precision[0]),
            "AP50": mean_of_known(self.precision[0, 0]),
            "AP75": mean_of_known(self.precision[0, 5]),
        }
        sizes = {name: a for a, name in enumerate(AREA_RANGES) if name != "all"}
        out |= {f"AP{name}": mean_of_known(self.precision[a]) for name, a in sizes.items()}
        out |= {f"AR{num}": mean_of_known(recall[0]) for num, recall in self.recall.items()}
        return out | {f"AR{name}": mean_of_known(self.recall[MAX_DETECTIONS][a]) for name, a in sizes.items()}


def evaluate_coco(
    found: FlatDetections, truths: FlatTruths, num_classes: int, pairs: Callable = overlapping_pairs
) -> CocoResult:
    """Match and accumulate; ``pairs`` measures overlap: of boxes, or of masks (``MaskOverlaps.pairs``)."""
    found, rank, place = best_per_group(found, num_classes)
    lowest, highest = np.array(list(AREA_RANGES.values())).T[:, :, None]
    inside = (found.area >= lowest) & (found.area <= highest)  # [A, N]
    ignored = truths.ignore | (truths.area < lowest) | (truths.area > highest)  # [A, M]
    contender, matched, right = match(found, truths, ignored, num_classes, pairs)
    false = ~matched & inside[:, contender, None]

    num_truths = np.stack([np.bincount(truths.label[~row], minlength=num_classes) for row in ignored])
    precision, recall = accumulate(found, rank, place, inside, contender, right, false, num_truths)

    alone = inside[0].copy()  # overlaps no truth: false at every threshold
    alone[contender] = False
    counts = contender[right[0, :, 0] | false[0, :, 0]]
    rows = np.concatenate([counts, np.flatnonzero(alone)])
    is_right = np.zeros(len(found), bool)
    is_right[contender] = right[0, :, 0]
    return CocoResult(
        precision=precision, recall=recall, num_truths=num_truths,
        label=found.label[rows], score=found.score[rows], right=is_right[rows],
    )  # fmt: skip


def best_per_group(found: FlatDetections, num_classes: int) -> tuple[FlatDetections, np.ndarray, np.ndarray]:
    """The best of each picture and class, best first, with their rank there and their place among all detections.

    Equal scores keep their order.
    """
    group = found.image * num_classes + found.label
    place = falling_places(found.score)
    order = order_by(group, place)
    rank = _place_in_run(group[order])
    kept = rank < MAX_DETECTIONS
    return found[order[kept]], rank[kept], place[order[kept]]


def match(
    found: FlatDetections, truths: FlatTruths, ignored: np.ndarray, num_classes: int, pairs: Callable
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Let the detections choose truths, best score first, for every area range and threshold.

    A detection takes the free truth it overlaps most; one that counts before one that is ignored; of equal ones the
    last. A crowd is never used up.

    Args:
        found: sorted by picture, class and falling score.
        ignored: bool [A, M].
        pairs: as ``overlapping_pairs``.

    Returns:
        contender [D]: rows of ``found`` that overlap a truth, ascending; matched bool [A, D, T]: to any truth; right
        bool [A, D, T]: to one that counts.
    """
    found_group = found.image * num_classes + found.label
    truth_group = truths.image * num_classes + truths.label
    row, truth, overlap = pairs(found, truths, found_group, truth_group, IOU_THRESHOLDS[0])
    order = np.lexsort((-truth, -overlap, row))
    row, truth, overlap = row[order], truth[order], overlap[order]
    contender, first, who = np.unique(row, return_index=True, return_inverse=True)

    # the choices of a contender: those that count by falling overlap, then the ignored ones by falling overlap
    num_areas, num_rows, num_truths = len(ignored), len(contender), len(truths)
    counts = ~ignored[:, truth]  # [A, P]
    before = np.cumsum(counts, axis=1) - counts
    if num_rows:
        before -= before[:, first][:, who]
    num_counting = np.stack([np.bincount(who, weights=each, minlength=num_rows) for each in counts]).astype(np.int64)
    place = _place_in_run(row)
    choice = np.where(counts, before, num_counting[:, who] + place - before)  # [A, P]
    step = _place_in_run(found_group[contender])[who] * (place.max(initial=0) + 1) + choice

    area = np.arange(num_areas)[:, None]
    slot, goal = (area * num_rows + who).ravel(), (area * num_truths + truth).ravel()
    reaches = np.tile(overlap[:, None] >= IOU_THRESHOLDS, (num_areas, 1))  # [A * P, T]
    counts, single = counts.ravel(), np.tile(~truths.crowd[truth], num_areas)
    matched = np.zeros((num_areas * num_rows, len(IOU_THRESHOLDS)), bool)
    right, taken = np.zeros_like(matched), np.zeros((num_areas * num_truths, len(IOU_THRESHOLDS)), bool)
    for now in _runs(step.ravel()):  # a contender and a truth occur at most once in a step
        i, k = slot[now], goal[now]
        hit = reaches[now] & ~matched[i] & ~taken[k]
        matched[i] |= hit
        taken[k] |= hit & single[now, None]
        right[i] |= hit & counts[now, None]
    shape = (num_areas, num_rows, len(IOU_THRESHOLDS))
    return contender, matched.reshape(shape), right.reshape(shape)


def accumulate(
    found, rank, place, inside, contender, right, false, num_truths
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Precision at the recall points and final recall, of every curve (area range, threshold, class).

    A detection that overlaps nothing is false at every threshold: such ones are counted once per area range, and
    only contenders are followed threshold by threshold.
    """
    num_areas, num_classes = num_truths.shape
    num_thresholds = len(IOU_THRESHOLDS)
    order = order_by(found.label, place)
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    start = np.searchsorted(found.label[order], np.arange(num_classes))
    alone = inside.copy()
    alone[:, contender] = False
    num_alone = _sums_before(alone[:, order])  # [A, N + 1]

    ranking = np.argsort(position[contender])
    contender, right, false = contender[ranking], right[:, ranking], false[:, ranking]
    label = found.label[contender]
    first = np.searchsorted(label, np.arange(num_classes))
    num_right, num_seen = _sums_before(right), _sums_before(right | false)  # [A, D + 1, T]

    a, i, k = np.nonzero(right)
    c = label[i]
    hits = num_right[a, i + 1, k] - num_right[a, first[c], k]
    seen = num_seen[a, i + 1, k] - num_seen[a, first[c], k]
    seen += num_alone[a, position[contender[i]]] - num_alone[a, start[c]]
    curve = (a * num_thresholds + k) * num_classes + c
    num_curves, shape = num_areas * num_thresholds * num_classes, (num_areas, num_thresholds, num_classes)

    known = np.where(num_truths > 0, num_truths, np.nan)[:, None]  # [A, 1, C]
    at_points = precision_at(RECALL_POINTS, curve, hits / num_truths[a, c], hits / (seen + np.spacing(1)), num_curves)
    precision = np.where(np.isnan(known)[..., None], np.nan, at_points.reshape(*shape, len(RECALL_POINTS)))
    recall = {
        most: np.bincount(curve[rank[contender[i]] < most], minlength=num_curves).reshape(shape) / known
        for most in (1, 10, MAX_DETECTIONS)
    }
    return precision, recall


def _place_in_run(values: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal values."""
    changes = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return np.arange(len(values)) - np.repeat(changes, np.diff(changes, append=len(values)))


def _runs(keys: np.ndarray) -> list[np.ndarray]:
    """Rows of equal key, by ascending key."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1) if len(keys) else []


def _sums_before(flags: np.ndarray) -> np.ndarray:
    """How many of the rows before each are set, along axis 1, with the total at the end."""
    sums = np.zeros((flags.shape[0], flags.shape[1] + 1, *flags.shape[2:]), np.int32)
    np.cumsum(flags, axis=1, out=sums[:, 1:])
    return sums

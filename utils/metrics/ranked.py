"""Average precision by the rules of Pascal VOC and of Darknet: one ranked list per class, one threshold.

In both a detection is judged by the truth it overlaps most, even if a better detection has already claimed that one.

Letters: N detections, M truths, C classes.

Source: Everingham et al., "The PASCAL Visual Object Classes Challenge", section 4.2 (2010: area, 2007: 11 points);
Darknet's ``detector map``. Boxes are continuous: a reader of VOC files has already turned inclusive pixels into edges.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.metrics.flat import FlatDetections, FlatTruths, mean_of_known, overlapping_pairs, precision_at


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """One way to turn a ranked list into a number."""

    points: np.ndarray | None  # recall points, or None for the area under the envelope of the curve
    reaches: Callable  # (overlap, threshold) -> bool
    prefer: Callable  # (overlap, ignored) -> how much a detection wants a truth
    mean: Callable  # over the classes that have truths, or over all


def _over_all(ap: np.ndarray) -> float:
    return float(np.nan_to_num(ap).mean())


def _by_overlap(overlap: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    return overlap


def _by_counting_then_overlap(overlap: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    return overlap + 2.0 * ~ignored


VOC = {"reaches": np.greater_equal, "prefer": _by_overlap, "mean": mean_of_known}
DARKNET = {"reaches": np.greater, "prefer": _by_counting_then_overlap, "mean": _over_all}
RANK_RULES = {
    "voc07": RankRule(points=np.linspace(0, 1, 11), **VOC),  # rounded like the devkit's: 0.1 * 6 lies above 9 / 15
    "voc12": RankRule(points=None, **VOC),
    "darknet0": RankRule(points=None, **DARKNET),
    "darknet11": RankRule(points=np.arange(11) / 10, **DARKNET),
    "darknet101": RankRule(points=np.arange(101) / 100, **DARKNET),
}


@dataclass(frozen=True, kw_only=True)
class RankedResult:
    """Average precision at one threshold, and the counts at one confidence that Darknet prints beside it.

    Deviation: in Darknet's counts a truth is claimed in the order in which its suppression happens to leave the boxes,
    be they below the confidence or not; here by the best score. So ours finds more of them (coco-mini: 457 for 403).
    """

    ap: np.ndarray  # float64 [C], nan for classes without truth
    mean: float
    confidence: float
    tp: np.ndarray  # int64 [C], detections above the confidence
    fp: np.ndarray  # int64 [C]
    fn: np.ndarray  # int64 [C]
    mean_iou: float  # of all detections above the confidence, a false one counting 0

    @property
    def precision(self) -> float:
        return float(self.tp.sum() / max(self.tp.sum() + self.fp.sum(), 1))

    @property
    def recall(self) -> float:
        return float(self.tp.sum() / max(self.tp.sum() + self.fn.sum(), 1))

    @property
    def f1(self) -> float:
        return 2 * self.precision * self.recall / max(self.precision + self.recall, 1e-12)


def evaluate_ranked(
    found: FlatDetections,
    truths: FlatTruths,
    num_classes: int,
    rule: RankRule,
    iou_threshold: float = 0.5,
    confidence: float = 0.25,
) -> RankedResult:
    """Rank, judge, integrate. A detection whose truth is an ignored one (difficult, crowd) is removed."""
    found = found[np.lexsort((-found.score, found.label))]
    num_truths = np.bincount(truths.label[~truths.ignore], minlength=num_classes)
    best, overlap = _best_truth(found, truths, num_classes, rule, iou_threshold)
    judged = (best < 0) | ~np.append(truths.ignore, False)[best]
    found, best, overlap = found[judged], best[judged], overlap[judged]

    right = np.zeros(len(found), bool)
    claimed, first = np.unique(best, return_index=True)  # the best-ranked of those that want one truth
    right[first[claimed >= 0]] = True
    start = np.searchsorted(found.label, np.arange(num_classes))
    rows = np.flatnonzero(right)
    label = found.label[rows]
    hits = np.arange(1, len(rows) + 1) - np.searchsorted(label, np.arange(num_classes))[label]
    precision = hits / (rows - start[label] + 1)

    if rule.points is None:
        ap = np.zeros(num_classes)
        for number in np.unique(label):
            envelope = np.maximum.accumulate(precision[label == number][::-1])
            ap[number] = envelope.sum() / num_truths[number]
    else:
        ap = precision_at(rule.points, label, hits / num_truths[label], precision, num_classes).mean(axis=1)
    ap[num_truths == 0] = np.nan

    above = found.score > confidence
    tp = np.bincount(found.label[above & right], minlength=num_classes)
    fp = np.bincount(found.label[above & ~right], minlength=num_classes)
    return RankedResult(
        ap=ap, mean=rule.mean(ap), confidence=confidence, tp=tp, fp=fp, fn=num_truths - tp,
        mean_iou=float(overlap[above & right].sum() / max(above.sum(), 1)),
    )  # fmt: skip


def _best_truth(found, truths, num_classes, rule, iou_threshold) -> tuple[np.ndarray, np.ndarray]:
    """The truth each detection wants most (int64 [N], -1 where none overlaps enough), and the overlap with it."""
    groups = found.image * num_classes + found.label, truths.image * num_classes + truths.label
    row, truth, overlap = overlapping_pairs(found, truths, *groups, iou_threshold)
    enough = rule.reaches(overlap, iou_threshold)
    row, truth, overlap = row[enough], truth[enough], overlap[enough]
    order = np.lexsort((truth, -rule.prefer(overlap, truths.ignore[truth]), row))  # of equal ones the first
    contender, first = np.unique(row[order], return_index=True)
    best, best_overlap = np.full(len(found), -1), np.zeros(len(found))
    best[contender], best_overlap[contender] = truth[order][first], overlap[order][first]
    return best, best_overlap

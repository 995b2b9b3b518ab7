"""Precision, recall and F1 as functions of the confidence threshold, at IoU 0.5.

Letters: C classes, S confidence steps.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from utils.metrics.coco import RECALL_POINTS, CocoResult
from utils.metrics.flat import falling_places, order_by

NUM_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Rows of classes without truth are nan; precision is nan where nothing is predicted."""

    confidence: np.ndarray  # float64 [S], 0..1
    precision: np.ndarray  # float64 [C, S]
    recall: np.ndarray  # float64 [C, S]
    f1: np.ndarray  # float64 [C, S]
    recall_points: np.ndarray  # float64 [R]
    precision_at_recall: np.ndarray  # float64 [C, R], the envelope behind AP50

    def best_step(self) -> int:
        """The step of the largest F1, averaged over classes: the middle one where several are equal."""
        f1 = self.f1[~np.isnan(self.f1[:, 0])]
        if not f1.size:
            return 0
        mean = f1.mean(axis=0)
        best = np.flatnonzero(mean >= mean.max() - 1e-12)
        return int(best[len(best) // 2])


def confidence_curves(result: CocoResult) -> Curves:
    """Count, for every class and confidence, the detections at or above it."""
    num_truths = result.num_truths[0]
    confidence = np.linspace(0, 1, NUM_STEPS)
    hits, seen = np.zeros((2, len(num_truths), NUM_STEPS))
    by_label = order_by(result.label, falling_places(-result.score))
    label, score, right = result.label[by_label], result.score[by_label], result.right[by_label]
    ends = np.searchsorted(label, np.arange(len(num_truths) + 1))
    for number, (start, end) in enumerate(pairwise(ends)):
        below = np.searchsorted(score[start:end], confidence, side="left")
        num_right = np.append(0, np.cumsum(right[start:end]))
        hits[number], seen[number] = num_right[-1] - num_right[below], (end - start) - below
    known = np.where(num_truths > 0, num_truths, np.nan)[:, None]
    return Curves(
        confidence=confidence,
        precision=np.where((seen > 0) & (known > 0), hits / np.maximum(seen, 1), np.nan),
        recall=hits / known,
        f1=2 * hits / (seen + known),
        recall_points=RECALL_POINTS,
        precision_at_recall=result.precision[0, 0],
    )

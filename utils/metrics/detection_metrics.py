"""Collect detections picture by picture, then measure them all at once."""

import numpy as np

from utils.metrics.coco import evaluate_coco
from utils.metrics.confusion import confusion_matrix
from utils.metrics.curves import confidence_curves
from utils.metrics.evaluation import Evaluation
from utils.metrics.flat import flatten
from utils.metrics.ranked import RANK_RULES, evaluate_ranked
from utils.structures import Detections, Record


class DetectionMetrics:
    """Update per picture, compute at the end. The same for training and for ``test.py``.

    ``update`` only keeps references on the CPU: all arithmetic happens in ``compute``, on flat arrays.
    """

    def __init__(self, names: list[str]):
        self.names = tuple(names)
        self._collected: list[tuple[Detections, Record]] = []

    def update(self, detections: Detections, record: Record) -> None:
        """Add one picture: detections in pixels of the original, best first (the order decides equal scores)."""
        self._collected.append((detections.cpu(), record))

    def compute(self, protocol: str = "coco") -> Evaluation:
        """Measure everything collected so far.

        Args:
            protocol: ``coco``, or a key of ``RANK_RULES`` to be measured beside it, at IoU 0.5.
        """
        found, truths, num_invalid = flatten(self._collected)
        num_classes = len(self.names)
        for labels in (found.label, truths.label):
            assert not len(labels) or (labels.min() >= 0 and labels.max() < num_classes), "label outside names"
        result = evaluate_coco(found, truths, num_classes)
        curves = confidence_curves(result)
        step = curves.best_step()
        recall = curves.recall[:, step]
        counting = ~truths.ignore
        present = np.unique(truths.image[counting] * num_classes + truths.label[counting]) % max(num_classes, 1)
        ranked = None if protocol == "coco" else evaluate_ranked(found, truths, num_classes, RANK_RULES[protocol])
        return Evaluation(
            names=self.names,
            num_images=len(self._collected),
            images=np.bincount(present, minlength=num_classes),
            instances=result.num_truths[0],
            coco=result.numbers(),
            ap=result.ap(),
            curves=curves,
            confidence=float(curves.confidence[step]),
            precision=np.where(np.isnan(recall), np.nan, np.nan_to_num(curves.precision[:, step])),
            recall=recall,
            f1=curves.f1[:, step],
            confusion=confusion_matrix(found, truths, num_classes),
            num_invalid=num_invalid,
            ranked=ranked,
            protocol=protocol,
        )

"""Collect detections picture by picture, then measure them all at once."""

from dataclasses import replace

import numpy as np

from utils.metrics.coco import evaluate_coco
from utils.metrics.confusion import confusion_matrix
from utils.metrics.curves import confidence_curves
from utils.metrics.evaluation import Evaluation
from utils.metrics.flat import flatten, picture_order
from utils.metrics.mask_overlaps import MaskOverlaps, mask_overlaps
from utils.metrics.ranked import RANK_RULES, evaluate_ranked
from utils.structures import Detections, Record


class DetectionMetrics:
    """Update per picture, compute at the end. The same for training and for ``test.py``.

    ``update`` only keeps references on the CPU: all arithmetic happens in ``compute``, on flat arrays. Only masks are
    measured at once, where detections and record have them, and let go.
    """

    def __init__(self, names: list[str]):
        self.names = tuple(names)
        self._collected: list[tuple[Detections, Record]] = []
        self._overlaps: list[MaskOverlaps] = []

    def update(self, detections: Detections, record: Record) -> None:
        """Add one picture: detections in pixels of the original, best first (the order decides equal scores)."""
        detections = detections.cpu()
        if detections.masks is not None and record.outlines is not None:
            self._overlaps.append(mask_overlaps(detections, record))
        self._collected.append((replace(detections, masks=None), record))

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
        segm = None
        if self._overlaps:
            assert len(self._overlaps) == len(self._collected), "masks for all pictures or for none"
            order = picture_order([record for _, record in self._collected])
            overlaps = MaskOverlaps.cat([self._overlaps[i] for i in order])
            segm = evaluate_coco(overlaps.measured(found), truths, num_classes, overlaps.pairs)
        return Evaluation(
            names=self.names,
            num_images=len(self._collected),
            images=np.bincount(present, minlength=num_classes),
            instances=result.num_truths[0],
            coco=result.numbers(),
            ap=result.ap(),
            segm=None if segm is None else segm.numbers(),
            segm_ap=None if segm is None else segm.ap(),
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

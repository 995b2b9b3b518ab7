"""How much masks overlap, to the pixel: measured picture by picture, so that only one picture's pixels are held.

Letters: N detections, M truths, P pairs that overlap.
"""

from dataclasses import dataclass, replace

import numpy as np

from utils.mask_frames import paste
from utils.metrics.coco import IOU_THRESHOLDS
from utils.metrics.flat import FlatDetections, FlatTruths
from utils.outlines import patches
from utils.structures import Detections, Record


@dataclass(frozen=True, kw_only=True)
class MaskOverlaps:
    """Pairs of one class whose masks overlap enough for the lowest COCO threshold, of one picture or of all."""

    area: np.ndarray  # float64 [N], pixels of each detection
    num_truths: int  # M
    row: np.ndarray  # int64 [P], detection
    truth: np.ndarray  # int64 [P]
    overlap: np.ndarray  # float64 [P]

    @classmethod
    def cat(cls, parts: list["MaskOverlaps"]) -> "MaskOverlaps":
        """Those of several pictures as one, detections and truths renumbered."""
        rows = np.cumsum([0, *(len(part.area) for part in parts)])
        truths = np.cumsum([0, *(part.num_truths for part in parts)])
        return cls(
            area=np.concatenate([part.area for part in parts]),
            num_truths=int(truths[-1]),
            row=np.concatenate([part.row + first for part, first in zip(parts, rows)]),
            truth=np.concatenate([part.truth + first for part, first in zip(parts, truths)]),
            overlap=np.concatenate([part.overlap for part in parts]),
        )

    def measured(self, found: FlatDetections) -> FlatDetections:
        """The detections with the areas of their masks."""
        return replace(found, area=self.area[found.row])

    def pairs(self, found: FlatDetections, truths: FlatTruths, found_group, truth_group, floor: float):
        """As ``overlapping_pairs``: the pairs of ``found``, however it was sorted and shortened."""
        place = np.full(len(self.area), -1)
        place[found.row] = np.arange(len(found))
        row = place[self.row]
        kept = np.flatnonzero((row >= 0) & (self.overlap >= floor))
        kept = kept[np.argsort(row[kept], kind="stable")]
        return row[kept], self.truth[kept], self.overlap[kept]


def mask_overlaps(detections: Detections, record: Record) -> MaskOverlaps:
    """Measure one picture: detections in its own pixels with masks, on the CPU, and a record with outlines."""
    found, truths = paste(detections.masks, detections.boxes, record.size), patches(record.outlines, record.size)
    row, truth = np.nonzero(detections.labels.numpy()[:, None] == record.labels)
    windows, truth_windows = (np.array([part.window for part in side]).reshape(-1, 4) for side in (found, truths))
    low = np.maximum(windows[row, :2], truth_windows[truth, :2])
    high = np.minimum(windows[row, 2:], truth_windows[truth, 2:])
    near = (low < high).all(axis=1)
    row, truth, shared = row[near], truth[near], np.hstack([low, high])[near]
    area, truth_area = (np.array([part.area for part in side], np.float64) for side in (found, truths))
    common = [np.count_nonzero(found[i].cut(*at) & truths[k].cut(*at)) for i, k, at in zip(row, truth, shared)]
    common = np.array(common, np.float64)
    union = np.where(record.crowd[truth], area[row], area[row] + truth_area[truth] - common)
    overlap = common / np.maximum(union, 1)
    enough = overlap >= IOU_THRESHOLDS[0]
    return MaskOverlaps(
        area=area, num_truths=len(truths), row=row[enough], truth=truth[enough], overlap=overlap[enough]
    )

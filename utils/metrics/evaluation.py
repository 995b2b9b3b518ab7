"""The numbers of one evaluation and how they are printed.

Letters: C classes, T IoU thresholds.
"""

from dataclasses import dataclass, field

import numpy as np

from utils.metrics.curves import Curves
from utils.metrics.flat import mean_of_known
from utils.metrics.ranked import RankedResult

NOT_APPLICABLE = "n/a"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a set of detections is worth. Classes without truth are nan everywhere and left out of every mean."""

    names: tuple[str, ...]
    num_images: int
    images: np.ndarray  # int64 [C], pictures that hold the class
    instances: np.ndarray  # int64 [C], truths without ignored ones
    coco: dict[str, float]  # AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl
    ap: np.ndarray  # float64 [T, C], COCO average precision per threshold
    curves: Curves  # at IoU 0.5
    confidence: float  # where F1, averaged over classes, is largest
    precision: np.ndarray  # float64 [C], at that confidence; 0 where nothing is predicted
    recall: np.ndarray  # float64 [C]
    f1: np.ndarray  # float64 [C]
    confusion: np.ndarray  # int64 [C + 1, C + 1], row = predicted, column = true, last = background
    num_invalid: int  # detections dropped because a box or score was no number
    ranked: RankedResult | None = None  # the VOC or Darknet protocol, if asked for
    protocol: str = "coco"
    segm: dict[str, float] | None = None  # the same twelve numbers of the masks, where there are some
    segm_ap: np.ndarray | None = None  # float64 [T, C]
    speed: dict[str, float] = field(default_factory=dict)  # milliseconds per picture

    @property
    def map50(self) -> float:
        return self.coco["AP50"]

    @property
    def map(self) -> float:
        return self.coco["AP"]

    def scalars(self) -> dict[str, float]:
        """Names and values for logs; nan where there is nothing to measure."""
        out = {
            "precision": mean_of_known(self.precision),
            "recall": mean_of_known(self.recall),
            "mAP50": self.map50,
            "mAP50-95": self.map,
        }
        out |= {name: value for name, value in self.coco.items() if name not in ("AP", "AP50")}
        if self.segm:
            out |= {"mask-mAP50": self.segm["AP50"], "mask-mAP50-95": self.segm["AP"]}
            out |= {f"mask-{name}": value for name, value in self.segm.items() if name not in ("AP", "AP50")}
        if self.ranked:
            out[f"{self.protocol}-mAP50"] = self.ranked.mean
        return {f"metrics/{name}": value for name, value in out.items()}

    def table(self, verbose: bool = False) -> str:
        """Aligned text: a row for all classes and, if ``verbose``, one per class."""
        head = ["Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95"]
        values = [self.precision, self.recall, self.ap[0], self.ap.mean(axis=0)]
        means = [mean_of_known(self.precision), mean_of_known(self.recall), self.map50, self.map]
        if self.segm:
            head += ["mask50", "mask50-95"]
            values += [self.segm_ap[0], self.segm_ap.mean(axis=0)]
            means += [self.segm["AP50"], self.segm["AP"]]
        if self.ranked:
            head.append(self.protocol)
            values.append(self.ranked.ap)
            means.append(self.ranked.mean)
        rows = [["all", str(self.num_images), str(self.instances.sum()), *map(_number, means)]]
        if verbose:
            for number, name in enumerate(self.names):
                counts = [str(self.images[number]), str(self.instances[number])]
                rows.append([name, *counts, *(_number(value[number]) for value in values)])
        lines = align([head, *rows])
        return "\n".join([*lines, *self._notes()])

    def _notes(self) -> list[str]:
        notes = []
        if self.ranked:
            found = self.ranked
            notes.append(
                f"{self.protocol}: mAP50 {_number(found.mean)}; at confidence {found.confidence:g} "
                f"P {found.precision:.2f}, R {found.recall:.2f}, F1 {found.f1:.2f}, "
                f"TP {found.tp.sum()}, FP {found.fp.sum()}, FN {found.fn.sum()}, mean IoU {100 * found.mean_iou:.2f} %"
            )
        stray = self.confusion[:-1].sum(axis=1) * (self.instances == 0)
        if stray.any():
            listed = [f"{self.names[number]} {stray[number]}" for number in np.argsort(-stray)[:5] if stray[number]]
            notes.append(f"detections of classes without truth here: {', '.join(listed)}")
        if self.num_invalid:
            notes.append(f"dropped {self.num_invalid} detections whose box or score is no number")
        if self.speed:
            parts = ", ".join(f"{name} {ms:.1f}" for name, ms in self.speed.items())
            notes.append(f"speed, ms per picture: {parts}")
        return notes

    def coco_table(self) -> str:
        """The twelve COCO numbers of the boxes, then of the masks where there are some, three to a line."""
        numbers = self.coco | {f"mask-{name}": value for name, value in (self.segm or {}).items()}
        texts = [text for name, value in numbers.items() for text in (name, _number(value))]
        return "\n".join(align([texts[start : start + 6] for start in range(0, len(texts), 6)]))


def align(rows: list[list[str]]) -> list[str]:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def _number(value: float) -> str:
    return NOT_APPLICABLE if np.isnan(value) else f"{value:.3f}"

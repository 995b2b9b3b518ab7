"""Where a trained network disagrees with the labels: objects that may be missed, of another class, or not there.

A network that learnt these very labels agrees with their mistakes more often than a stranger: what it still finds is
worth the look, and a network trained on the other half finds more.
"""

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from utils.boxes import box_iou
from utils.datasets.findings import WARNING, Exam, Finding, Found, Place, Shown
from utils.datasets.records import DataSet
from utils.structures import Detections, Record

CERTAIN = 0.5  # score above which a network contradicts
LEAST = 0.05  # score below which it did not see anything
SAME, APART = 0.5, 0.3  # IoU from which a detection means a box, and up to which it means none
KINDS = {  # what is contradicted -> title, advice
    "missed": ("objects found that have no box, surest first", "without a box they are taught as background"),
    "swapped": ("objects found with another class, surest first", "which class is it?"),
    "unseen": ("boxes in which nothing was found, largest first", "is there an object, and is the box around it?"),
}
Case = tuple[float, Place]  # how strongly it is contradicted


def second_opinion(predict: Callable[[DataSet], Sequence[Detections | None]]) -> Callable[[Exam], Iterator[Finding]]:
    """A check for the doctor.

    Args:
        predict: the detections of every record, in pixels of the original, with scores from ``LEAST`` on, one per
            object whatever the class; None for a picture that cannot be read.
    """

    def check(exam: Exam) -> Iterator[Finding]:
        cases: dict[str, list[Case]] = {kind: [] for kind in KINDS}
        for data in exam.sets:
            for record, detections in zip(data.records, predict(data), strict=True):
                if detections is None:
                    continue
                for kind, case in disagreements(record, detections, data.names):
                    cases[kind].append(case)
        for kind, (title, advice) in KINDS.items():
            if cases[kind]:
                places = tuple(place for _, place in sorted(cases[kind], key=itemgetter(0), reverse=True))
                yield Finding(severity=WARNING, title=title, places=places, advice=advice)

    return check


def disagreements(record: Record, detections: Detections, names: Sequence[str]) -> Iterator[tuple[str, Case]]:
    """(key of KINDS, case) for one picture."""
    boxes, ignored = torch.from_numpy(record.boxes), torch.from_numpy(record.ignore)
    overlap = box_iou(detections.boxes, boxes)  # [n, N]
    inside = _share_inside(detections.boxes, boxes[ignored]) > SAME
    for row, (score, label) in enumerate(zip(detections.scores.tolist(), detections.labels.tolist())):
        if score < CERTAIN or inside[row]:
            continue
        seen = (Found(tuple(detections.boxes[row].tolist()), f"network: {names[label]} {score:.2f}"),)
        best, mine = overlap[row].max(dim=0) if len(boxes) else (0.0, 0)
        if best < APART:
            yield "missed", (score, Place(record.path, f"{names[label]} {score:.2f}", (Shown(record, (), seen),)))
        elif best >= SAME and label != record.labels[mine]:
            told = f"labelled {names[record.labels[mine]]}, found {names[label]} {score:.2f}"
            yield "swapped", (score, Place(record.path, told, (Shown(record, (int(mine),), seen),)))
    area = record.size[0] * record.size[1]
    for number in (~ignored & ~(overlap >= APART).any(dim=0)).nonzero().flatten().tolist():
        width, height = (record.boxes[number, 2:] - record.boxes[number, :2]).tolist()
        told = f"{names[record.labels[number]]}, {width:.0f} x {height:.0f} pixels"
        yield "unseen", (width * height / area, Place(record.path, told, (Shown(record, (number,)),)))


def _share_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """The largest share of each box [n, 4] that lies in one of the regions [R, 4] -> [n]."""
    if not len(regions):
        return torch.zeros(len(boxes))
    low, high = torch.maximum(boxes[:, None, :2], regions[:, :2]), torch.minimum(boxes[:, None, 2:], regions[:, 2:])
    sides = boxes[:, 2:] - boxes[:, :2]
    return ((high - low).clamp(min=0).prod(dim=2) / sides.prod(dim=1)[:, None].clamp(min=1e-9)).amax(dim=1)

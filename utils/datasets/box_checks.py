"""What is odd about the boxes of a data set and about its classes: one function per question.

Sizes are judged where the network sees them: letterboxed onto its input.
"""

from collections.abc import Iterator

import numpy as np
import torch

from utils.boxes import box_iou
from utils.datasets.findings import ERROR, NOTE, WARNING, Exam, Finding, Place, Shown
from utils.datasets.letterbox import fit
from utils.datasets.records import DataSet
from utils.structures import Record

SAME_OBJECT = 0.9  # IoU of two boxes that can hardly be two objects
TINY = 4.0  # pixels of the shorter side on the network's input: half a cell of the finest usual head
FEW = 10  # boxes of a class
RARE = 100  # times fewer than of the most frequent class
ODD_SIZES = {  # sides [n, 2] on the input, share [n] of the picture -> which are odd; what to do
    f"boxes under {TINY:g} pixels on the input": (
        lambda sides, share: sides.min(axis=1) < TINY,
        "hardly to be learnt at this size: a larger --img-size, or leave them out",
    ),
    "boxes as large as their picture": (
        lambda sides, share: share > 0.95,
        "right for a close-up; a habit of some tools for pictures without a label",
    ),
    "boxes as thin as a line": (
        lambda sides, share: sides.max(axis=1) > 20 * sides.min(axis=1),
        "a slip of the mouse?",
    ),
}


def doubled(exam: Exam) -> Iterator[Finding]:
    """Boxes that lie on one another."""
    same, other = [], []
    for data, record in exam.records():
        for i, k, overlap in _overlaps(record):
            names = [data.names[record.labels[row]] for row in (i, k)]
            told = f"{' and '.join(names)}, overlap {overlap:.2f}"
            (same if names[0] == names[1] else other).append(Place(record.path, told, (Shown(record, (i, k)),)))
    if same:
        advice = "one object, labelled twice?"
        yield Finding(severity=WARNING, title="nearly the same box twice", places=tuple(same), advice=advice)
    if other:
        advice = "one object of two classes: a network learns neither"
        yield Finding(severity=WARNING, title="two classes in nearly the same box", places=tuple(other), advice=advice)


def _overlaps(record: Record) -> Iterator[tuple[int, int, float]]:
    """Pairs of objects that share nearly all of their boxes."""
    rows = np.flatnonzero(~record.ignore)
    boxes = torch.from_numpy(record.boxes[rows])
    for start in range(0, len(rows), 1000):  # of 10 000 boxes all pairs at once are a gigabyte
        overlap = box_iou(boxes[start : start + 1000], boxes)
        for i, k in (overlap > SAME_OBJECT).nonzero().tolist():
            if start + i < k:
                yield int(rows[start + i]), int(rows[k]), float(overlap[i, k])


def odd_sizes(exam: Exam) -> Iterator[Finding]:
    """Boxes too small to be learnt at this input, as large as the picture, or thin."""
    places: dict[str, list[Place]] = {name: [] for name in ODD_SIZES}
    num = 0
    for data, record in exam.records():
        (height, width), placed = fit(record.size, exam.size)
        sides = (record.boxes[:, 2:] - record.boxes[:, :2]) * np.array(placed.scale, np.float32)
        share = sides.prod(axis=1) / (height * width)
        num += len(sides)
        for name, (is_odd, _) in ODD_SIZES.items():
            for row in np.flatnonzero(is_odd(sides, share) & ~record.ignore):
                told = f"{data.names[record.labels[row]]}, {sides[row, 0]:.1f} x {sides[row, 1]:.1f} pixels"
                places[name].append(Place(record.path, told, (Shown(record, (int(row),)),)))
    for name, (_, advice) in ODD_SIZES.items():
        if places[name]:
            title = f"{name} ({len(places[name]) / num:.1%} of all)"
            yield Finding(severity=WARNING, title=title, places=tuple(places[name]), advice=advice)


def unlabelled(exam: Exam) -> Iterator[Finding]:
    """Pictures without any annotation file."""
    for data in exam.sets:
        if data.num_unlabelled:
            share = f"{data.num_unlabelled} of {len(data.records)} pictures"
            yield Finding(
                severity=WARNING,
                title=f"{data.split}: {share} have no annotation file",
                advice="they teach that nothing is there: if that is so, give them empty files",
            )


def class_counts(data: DataSet) -> np.ndarray:
    """Boxes int64 [C] of every class, without ignored ones."""
    labels = [record.labels[~record.ignore] for record in data.records]
    return np.bincount(np.concatenate([np.zeros(0, np.int64), *labels]), minlength=len(data.names))


def class_balance(exam: Exam) -> Iterator[Finding]:
    """Classes that cannot be learnt or measured, or that others drown."""
    counts = {data.split: class_counts(data) for data in exam.sets}
    names, learnt = exam.sets[0].names, counts.get("train", counts[exam.sets[0].split])
    if any(data.names != names for data in exam.sets):
        found = "; ".join(f"{data.split}: {', '.join(data.names)}" for data in exam.sets)
        yield Finding(severity=ERROR, title=f"splits with other classes: {found}", advice="names: [...] in a data yaml")
        return
    measured = sum((count for split, count in counts.items() if split != "train"), np.zeros(len(names), np.int64))
    kinds = {
        "classes that are measured but never learnt": (
            ERROR,
            (learnt == 0) & (measured > 0),
            "share pictures out anew",
        ),
        "classes without any box": (NOTE, (learnt == 0) & (measured == 0), "remove the name, or label them"),
        f"classes with fewer than {FEW} boxes to learn from": (
            WARNING,
            (learnt > 0) & (learnt < FEW),
            "more pictures of them",
        ),
        f"classes with less than a {RARE}th of the boxes of the most frequent one": (
            WARNING,
            (learnt >= FEW) & (learnt * RARE < learnt.max()),
            "train.py --image-weights shows their pictures more often",
        ),
    }
    for title, (severity, chosen, advice) in kinds.items():
        rows = np.flatnonzero(chosen)
        if len(rows):
            places = tuple(
                Place(names[row], f"{learnt[row]} to learn from, {measured[row]} to measure") for row in rows
            )
            yield Finding(severity=severity, title=title, places=places, advice=advice)

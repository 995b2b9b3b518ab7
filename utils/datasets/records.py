"""A data set of any known format, read in place: ``read_dataset(path, split)``.

What ``path`` may be is listed in ``formats/description.py``. Nothing is ever written beside the data,
downloaded or executed.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.datasets.formats.coco import read_coco
from utils.datasets.formats.description import describe, read_names
from utils.datasets.formats.pictures import Source
from utils.datasets.formats.rows import KEPT, QUARANTINED, Annotated, Problem, Problems
from utils.datasets.formats.voc import read_voc
from utils.datasets.formats.writers import COCO, DARKNET, VOC, YOLO, Writer
from utils.datasets.formats.yolo import read_yolo
from utils.datasets.limits import LIMITS, Limits
from utils.errors import QuarantineError, UserError
from utils.structures import Record


class Format(NamedTuple):
    """Both ways between annotation files and records."""

    read: Callable[[Source, Problems], Annotated]
    writer: Writer


FORMATS = {
    "yolo": Format(read_yolo, YOLO),
    "darknet": Format(read_yolo, DARKNET),
    "coco": Format(read_coco, COCO),
    "voc": Format(read_voc, VOC),
}
__all__ = ["FORMATS", "DataSet", "Problem", "read_dataset", "read_names"]
SINGLE_CLASS = ("object",)  # what is left of the names when all classes are made one
WITH_OUTLINES = ("coco", "yolo", "darknet")
SHOWN_PROBLEMS = 3  # of each kind, in the summary
SHOWN_NAMES = 10  # of classes without a box


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One split of a data set, and everything about it that is not as it should be."""

    names: tuple[str, ...]
    records: list[Record]
    problems: list[Problem]
    source: str
    split: str
    num_unlabelled: int  # pictures without any annotation file: backgrounds, but perhaps forgotten ones
    category_ids: tuple[int, ...]  # of every label, for COCO files: the data set's own, else label + 1

    @property
    def num_boxes(self) -> int:
        """Annotated boxes, ignore regions included."""
        return sum(len(record.labels) for record in self.records)

    def as_single_class(self) -> "DataSet":
        """The same boxes, all of them of one class."""
        records = [replace(record, labels=np.zeros_like(record.labels)) for record in self.records]
        return replace(self, names=SINGLE_CLASS, records=records, category_ids=(1,))

    def fingerprint(self) -> str:
        """sha256 over names and records: whether a run that continues sees the data it began with.

        Pictures count by file name and size, in order, and with all that is annotated in them; the folder they lie in
        does not: a data set may move.
        """
        digest = hashlib.sha256(repr(self.names).encode())
        for record in self.records:
            digest.update(os.fsencode(Path(record.path).name) + repr(record.size).encode())
            arrays = [record.boxes, record.labels, record.ignore, record.crowd]
            if record.outlines is not None:
                arrays += [record.outlines.corners, record.outlines.starts, record.outlines.owner]
            for array in arrays:
                digest.update(len(array).to_bytes(8, "little") + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """Aligned text: pictures, backgrounds, boxes per class, problems by kind with their first places."""
        labels = np.concatenate([record.labels for record in self.records] or [np.zeros(0, np.int64)])
        counts = np.bincount(labels, minlength=len(self.names))
        num_ignored = sum(int(record.ignore.sum()) for record in self.records)
        num_empty = sum(len(record.labels) == 0 for record in self.records)
        width = max(map(len, ("backgrounds", *self.names)))
        lines = [
            f"{self.source} [{self.split}]",
            f"  {'pictures':{width}} {len(self.records):8d}",
            f"  {'backgrounds':{width}} {num_empty:8d}"
            + f"  ({self.num_unlabelled} of them without an annotation file)" * bool(self.num_unlabelled),
            f"  {'boxes':{width}} {len(labels):8d}" + f"  ({num_ignored} of them to ignore)" * bool(num_ignored),
            *(f"  {name:{width}} {count:8d}" for name, count in zip(self.names, counts)),
        ]
        if absent := [name for name, count in zip(self.names, counts) if not count]:
            shown = ", ".join(absent[:SHOWN_NAMES]) + ", ..." * (len(absent) > SHOWN_NAMES)
            lines.append(f"  {len(absent)} x class without a box: {shown}")
        kinds = Counter((problem.reason, problem.action) for problem in self.problems)
        for (reason, action), count in kinds.most_common():
            shown = [problem for problem in self.problems if (problem.reason, problem.action) == (reason, action)]
            lines.append(f"  {count} x {reason} ({action})")
            lines += [f"      {problem.where}: {problem.found}" for problem in shown[:SHOWN_PROBLEMS]]
            lines += ["      ..."] * (count > SHOWN_PROBLEMS)
        return "\n".join(lines)


def read_dataset(path: str | Path, split: str = "train", *, masks: bool = False, limits: Limits = LIMITS) -> DataSet:
    """Read the annotations of one split, and the size of each of its pictures; no picture is decoded.

    What happens to bad rows: see ``formats/rows.py``.

    Args:
        path: see ``formats/description.py``.
        split: ``train``, ``val`` or ``test`` (VOC: any list of ``ImageSets/Main``).
        masks: read the outlines of the objects, too; a row without one that can be used is a bad row.
        limits: which pictures are taken.

    Raises:
        UserError: the data set is wrong as a whole: no names, no pictures, class ids that count from 1, no outlines
            where they are wanted.
        QuarantineError: every picture had to be set aside.
    """
    problems = Problems()
    path = Path(os.path.expanduser(path))  # noqa: PTH111  (pathlib's raises where there is no such user)
    source = replace(describe(path, split, problems), masks=masks, limits=limits)
    if masks and source.format not in WITH_OUTLINES:
        found = f"annotations of format '{source.format}' hold boxes only, a network with masks needs outlines"
        raise UserError(source.where or path, found, "COCO json and YOLO labels can; or take a cfg without [mask]")
    names, records, num_unlabelled, category_ids = FORMATS[source.format].read(source, problems)
    if not records:
        count = sum(problem.action == QUARANTINED for problem in problems.entries)
        first = next((str(problem) for problem in problems.entries if problem.action == QUARANTINED), "")
        raise QuarantineError(source.where or path, f"no usable picture: all {count} were set aside, first {first}")
    if num_unlabelled * 2 > len(records):
        found = f"{num_unlabelled} of {len(records)}"
        problems.add(source.file, None, "more than half of the pictures have no annotation file", found, KEPT)
    return DataSet(
        names=names,
        records=records,
        problems=problems.entries,
        source=str(path),
        split=split,
        num_unlabelled=num_unlabelled,
        category_ids=category_ids or tuple(range(1, len(names) + 1)),
    )

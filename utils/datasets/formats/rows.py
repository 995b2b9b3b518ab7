"""From annotated rows to a record: what is clipped, dropped or set aside, and where that is counted.

The rules, the same for every format:

* A box over the border by no more than a thousandth of the picture's side is rounding: cut back and counted;
  by no more than the last digit of a six-digit label: cut back and not even counted.
* A box further over the border is cut back and kept where at least a tenth of its area remains. What no rule can
  save - text, NaN, no width, outside - is dropped.
* A bad row never costs its picture. A picture all of whose rows are bad is quarantined: taken out of the set and
  counted, because as a background it would teach that nothing is there.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UNPRINTABLE, UserError, printable
from utils.files import read_bytes
from utils.structures import Outlines, Record

CLIPPED, DROPPED, DOUBLE, QUARANTINED, KEPT = "clipped", "row dropped", "counted once", "picture quarantined", "kept"
LAST_DIGIT = 2e-6  # of a side: two roundings (center and size) of a label with six decimals
ROUNDING = 1e-3  # of a side: what sloppier writers leave
MIN_VISIBLE = 0.1  # share of a box's area that must lie inside the picture
MAX_ROWS = 10_000  # boxes in one picture; more is a broken file
MAX_BYTES = 1 << 26  # of one picture's annotation
NUMBER = re.compile(  # ASCII only: float() also takes "٣", "0_5", "nan"
    r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
)


class Row(NamedTuple):
    """One annotated object, pixels of the upright picture."""

    label: int
    box: tuple[float, float, float, float]  # xyxy
    line: int | None = None  # where it stands in its file
    ignore: bool = False
    crowd: bool = False
    area: float | None = None  # the annotated (mask) area, if it is known
    segmentation: object = None  # as COCO writes it
    rings: tuple[np.ndarray, ...] = ()  # of its outline, [k, 2] each, where masks were asked for


class Problem(NamedTuple):
    """Something in a data set that is not as it should be, and what was done about it."""

    path: str
    line: int | None
    reason: str  # a category, the same text for all problems of a kind
    found: str  # this one's particulars
    action: str  # CLIPPED, DROPPED, DOUBLE, QUARANTINED or KEPT

    @property
    def where(self) -> str:
        return self.path if self.line is None else f"{self.path}:{self.line}"

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}{': ' * bool(self.found)}{self.found} ({self.action})"


@dataclass
class Problems:
    """Collects problems: what was found, and what was done about it."""

    entries: list[Problem] = field(default_factory=list)

    def add(self, path: object, line: int | None, reason: str, found: object = "", action: str = DROPPED) -> None:
        self.entries.append(Problem(printable(path), line, reason, printable(found), action))

    def add_some(self, path: object, reason: str, places: Sequence[Path]) -> None:
        """One entry for what is true of many pictures and costs none of them."""
        if places:
            self.add(path, None, reason, f"{len(places)}, such as {places[0]}", KEPT)


class Annotated(NamedTuple):
    """What a format's reader makes of one split."""

    names: tuple[str, ...]
    records: list[Record]
    num_unlabelled: int = 0  # pictures without any annotation file
    category_ids: tuple[int, ...] | None = None  # the data set's own id of every label, where it has ids


def is_name(value: object) -> bool:
    """Whether a class can be called so: text that fits on one line of a table."""
    return isinstance(value, str) and bool(value.strip()) and UNPRINTABLE.search(value) is None


def read_annotation(path: Path) -> bytes:
    """The bytes of a label file. Raises UserError where it is no ordinary file of a sensible size."""
    data = read_bytes(path, "annotations of a picture", MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(path, f"larger than {MAX_BYTES} bytes, expected annotations of one picture")
    return data


def make_record(
    picture: Path,
    size: tuple[int, int],
    rows: Sequence[Row],
    *,
    num_bad: int,
    source: object,
    problems: Problems,
    min_area: float = 1.0,
    image_id: int | str | None = None,
    masks: bool = False,
) -> Record | None:
    """A record of the rows that can be used; None where the picture is quarantined.

    Args:
        picture: the image file.
        size: its upright (H, W), pixels.
        rows: what could be read at all.
        num_bad: rows that could not; they are counted already, but decide whether the picture can stay.
        source: the annotation file, for problems.
        problems: where to count.
        min_area: least area of a usable box, square pixels; 0 takes anything with a width and a height.
        image_id: the data set's own id.
        masks: keep the outlines of the rows.
    """
    if len(rows) > MAX_ROWS:
        problems.add(source, None, f"more than {MAX_ROWS} boxes in one picture", len(rows), QUARANTINED)
        return None
    fitted = [row._replace(box=box) for row in rows if (box := _fit(row, size, source, problems, min_area)) is not None]
    if not fitted and len(rows) + num_bad > 0:
        problems.add(picture, None, "every row of its annotation is bad", source, QUARANTINED)
        return None
    boxes = np.array([row.box for row in fitted], np.float32).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    area = [sides[i].prod() if row.area is None else row.area for i, row in enumerate(fitted)]
    return Record(
        path=str(picture),
        size=size,
        boxes=boxes,
        labels=np.array([row.label for row in fitted], np.int64),
        ignore=np.array([row.ignore for row in fitted], bool),
        crowd=np.array([row.crowd for row in fitted], bool),
        area=np.array(area, np.float32),
        image_id=image_id,
        outlines=Outlines.of([row.rings for row in fitted]) if masks else None,
    )


def drop_duplicates(rows: Iterable[Row], source: object, problems: Problems) -> list[Row]:
    """The rows without those that repeat an earlier label and box; each one is counted."""
    first: dict[tuple, Row] = {}
    for row in rows:
        known = first.setdefault((row.label, row.box), row)
        if known is not row:
            problems.add(source, row.line, "the same box twice", f"as line {known.line}", DOUBLE)
    return list(first.values())


def _fit(row: Row, size: tuple[int, int], source: object, problems: Problems, min_area: float):
    """The row's box inside the picture, or None where nothing usable remains."""
    height, width = size
    x1, y1, x2, y2 = row.box
    if not (x2 > x1 and y2 > y1):
        problems.add(source, row.line, "box without width or height", _text(row.box))
        return None
    over = max(-x1 / width, -y1 / height, x2 / width - 1, y2 / height - 1)
    box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    visible = max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
    if visible < MIN_VISIBLE * (x2 - x1) * (y2 - y1):
        reason = "box outside the picture" if visible == 0 else f"less than {MIN_VISIBLE:.0%} of the box in the picture"
        problems.add(source, row.line, reason, _outside(row, size))
        return None
    if visible < min_area:
        problems.add(source, row.line, f"box smaller than {min_area:g} square pixel", _text(row.box))
        return None
    if over <= LAST_DIGIT:
        return box
    if over <= ROUNDING:
        problems.add(source, row.line, "box over the border by rounding", _text(row.box), CLIPPED)
        return box
    problems.add(source, row.line, "box over the border of its picture", _outside(row, size), CLIPPED)
    return box


def _outside(row: Row, size: tuple[int, int]) -> str:
    return f"{_text(row.box)} in {size[1]} x {size[0]}"


def _text(box: Iterable[float]) -> str:
    return " ".join(f"{value:.6g}" if math.isfinite(value) else str(value) for value in box)

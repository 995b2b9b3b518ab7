"""YOLO labels: one text file per picture, ``class x y w h`` a line, relative to the picture; Darknet's as well.

Where Darknet stops at the first line it cannot parse, and others drop the picture, here one row is dropped and
counted. A row of an odd number of at least 7 columns is a polygon ``class x1 y1 x2 y2 ...`` and gives its bounding box,
and its outline where masks are wanted; in a file that also holds boxes, 7 columns are a box with two values too many.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from utils.datasets.formats.pictures import Source, find, find_pictures, is_there, probe_pictures
from utils.datasets.formats.rows import (
    KEPT,
    MAX_ROWS,
    NUMBER,
    QUARANTINED,
    Annotated,
    Problems,
    Row,
    drop_duplicates,
    make_record,
    read_annotation,
)
from utils.datasets.formats.segmentation import outline_rows
from utils.errors import UserError
from utils.structures import Record

NUMBERS = re.compile(rf"{NUMBER.pattern}(?:[ \t]+{NUMBER.pattern})*")
BOX_COLUMNS, MIN_POLYGON_COLUMNS = 5, 7
MAX_LINE = 1 << 16  # characters
LOOKS_LIKE_PIXELS = 2.0  # relative coordinates are at most 1, and slightly more by rounding
PICTURE_FOLDERS = ("images", "JPEGImages")  # the last such folder of a path becomes "labels"


def read_yolo(source: Source, problems: Problems) -> Annotated:
    """Class names, records, and how many pictures had no label file (backgrounds, like those with an empty one).

    Raises:
        UserError: no pictures, not one label file, class ids that count from 1, pixels where relative numbers belong,
            no polygon where masks are wanted.
    """
    assert source.names is not None
    pictures = find_pictures(source, problems)
    sizes = probe_pictures(pictures, source, problems)
    reader = LabelReader(source.names, problems, masks=source.masks)
    records, missing = [], []
    for picture, size in sizes.items():
        label = find_label(picture)
        if label is None:
            missing.append(picture)
        record = reader.record(picture, size, label)
        if record is not None:
            records.append(record)
    reader.refuse()
    if sizes and len(missing) == len(sizes):
        tried = ", ".join(str(path) for path in label_paths(missing[0]))
        raise UserError(source.where, f"none of {len(sizes)} pictures has a label file", f"looked for {tried}, ...")
    _count_strays(source, pictures, problems)
    shared = Counter(next(label_paths(picture)) for picture in sizes)
    problems.add_some(
        source.file,
        "pictures that share one label file",
        [picture for picture in sizes if shared[next(label_paths(picture))] > 1],
    )
    return Annotated(source.names, records, len(missing))


def label_paths(picture: Path) -> Iterator[Path]:
    """Where the labels of a picture may lie, best first. Only whole path components and the suffix change."""
    parts = picture.parts
    for folder in PICTURE_FOLDERS:
        if folder in parts[:-1]:
            last = len(parts) - 2 - parts[-2::-1].index(folder)
            yield Path(*parts[:last], "labels", *parts[last + 1 :]).with_suffix(".txt")
    yield picture.with_suffix(".txt")


def find_label(picture: Path) -> Path | None:
    """The label file of a picture, None where there is none. One that cannot be opened is one, too."""
    return next((path for path in label_paths(picture) if is_there(path)), None)


class LabelReader:
    """Reads label files and remembers what only the whole set can show."""

    def __init__(self, names: tuple[str, ...], problems: Problems, *, masks: bool = False):
        self.names, self.problems, self.masks = names, problems, masks
        self.num_rows = self.num_pixel_rows = self.num_polygons = 0
        self.ids: set[int] = set()
        self.first_pixels = self.first_nameless = self.first_row = ""  # file:line

    def record(self, picture: Path, size: tuple[int, int], label: Path | None) -> Record | None:
        if label is None:
            return make_record(picture, size, [], num_bad=0, source=picture, problems=self.problems, masks=self.masks)
        try:
            text = decode_labels(read_annotation(label), label)
        except UserError as error:
            self.problems.add(label, None, "label file cannot be read", error.message, QUARANTINED)
            return None
        num_lines = sum(not line.isspace() for line in text.split("\n") if line)
        if num_lines > MAX_ROWS:
            self.problems.add(label, None, f"more than {MAX_ROWS} rows for one picture", num_lines, QUARANTINED)
            return None
        rows, num_bad = self.rows(text, size, label)
        rows = drop_duplicates(rows, label, self.problems)
        if self.masks:
            rows, num_shapeless = outline_rows(rows, size, label, self.problems)
            num_bad += num_shapeless
        return make_record(picture, size, rows, num_bad=num_bad, source=label, problems=self.problems, masks=self.masks)

    def rows(self, text: str, size: tuple[int, int], path: Path) -> tuple[list[Row], int]:
        """The rows that are boxes or polygons, in pixels, and the number of those that are neither."""
        parsed, num_bad = [], 0
        for number, line in enumerate(text.split("\n"), 1):
            line = line.partition("#")[0].strip()
            if not line:
                continue
            values, fault, found = _parse(line)
            if not fault:
                fault, found = self.check_class(values[0], f"{path}:{number}")
            if fault:
                self.problems.add(path, number, fault, found)
                num_bad += 1
            else:
                parsed.append((number, values))
        if any(len(values) == BOX_COLUMNS for _, values in parsed):
            for number, values in parsed:
                if len(values) == MIN_POLYGON_COLUMNS:
                    self.problems.add(path, number, "wrong number of columns", "7 among boxes of 5: class x y w h")
            kept = [(number, values) for number, values in parsed if len(values) != MIN_POLYGON_COLUMNS]
            parsed, num_bad = kept, num_bad + len(parsed) - len(kept)
        return [self.to_pixels(values, number, size, path) for number, values in parsed], num_bad

    def check_class(self, value: float, where: str) -> tuple[str, str]:
        """What is wrong with a class id, if anything."""
        if value < 0 or value != int(value):
            return "class id is not a whole number from 0", f"{value:g}"
        self.ids.add(int(value))
        if value < len(self.names):
            return "", ""
        self.first_nameless = self.first_nameless or where
        return "class id has no name", f"class {value:.0f}, but there are {len(self.names)} names, from 0"

    def to_pixels(self, values: list[float], number: int, size: tuple[int, int], path: Path) -> Row:
        height, width = size
        self.num_rows += 1
        self.first_row = self.first_row or f"{path}:{number}"
        if max(values[1:]) > LOOKS_LIKE_PIXELS:
            self.num_pixel_rows += 1
            self.first_pixels = self.first_pixels or f"{path}:{number}"
        if len(values) == BOX_COLUMNS:
            box = corners_of(*values[1:], size)
        else:
            xs, ys = values[1::2], values[2::2]
            box = (min(xs) * width, min(ys) * height, max(xs) * width, max(ys) * height)
            self.num_polygons += 1
        row = Row(int(values[0]), box, number)
        if not self.masks or len(values) == BOX_COLUMNS:
            return row
        corners = zip(values[1::2], values[2::2])
        return row._replace(segmentation=[[edge for x, y in corners for edge in (x * width, y * height)]])

    def refuse(self) -> None:
        """Raise what makes the whole set wrong: ids from 1, pixels for relative numbers, boxes for polygons."""
        num = len(self.names)
        if self.first_nameless and 0 not in self.ids and max(self.ids) == num:
            found = f"class id {num}, but there are {num} names (0 to {num - 1}), and no id is 0"
            raise UserError(self.first_nameless, found, "are the ids 1-based? YOLO counts from 0")
        if self.num_pixel_rows * 2 > self.num_rows:
            share = f"{self.num_pixel_rows} of {self.num_rows} rows have numbers far above 1: labels look like pixels"
            raise UserError(self.first_pixels, share, "divide x and w by the picture's width, y and h by its height")
        if self.masks and self.num_rows and not self.num_polygons:
            found = f"none of {self.num_rows} rows is a polygon, a network with masks needs them"
            raise UserError(self.first_row, found, "write 'class x1 y1 x2 y2 ...', or take a cfg without [mask]")


def corners_of(x: float, y: float, w: float, h: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A label's relative centre and size in a picture of ``size`` (H, W) -> xyxy in pixels."""
    height, width = size
    return (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height


def decode_labels(data: bytes, path: Path) -> str:
    """Text with newlines as line ends. UserError names what it is instead."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(path, "UTF-16, expected UTF-8", "save it again")
    if b"\0" in data:
        raise UserError(path, "not text: holds NUL bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(path, f"not UTF-8 text: byte {error.start}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse(line: str) -> tuple[list[float], str, str]:
    """The numbers of a row, or the reason why it is none and what was found."""
    if len(line) > MAX_LINE:
        return [], "line too long", f"{len(line)} characters"
    if NUMBERS.fullmatch(line) is None:
        return [], "not a row of numbers", _explain(line)
    values = [float(word) for word in line.split()]
    if max(map(abs, values)) > 1e9:  # also what overflows to infinity
        return [], "number out of range", line[:60]
    num = len(values)
    if num == BOX_COLUMNS or (num >= MIN_POLYGON_COLUMNS and num % 2):
        return values, "", ""
    hint = "; is the sixth a confidence?" if num == BOX_COLUMNS + 1 else ""
    return [], "wrong number of columns", f"{num}, expected class x y w h, or class and 3 or more points{hint}"


def _explain(line: str) -> str:
    shown = repr(line[:60])
    if "," in line:
        return f"{shown}: separate by spaces, with a decimal point"
    if re.search(r"\b(nan|inf(inity)?)\b", line, re.IGNORECASE):
        return f"{shown}: not a finite number"
    return shown


def _count_strays(source: Source, pictures: list[Path], problems: Problems) -> None:
    """Count label files whose picture is gone. Only where the split is whole folders: a list may leave pictures out."""
    if not all(find(entry, source.bases, source.where, "folder").is_dir() for entry in source.entries):
        return
    for folder in sorted({picture.parent for picture in pictures}):
        labels = next(label_paths(folder / "any.jpg")).parent
        if labels == folder:
            continue
        stems = {"classes", *(picture.stem for picture in pictures if picture.parent == folder)}
        strays = [file.name for file in labels.glob("*.txt") if file.stem not in stems]
        if strays:
            found = f"{len(strays)}, such as {min(strays)}"
            problems.add(labels, None, "label files without a picture", found, KEPT)

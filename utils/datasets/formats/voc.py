"""Pascal VOC: one XML per picture, splits as lists of names in ``ImageSets/Main``.

Coordinates stay as they are written. VOC's own count pixels from 1 and include the last one, but most tools that write
this format count from 0 and exclude it (real files hold xmin 0 and xmax = width), and a file does not say which it is;
shifting would be wrong for the many to gain a pixel for the few. ``difficult`` objects become ignore regions. The names
of body parts inside an object (VOC's person layout) are no objects.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from utils.datasets.formats.pictures import Source, find, is_there, probe_pictures, read_lines
from utils.datasets.formats.rows import (
    NUMBER,
    QUARANTINED,
    Annotated,
    Problems,
    Row,
    drop_duplicates,
    is_name,
    make_record,
    read_annotation,
)
from utils.datasets.images import IMAGE_SUFFIXES
from utils.errors import UserError, nearest, printable
from utils.structures import Record

CORNERS = ("xmin", "ymin", "xmax", "ymax")
OBJECT = ("annotation", "object")
FIELDS = {(*OBJECT, key): key for key in ("name", "difficult")} | {(*OBJECT, "bndbox", key): key for key in CORNERS}
SIZE = {("annotation", "size", key): key for key in ("width", "height")}
MAX_DEPTH = 20  # of nested elements; real files use 4
SPLITS = Path("ImageSets") / "Main"


class VocObject(NamedTuple):
    """One object as written; a later field of the same name wins."""

    line: int
    fields: dict[str, str]


class VocFile(NamedTuple):
    """What one XML file says."""

    objects: list[VocObject]
    size: dict[str, str]


def read_voc(source: Source, problems: Problems) -> Annotated:
    """Class names (given, or all that occur under ``Annotations``, sorted), records, and pictures without an XML.

    Raises:
        UserError: no such split, no picture, a class that is not among the given names.
    """
    assert source.annotations is not None
    root = source.annotations
    names = source.names or collect_names(root / "Annotations")
    pictures = _pictures(root, source, problems)
    sizes = probe_pictures(list(pictures.values()), source, problems)
    records, missing = [], 0
    for name, picture in pictures.items():
        if picture not in sizes:
            continue
        path = root / "Annotations" / f"{name}.xml"
        if not is_there(path):
            missing += 1
            records.append(make_record(picture, sizes[picture], [], num_bad=0, source=path, problems=problems))
            continue
        record = _read_record(path, picture, sizes[picture], names, problems)
        if record is not None:
            records.append(record)
    if pictures and missing == len(pictures):
        raise UserError(source.where, f"none of {missing} pictures has an XML file under {root / 'Annotations'}")
    return Annotated(names, records, missing)


def collect_names(folder: Path) -> tuple[str, ...]:
    """Every class name in the XML files of a folder, sorted: the same for all splits of a data set.

    Raises:
        UserError: there is none.
    """
    names = set()
    for path in folder.glob("*.xml"):
        try:
            names |= {name for found in parse_voc(path).objects if is_name(name := found.fields.get("name"))}
        except UserError:
            continue  # reading the split that holds this file reports it, with its line
    if not names:
        raise UserError(folder, "no XML file names an object")
    return tuple(sorted(names))


def parse_voc(path: Path) -> VocFile:
    """The objects and the size in one XML file. Document types and entities are refused, so nothing expands.

    Raises:
        UserError: not readable, not XML, not VOC.
    """
    objects: list[VocObject] = []
    size: dict[str, str] = {}
    where: list[str] = []
    text: list[str] = []
    parser = expat.ParserCreate()

    def refuse(*_):
        raise UserError(f"{path}:{parser.CurrentLineNumber}", "document types and entities are refused", "remove it")

    def start(tag, _):
        where.append(tag)
        text.clear()
        if len(where) == 1 and tag != "annotation":
            raise UserError(f"{path}:{parser.CurrentLineNumber}", f"not Pascal VOC: starts with <{tag}>")
        if len(where) > MAX_DEPTH:
            raise UserError(f"{path}:{parser.CurrentLineNumber}", f"nested deeper than {MAX_DEPTH} levels")
        if tuple(where) == OBJECT:
            objects.append(VocObject(parser.CurrentLineNumber, {}))

    def end(_):
        place = tuple(where)
        if place in FIELDS:
            objects[-1].fields[FIELDS[place]] = "".join(text).strip()
        elif place in SIZE:
            size[SIZE[place]] = "".join(text).strip()
        where.pop()
        text.clear()

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text.append
    try:
        parser.Parse(read_annotation(path), True)
    except UserError:
        raise
    except expat.ExpatError as error:
        raise UserError(f"{path}:{error.lineno}", f"not XML: {expat.ErrorString(error.code)}") from error
    except (ValueError, LookupError) as error:  # an encoding that Python or expat does not know
        raise UserError(path, f"not XML: {error}") from error
    return VocFile(objects, size)


def _pictures(root: Path, source: Source, problems: Problems) -> dict[str, Path]:
    """Name of the annotation -> picture file, for the names a split lists."""
    bases = (root, root / SPLITS)
    names: list[tuple[str, int, Path]] = []
    for entry in source.entries:
        listed = entry if entry.endswith(".txt") else f"{entry}.txt"
        path = find(listed, bases, source.where, "list of names")
        names += [(text, line, path) for text, line in read_lines(path)]
    if not names:
        looked = ", ".join(str(root / SPLITS / entry) for entry in source.entries)
        raise UserError(source.where, f"no picture: the lists are empty; looked at {looked}")
    folder = root / "JPEGImages"
    found = [file for file in sorted(folder.glob("*")) if file.suffix.lower() in IMAGE_SUFFIXES]
    files, count = {file.stem: file for file in found}, Counter(file.stem for file in found)
    twins = [files[name] for name, _, _ in names if count[name] > 1]
    problems.add_some(folder, "pictures of one name, of which the last is used", twins)
    listed = Counter(name for name, _, _ in names)
    double = [Path(name) for name in listed if listed[name] > 1]
    problems.add_some(root / SPLITS, "pictures named more than once", double)
    pictures = {}
    for name, line, path in names:
        if name in files:
            pictures[name] = files[name]
        else:
            problems.add(path, line, "picture cannot be used", f"no {name}.jpg under {folder}", QUARANTINED)
    return pictures


def _read_record(
    path: Path, picture: Path, size: tuple[int, int], names: Sequence[str], problems: Problems
) -> Record | None:
    try:
        parsed = parse_voc(path)
    except UserError as error:
        problems.add(error.where, None, "annotation cannot be read", error.message, QUARANTINED)
        return None
    stated = tuple(_number(parsed.size.get(key, "")) or 0 for key in ("height", "width"))
    if 0 not in stated and stated != size:  # many tools write no size, or zeros
        found = f"annotated {stated[1]:g} x {stated[0]:g}, found {size[1]} x {size[0]}"
        problems.add(path, None, "picture has another size than its annotation says", found, QUARANTINED)
        return None
    found = [to_row(written, names, path, problems) for written in parsed.objects]
    rows = [row for row in found if row is not None]
    num_bad = len(found) - len(rows)
    rows = drop_duplicates(rows, path, problems)
    return make_record(picture, size, rows, num_bad=num_bad, source=path, problems=problems)


def to_row(written: VocObject, names: Sequence[str], path: Path, problems: Problems) -> Row | None:
    """An object as a row; None, and counted, where it is none. Raises UserError for a class without a place."""
    line, fields = written
    box = _corners(fields)
    if box is None or "name" not in fields:
        found = " ".join(f"{key}={fields.get(key)}" for key in ("name", *CORNERS))
        problems.add(path, line, "object without name and 4 finite corners", found)
        return None
    if fields["name"] not in names:
        found = f"class '{printable(fields['name'])}' has no place"
        raise UserError(f"{path}:{line}", found, nearest(fields["name"], names))
    return Row(names.index(fields["name"]), box, line, ignore=fields.get("difficult", "0") == "1")


def _corners(fields: dict[str, str]) -> tuple[float, float, float, float] | None:
    box = tuple(_number(fields.get(key, "")) for key in CORNERS)
    return None if None in box else box


def _number(text: str) -> float | None:
    """A number of a sensible size; None for anything else."""
    value = float(text) if NUMBER.fullmatch(text) else None
    return None if value is None or abs(value) > 1e9 else value

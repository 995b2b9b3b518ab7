"""A repaired copy of a data set's annotation files: what is beyond doubt, change by change, and back again.

python -m utils.datasets.repair runs/doctor/exp     # takes the changes back: restored/ is what repaired/ was made of

Done to the text is what the reader does in memory, by the reader's own functions: boxes over the border are cut back,
rows that cannot be used and repeated ones are removed. All other text stays as it is. A picture none of whose rows can
be used is left to its owner: without them it would teach that nothing is there.

Law: ``undone(repaired(text, changes), changes) == text``, and reading the copy finds nothing to clip or drop.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.datasets.formats.coco import class_labels, fault, load
from utils.datasets.formats.coco import to_row as coco_row
from utils.datasets.formats.description import describe
from utils.datasets.formats.pictures import Source
from utils.datasets.formats.rows import Problems, Row, make_record
from utils.datasets.formats.voc import parse_voc
from utils.datasets.formats.voc import to_row as voc_row
from utils.datasets.formats.writers import coco_box, write_new, yolo_numbers
from utils.datasets.formats.yolo import BOX_COLUMNS, LabelReader, decode_labels, find_label
from utils.datasets.records import DataSet
from utils.errors import UserError, run_main
from utils.files import read_bytes
from utils.structures import Record

COPY, RESTORED, CHANGES = "repaired", "restored", "changes.jsonl"
LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
OBJECT = re.compile(r"\s*<object\b.*?</object\s*>", re.DOTALL)
BETWEEN = re.compile(r"[\s,]*")  # of two items of a JSON list
CORNER = re.compile(r"(<([xy])(?:min|max)\s*>\s*)([^<\s]+)")


class Change(NamedTuple):
    """One edit of one file."""

    file: str  # relative to the folder of all annotations, and to the copy
    line: int
    reason: str
    at: int  # characters before it in the original
    before: str
    after: str  # empty where a row was removed


class Written(NamedTuple):
    """One row of a file: where it stands, what it says."""

    start: int
    stop: int  # characters of its file
    row: Row | None  # None: it cannot be used
    fault: str
    rewrite: Callable[[np.ndarray], str]  # the same row with another box float32 [4]


Annotations = tuple[Path, str, list[tuple[Record, list[Written]]]]  # a file, its text, the rows of its pictures


def repaired(text: str, changes: Sequence[Change]) -> str:
    """The text with all ``changes`` made."""
    for change in sorted(changes, key=lambda change: -change.at):
        stop = change.at + len(change.before)
        assert text[change.at : stop] == change.before, "changes of another text"
        text = text[: change.at] + change.after + text[stop:]
    return text


def undone(text: str, changes: Sequence[Change]) -> str:
    """The text as it was before all ``changes``: from the front, so that each finds its place."""
    for change in sorted(changes, key=lambda change: change.at):
        stop = change.at + len(change.after)
        if text[change.at : stop] != change.after:
            raise UserError(change.file, f"line {change.line} is not as the change list left it", "it was edited since")
        text = text[: change.at] + change.before + text[stop:]
    return text


def repair(source: str, sets: Sequence[DataSet], folder: Path) -> list[Change]:
    """Write ``folder/repaired``, a copy of every annotation file, and ``folder/changes.jsonl``; what was changed."""
    files: dict[Path, tuple[str, dict[int, Change]]] = {}
    for data in sets:
        described = describe(Path(source).expanduser(), data.split, Problems())
        for file, text, pictures in ROWS_OF[described.format](described, data):
            known = files.setdefault(file, (text, {}))[1]  # one file may hold rows of several splits
            for record, rows in pictures:
                known |= {change.at: change for change in _changes(text, record, rows, described.format)}
    root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    changes: list[Change] = []
    for file, (text, known) in files.items():
        name = str(file.relative_to(root))
        mine = [known[at]._replace(file=name) for at in sorted(known)]
        mine = _with_commas(text, mine) if file.suffix == ".json" else mine
        write_new(folder / COPY / name, repaired(text, mine))
        changes += mine
    write_new(folder / CHANGES, "".join(json.dumps(change._asdict()) + "\n" for change in changes))
    return changes


def restore(run: Path) -> int:
    """Write ``run/restored``: the annotation files as they were, from the copy and the list; how many."""
    changes: dict[str, list[Change]] = {}
    for number, line in enumerate(read_bytes(run / CHANGES, "the change list of a run of the doctor").splitlines(), 1):
        try:
            change = Change(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{run / CHANGES}:{number}", f"not a change: {error}") from error
        changes.setdefault(change.file, []).append(change)
    copies = [file for file in sorted((run / COPY).rglob("*")) if file.is_file()]
    for file in copies:
        name = str(file.relative_to(run / COPY))
        text = read_bytes(file, "a repaired file").decode("utf-8")
        write_new(run / RESTORED / name, undone(text, changes.get(name, [])))
    return len(copies)


def _changes(text: str, record: Record, rows: list[Written], format: str) -> list[Change]:
    """The edits of one picture's rows; none where no row would remain."""
    changes, seen = [], set()
    for start, stop, row, reason, rewrite in rows:
        after = ""
        if row is not None and format != "coco" and (row.label, row.box) in seen:  # COCO counts repeated ones
            reason = "the same box twice"
        elif row is not None:
            seen.add((row.label, row.box))
            problems, least = Problems(), 0.0 if format == "coco" else 1.0
            kept = make_record(
                Path(record.path), record.size, [row], num_bad=0, source="", problems=problems, min_area=least
            )
            if not problems.entries:
                continue
            reason = problems.entries[0].reason
            after = "" if kept is None else rewrite(kept.boxes[0])
        before = text[start:stop]
        line = text.count("\n", 0, stop - len(before.lstrip())) + 1
        changes.append(Change("", line, reason, start, before, after))
    return changes if sum(not change.after for change in changes) < len(rows) else []


def _yolo(described: Source, data: DataSet) -> Iterator[Annotations]:
    for record in data.records:
        file = find_label(Path(record.path))
        if file is None:
            continue
        raw = read_bytes(file, "labels")
        text, problems = raw.decode("utf-8"), Problems()
        found, _ = LabelReader(data.names, problems).rows(decode_labels(raw, file), record.size, file)
        good, bad = {row.line: row for row in found}, {problem.line: problem.reason for problem in problems.entries}
        rows = []
        for number, span in enumerate(LINE.finditer(text), 1):
            if number in good or number in bad:
                row = good.get(number)
                rewrite = _yolo_rewrite(span.group(), record.size)
                rows.append(Written(*span.span(), row, bad.get(number, ""), rewrite))
        yield file, text, [(record, rows)]


def _yolo_rewrite(line: str, size: tuple[int, int]) -> Callable[[np.ndarray], str]:
    def rewrite(box: np.ndarray) -> str:
        content, end = line.rstrip("\r\n"), line[len(line.rstrip("\r\n")) :]
        words = content.partition("#")[0].split()
        if len(words) == BOX_COLUMNS:
            numbers = yolo_numbers(box, size)
        else:  # a polygon: its corners are cut back to the picture, as its box is
            numbers = [word if 0 <= float(word) <= 1 else str(int(float(word) > 1)) for word in words[1:]]
        return " ".join([words[0].lstrip("\ufeff"), *numbers]) + end

    return rewrite


def _voc(described: Source, data: DataSet) -> Iterator[Annotations]:
    for record in data.records:
        file = described.annotations / "Annotations" / f"{Path(record.path).stem}.xml"
        if not file.is_file():
            continue
        try:
            text = read_bytes(file, "VOC XML").decode("utf-8")
        except UnicodeDecodeError:  # XML may say another encoding: expat reads it, its text is not ours to edit
            continue
        objects, spans = parse_voc(file).objects, list(OBJECT.finditer(text))
        if len(objects) != len(spans):  # an object in a comment, or under a prefix
            spans = []
        rows = []
        for found, span in zip(objects, spans):
            problems = Problems()
            row = voc_row(found, data.names, file, problems)
            reason = problems.entries[0].reason if problems.entries else ""
            rows.append(Written(*span.span(), row, reason, _voc_rewrite(span.group(), record.size)))
        yield file, text, [(record, rows)]


def _voc_rewrite(text: str, size: tuple[int, int]) -> Callable[[np.ndarray], str]:
    """Every corner cut back to the picture; those inside stay as they are written."""
    limits = {"x": size[1], "y": size[0]}

    def cut(found: re.Match) -> str:
        value = float(found[3])
        inside = 0 <= value <= limits[found[2]]
        return found[1] + (found[3] if inside else str(0 if value < 0 else limits[found[2]]))

    return lambda box: CORNER.sub(cut, text)


def _coco(described: Source, data: DataSet) -> Iterator[Annotations]:
    file = described.annotations
    content = load(file)
    _, labels = class_labels(content["categories"], described)
    try:
        text = read_bytes(file, "a COCO file").decode("utf-8")
    except UnicodeDecodeError:  # JSON may be UTF-16
        return
    spans = json_items(text, "annotations")
    seen = set()
    known = {record.image_id: (record, []) for record in data.records}
    for annotation, (start, stop) in zip(content["annotations"], spans):
        image_id = annotation.get("image_id")
        if isinstance(image_id, (int, str)) and image_id in known:
            reason = fault(annotation, True)
            if not reason and annotation.get("id") is not None:
                reason = "annotation id given twice" * (annotation["id"] in seen)
                seen.add(annotation["id"])
            row = None if reason else coco_row(annotation, labels)
            known[image_id][1].append(Written(start, stop, row, reason, _coco_rewrite(annotation)))
    yield file, text, list(known.values())


def _coco_rewrite(annotation: dict) -> Callable[[np.ndarray], str]:
    return lambda box: json.dumps(annotation | {"bbox": coco_box(box)}, ensure_ascii=False)


def json_items(text: str, key: str) -> list[tuple[int, int]]:
    """Where each item of the list ``key`` of a JSON object starts and stops. The text is JSON, the list is there."""
    decoder = json.JSONDecoder()
    at = _skip(text, text.index("{") + 1)
    while True:
        name, at = decoder.raw_decode(text, at)
        at = _skip(text, text.index(":", at) + 1)
        if name == key:
            break
        at = _skip(text, decoder.raw_decode(text, at)[1])
    spans, at = [], _skip(text, at + 1)
    while text[at] != "]":
        _, stop = decoder.raw_decode(text, at)
        spans.append((at, stop))
        at = _skip(text, stop)
    return spans


def _skip(text: str, at: int) -> int:
    return BETWEEN.match(text, at).end()


def _with_commas(text: str, changes: list[Change]) -> list[Change]:
    """Items of a list that are removed take a comma with them: the one before, or after where none is left before."""
    widened, front = [], -1  # where the next item would be the first one left
    for change in changes:
        start, stop = change.at, change.at + len(change.before)
        if change.after:
            widened.append(change)
            continue
        while text[start - 1].isspace():
            start -= 1
        if text[start - 1] == "[" or change.at == front:
            start, stop = change.at, _skip(text, stop)
            front = stop
        else:
            start -= 1
        widened.append(change._replace(at=start, before=text[start:stop]))
    return widened


ROWS_OF = {"yolo": _yolo, "darknet": _yolo, "voc": _voc, "coco": _coco}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.datasets.repair", description="Take repairs back.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of the doctor with --fix")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    print(f"{restore(args.run)} files as they were: {args.run / RESTORED}")


if __name__ == "__main__":
    run_main(main)

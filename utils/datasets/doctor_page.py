"""The doctor's page: what is in a data set, and what to look at, with pictures. One HTML file."""

from collections.abc import Sequence
from html import escape

import cv2
import numpy as np

from utils.datasets.box_checks import class_counts
from utils.datasets.findings import ERROR, Exam, Finding, Place, Shown
from utils.datasets.images import read_image
from utils.draw import colour_of, draw_boxes
from utils.errors import UserError
from utils.page import bar, picture, row, whole_page

STYLE = """
.grid { grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); } figcaption { overflow-wrap: anywhere; }
.pair { display: flex; gap: 4px; } .pair img { min-width: 0; flex: 1; object-fit: contain; }
h2 small { font-weight: 400; color: #5c6370; } details { margin: .8em 0; } li { overflow-wrap: anywhere; }
"""
MAX_FIGURES = 12  # of a finding
MAX_LISTED = 300
MAX_TOGETHER = 3  # pictures of one place
SIDE = 400  # pixels of a figure's longer side
AROUND = 3.0  # how many times a box's longer side its surroundings reach
LEAST_AROUND = 100  # pixels


def page(source: str, exam: Exam, findings: Sequence[Finding]) -> str:
    """The HTML text."""
    names = max((data.names for data in exam.sets), key=len, default=())
    size = f"{exam.size[1]} x {exam.size[0]}"
    sections = [
        f"<h1>{escape(source)}</h1><p class=quiet>Sizes are judged on a network's input of {size} pixels.</p>",
        _overview(exam),
        _summary(findings),
        *(_finding(finding, number, names) for number, finding in enumerate(findings)),
    ]
    return whole_page(f"doctor: {source}", sections, style=STYLE)


def _overview(exam: Exam) -> str:
    if not exam.sets:
        return "<p class=bad>No split can be read.</p>"
    rows = {
        "pictures": [len(data.records) for data in exam.sets],
        "without a box": [sum(not len(record.labels) for record in data.records) for data in exam.sets],
        "without an annotation file": [data.num_unlabelled for data in exam.sets],
        "boxes": [data.num_boxes for data in exam.sets],
    }
    head = row("th", ["", *(escape(data.split) for data in exam.sets)])
    body = "".join(row("td", [name, *map(str, counts)]) for name, counts in rows.items())
    return f"<h2>What is in it</h2><table><thead>{head}</thead>{body}</table>{_classes(exam)}"


def _classes(exam: Exam) -> str:
    """A table of the boxes of every class; of splits with other classes, a table each."""
    if len({data.names for data in exam.sets}) > 1:
        return "".join(_classes(Exam(sets=(data,), looks={}, size=exam.size)) for data in exam.sets)
    counts = np.stack([class_counts(data) for data in exam.sets])
    most = max(counts.sum(axis=0).max(), 1)
    rows = [
        row("td", [escape(name), *map(str, mine), bar(np.array([mine.sum() / most]), [colour_of(label)])])
        for label, (name, mine) in enumerate(zip(exam.sets[0].names, counts.T))
    ]
    head = row("th", ["class", *(escape(data.split) for data in exam.sets), "share of the most frequent one"])
    return f"<table><thead>{head}</thead>{''.join(rows)}</table>"


def _summary(findings: Sequence[Finding]) -> str:
    if not findings:
        return "<h2>Nothing found</h2>"
    rows = [
        row(
            "td",
            [f"<a href='#f{number}'>{escape(finding.title)}</a>", _severity(finding), str(len(finding.places) or "")],
        )
        for number, finding in enumerate(findings)
    ]
    return f"<h2>What to look at</h2><table>{''.join(rows)}</table>"


def _severity(finding: Finding) -> str:
    return f"<span class={'bad' if finding.severity == ERROR else 'quiet'}>{finding.severity}</span>"


def _finding(finding: Finding, number: int, names: Sequence[str]) -> str:
    shown = [place for place in finding.places if place.shown]
    pictured, others = shown[:MAX_FIGURES], shown[MAX_FIGURES:] + [place for place in finding.places if not place.shown]
    figures = "".join(_figure(place, names) for place in pictured)
    listed = "".join(f"<li>{escape(place.where)}: {escape(place.text)}</li>" for place in others[:MAX_LISTED])
    listed += "<li>...</li>" * (len(others) > MAX_LISTED)
    more = f"<details><summary>{len(others)} {'more' if pictured else 'places'}</summary><ul>{listed}</ul></details>"
    count = f" <small>{len(finding.places)}</small>" * bool(finding.places)
    head = f"<h2 id=f{number}>{escape(finding.title)}{count}</h2><p>{_severity(finding)} {escape(finding.advice)}</p>"
    return f"{head}<div class=grid>{figures}</div>{more if others else ''}"


def _figure(place: Place, names: Sequence[str]) -> str:
    images = "".join(_image(shown, names) for shown in place.shown[:MAX_TOGETHER])
    told = f"<figcaption class=quiet>{escape(place.where)}<br>{escape(place.text)}</figcaption>"
    return f"<figure><div class=pair>{images}</div>{told}</figure>"


def _image(shown: Shown, names: Sequence[str]) -> str:
    try:
        return picture(portrait(shown, names))
    except UserError as error:
        return f"<p class=bad>{escape(error.message)}</p>"


def portrait(shown: Shown, names: Sequence[str]) -> np.ndarray:
    """The picture, or the surroundings of the boxes that it is about, uint8 [H, W, 3], no side above ``SIDE``.

    Raises:
        UserError: the picture cannot be read.
    """
    image, record = read_image(shown.record.path), shown.record
    rows = list(shown.rows) if shown.rows or shown.found else list(range(len(record.labels)))
    found = np.array([each.box for each in shown.found], np.float32).reshape(-1, 4)
    boxes = np.concatenate([record.boxes[rows], found])
    labels = [*record.labels[rows].tolist(), *range(len(names), len(names) + len(found))]
    if shown.rows or shown.found:
        left, top, right, bottom = _surroundings(boxes, record.size)
    else:
        left, top, right, bottom = 0, 0, *record.size[::-1]
    scale = SIDE / max(right - left, bottom - top)
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    part = cv2.resize(np.ascontiguousarray(image[top:bottom, left:right]), size, interpolation=how)
    placed = (boxes - np.array([left, top] * 2)) * scale
    return draw_boxes(part, placed, labels, [*names, *(each.caption for each in shown.found)], line_thickness=2)


def _surroundings(boxes: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A window (left, top, right, bottom) around all boxes, inside a picture of ``size`` (H, W)."""
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    half = max(float((high - low).max()) * AROUND, LEAST_AROUND) / 2
    centre, limits = (low + high) / 2, np.array(size[::-1])
    start = np.clip(np.floor(np.minimum(centre - half, low)), 0, limits - 1).astype(int)
    stop = np.clip(np.ceil(np.maximum(centre + half, high)), start + 1, limits).astype(int)
    return int(start[0]), int(start[1]), int(stop[0]), int(stop[1])

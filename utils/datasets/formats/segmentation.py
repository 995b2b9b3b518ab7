"""COCO's ``segmentation`` -> the rings of an outline: polygons, or run-length masks as lists or compressed.

YOLO's polygon rows come here in the same form.
"""

from collections.abc import Sequence

import numpy as np

from utils.datasets.formats.rows import KEPT, Problems, Row
from utils.run_lengths import decode, ring_of

MIN_CORNERS = 3
TOO_LARGE = 1e15  # a coordinate; nan is not below it either
MAX_EXTENT = 10  # pictures: a box with a tenth in the picture is kept, so is its outline


def outline_rows(
    rows: Sequence[Row], size: tuple[int, int], source: object, problems: Problems
) -> tuple[list[Row], int]:
    """The rows with the rings of their segmentation, and how many were dropped because none of theirs can be used.

    A polygon that can cover nothing is left out and counted; a row loses its place when that was its last one. A row
    whose area is not annotated gets that of its rings.

    Args:
        size: upright (H, W) of the picture.
        source: the annotation file and picture, for problems.
    """
    outlined = []
    for row in rows:
        rings, faults = _rings(row.segmentation, size, row.box)
        for fault in faults if rings else faults[:1]:
            found = "box " + " ".join(f"{edge:.6g}" for edge in row.box)
            problems.add(source, row.line, fault, found, **({"action": KEPT} if rings else {}))
        if rings:
            area = sum(map(_area, rings)) if row.area is None else row.area
            outlined.append(row._replace(rings=tuple(rings), area=area))
    return outlined, len(rows) - len(outlined)


def _rings(segmentation: object, size: tuple[int, int], box: tuple) -> tuple[list[np.ndarray], list[str]]:
    """Usable rings [k, 2], and what is wrong with the others."""
    if isinstance(segmentation, dict):
        return _rings_of_runs(segmentation, size)
    if not isinstance(segmentation, list) or not segmentation:
        return [], ["object without a segmentation"]
    rings, faults = [], []
    for numbers in segmentation:
        fault = _fault(numbers)
        if not fault:
            ring = np.array(numbers, np.float64).reshape(-1, 2)
            fault = _misplaced(ring, size, box)
        if fault:
            faults.append(fault)
        else:
            rings.append(ring)
    return rings, faults


def _fault(numbers: object) -> str:
    if not isinstance(numbers, list) or not all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < TOO_LARGE for x in numbers
    ):
        return "polygon is not a list of finite numbers"
    if len(numbers) % 2:
        return "polygon with half a corner"
    return "" if len(numbers) >= 2 * MIN_CORNERS else f"polygon of fewer than {MIN_CORNERS} corners"


def _misplaced(ring: np.ndarray, size: tuple[int, int], box: tuple) -> str:
    """What keeps a ring from covering any of its picture or box."""
    low, high = ring.min(0), ring.max(0)
    if (low >= high).any():
        return "polygon without width or height"
    if (high <= 0).any() or (low >= (size[1], size[0])).any():
        return "polygon outside the picture"
    if (high - low > np.multiply((size[1], size[0]), MAX_EXTENT)).any():
        return f"polygon more than {MAX_EXTENT} times as large as its picture"
    # pixels count from their middles in some files and from their edges in others: a whole one of tolerance
    if (high < np.subtract(box[:2], 1)).any() or (low > np.add(box[2:], 1)).any():
        return "polygon outside its box"
    return ""


def _area(ring: np.ndarray) -> float:
    """Square pixels inside a ring that does not cross itself (shoelace formula)."""
    x, y = (ring - ring[0]).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _rings_of_runs(segmentation: dict, size: tuple[int, int]) -> tuple[list[np.ndarray], list[str]]:
    stated, counts = segmentation.get("size"), segmentation.get("counts")
    if stated != list(size):
        return [], ["run-length mask of another size than the picture"]
    if not isinstance(counts, (list, str)):
        return [], ["run-length mask without counts"]
    try:
        mask = decode(counts, size)
    except (ValueError, OverflowError):
        return [], ["run-length mask that cannot be decoded"]
    return ([ring_of(mask)], []) if mask.any() else ([], ["run-length mask without a pixel"])

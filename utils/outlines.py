"""Outlines -> pixels, by the rule of the COCO API, so that annotated areas and overlaps are the published ones.

Letters: n objects, G rings, V corners, h w height and width of the pixels, S side of a mask in its box's frame.

The rule: corners are rounded to fifths of a pixel, an edge is a line of fifths, and in each column the pixels from one
crossing of the column's middle to the next are inside. Between the lines nothing is left to chance: two rings that
share an edge neither overlap nor leave a gap. Source: COCO API, ``maskApi.c`` (what it computes, not how).
"""

import numpy as np

from utils.mask_frames import Patch
from utils.structures import Outlines

FIFTHS = 5  # steps of a pixel
FARTHEST = 20  # sides of a frame that corners beyond it can be away
MASK_SIDE = 56  # of a training target: twice what a mask head predicts


def fill(outlines: Outlines, size: tuple[int, int], *, left: int = 0, top: int = 0) -> np.ndarray:
    """Which pixels each object covers: bool [n, h, w].

    Args:
        size: (h, w) of the part of the picture that is wanted.
        left, top: where in the picture it begins, whole pixels.
    """
    height, width = size
    out = np.zeros((len(outlines), height, width), bool)
    ring, column, row = _crossings(outlines)
    column, row = column - left, np.clip(row - top, 0, height)
    seen = (column >= 0) & (column < width)
    num_rings = len(outlines.owner)
    place = (ring[seen] * width + column[seen]) * (height + 1) + row[seen]
    counts = np.bincount(place, minlength=num_rings * width * (height + 1)).astype(np.uint8)
    inside = np.cumsum(counts.reshape(num_rings, width, height + 1), axis=2, dtype=np.uint8)[..., :height] & 1
    for owner, pixels in zip(outlines.owner, inside.transpose(0, 2, 1).astype(bool)):
        out[owner] |= pixels
    return out


def fill_boxes(outlines: Outlines, boxes: np.ndarray, side: int = MASK_SIDE) -> np.ndarray:
    """What each object covers of its own box, uint8 [n, S, S] of 0 and 1; boxes float32 [n, 4] in the same pixels."""
    owner = np.repeat(outlines.owner, np.diff(outlines.starts))
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6)
    cells = (outlines.corners - boxes[owner, :2]) / sides[owner] * side
    # a sound object reaches ten times as far as its visible box; a box of no width must not cost a walk of billions
    return fill(outlines.moved(np.clip(cells, -FARTHEST * side, FARTHEST * side)), (side, side)).astype(np.uint8)


def patches(outlines: Outlines, size: tuple[int, int]) -> list[Patch]:
    """The pixels of each object in a picture of ``size`` (H, W)."""
    found = []
    for row in range(len(outlines)):
        mine = outlines.between(row, row + 1)
        if not len(mine.corners):
            found.append(Patch(0, 0, np.zeros((0, 0), bool)))
            continue
        limit = (size[1], size[0])
        low = np.clip(np.floor(mine.corners.min(0)) - 1, 0, limit).astype(int)
        high = np.clip(np.ceil(mine.corners.max(0)) + 1, low, limit).astype(int)
        (left, top), (right, bottom) = low.tolist(), high.tolist()
        found.append(Patch(top, left, fill(mine, (bottom - top, right - left), left=left, top=top)[0]))
    return found


def _crossings(outlines: Outlines) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where edges cross the middles of pixel columns: ring, column and first row below the crossing, int64 [m] each."""
    # float32 back to the decimals of the file: there a fifth and a half is a tie that the last digit would decide
    corners = np.trunc(FIFTHS * outlines.corners.astype(np.float64).round(3) + 0.5).astype(np.int64)
    following = np.arange(1, len(corners) + 1)
    following[outlines.starts[1:] - 1] = outlines.starts[:-1]  # the last corner of a ring leads back to its first
    start, end = corners, corners[following]
    ring = np.repeat(np.arange(len(outlines.owner)), np.diff(outlines.starts))
    moves = start[:, 0] != end[:, 0]  # an upright edge crosses no column
    start, end, ring = start[moves], end[moves], ring[moves]

    span = np.abs(end - start)
    flat = span[:, 0] >= span[:, 1]
    major = np.where(flat, 0, 1)
    rows = np.arange(len(start))
    backwards = (start[rows, major] > end[rows, major])[:, None]
    start, end = np.where(backwards, end, start), np.where(backwards, start, end)
    num_steps = span[rows, major]
    slope = (end - start)[rows, 1 - major] / np.maximum(num_steps, 1)

    # every step of every edge: from one fifth to the next along the longer side
    edge = np.repeat(rows, num_steps)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(num_steps) - num_steps, num_steps)
    along = start[edge, major[edge]] + step
    begin = start[edge, 1 - major[edge]]
    here = np.trunc(begin + slope[edge] * step + 0.5).astype(np.int64)
    there = np.trunc(begin + slope[edge] * (step + 1) + 0.5).astype(np.int64)
    flat = flat[edge]
    x, next_x = np.where(flat, along, here), np.where(flat, along + 1, there)
    y, next_y = np.where(flat, here, along), np.where(flat, there, along + 1)
    left = np.minimum(x, next_x)
    crosses = (x != next_x) & (left % FIFTHS == FIFTHS // 2)
    column = left[crosses] // FIFTHS
    row = (np.minimum(y, next_y)[crosses] + FIFTHS // 2) // FIFTHS
    return ring[edge[crosses]], column, row

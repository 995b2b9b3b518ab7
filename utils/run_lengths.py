"""Run-length masks as COCO files hold them: read into rings, written from pixels.

Letters: H W height and width of the picture.

A mask is read down its columns, column after column; its runs are counted in turn, beginning with those outside.
"Compressed" writes each count (from the fourth on, its difference from the one two places before) in letters of five
bits and a flag for more to come, least bits first, the last one signed. Source: COCO API, ``maskApi.c``.
"""

import numpy as np

from utils.mask_frames import Patch

FIRST_LETTER = 48
MOST_LETTERS = 7  # five bits each: more than any picture needs


def decode(counts: list[int] | str, size: tuple[int, int]) -> np.ndarray:
    """Runs -> bool [H, W]. Raises ValueError where they are no mask of that size."""
    runs = _unpack(counts) if isinstance(counts, str) else np.asarray(counts)
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or (runs < 0).any():
        raise ValueError("run lengths that are not whole numbers from 0")
    height, width = size
    if runs.sum() != height * width:
        raise ValueError(f"run lengths of {runs.sum()} pixels in a picture of {width} x {height}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def encode(patch: Patch, size: tuple[int, int]) -> dict:
    """The compressed form of a patch of a picture of ``size`` (H, W), ready for ``json.dump``."""
    height, width = size
    plane = np.zeros((width, height), bool)
    rows, columns = patch.pixels.shape
    plane[patch.left : patch.left + columns, patch.top : patch.top + rows] = patch.pixels.T
    changes = np.flatnonzero(np.diff(plane.ravel(), prepend=False))
    return {"size": [height, width], "counts": _pack(np.diff(changes, prepend=0, append=height * width))}


def ring_of(mask: np.ndarray) -> np.ndarray:
    """One ring float64 [k, 2] around all pixels of a mask bool [H, W] that has some.

    Around the run of each column, then on to the next, and back the same way in the end: ways that are walked twice
    enclose nothing. So a run-length mask is an outline like any other, holes and islands included, to the pixel.
    """
    columns = np.pad(mask.T, ((0, 0), (1, 1))).astype(np.int8)
    changes = np.diff(columns, axis=1)
    left, top = np.nonzero(changes == 1)
    _, bottom = np.nonzero(changes == -1)
    around = np.stack([left, top, left + 1, top, left + 1, bottom, left, bottom, left, top], axis=1).reshape(-1, 2)
    back = np.stack([left, top], axis=1)[-2:0:-1]
    return np.concatenate([around, back]).astype(np.float64)


def _unpack(text: str) -> np.ndarray:
    letters = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - FIRST_LETTER
    last = letters & 32 == 0
    if not len(letters) or letters.min() < 0 or letters.max() > 63 or not last[-1]:
        raise ValueError("run lengths in letters that mean nothing")
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    if (ends - starts).max() >= MOST_LETTERS:
        raise ValueError("run lengths larger than any picture")
    place = 5 * (np.arange(len(letters)) - np.repeat(starts, ends - starts + 1))
    runs = np.add.reduceat((letters & 31) << place, starts)
    runs -= np.where(letters[ends] & 16, np.int64(32) << place[ends], 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _pack(runs: np.ndarray) -> str:
    values = runs.astype(np.int64)
    values[3:] -= runs[1:-2]
    rest = values[:, None] >> (5 * np.arange(MOST_LETTERS))
    five = rest & 31
    is_end = (rest >> 5) == np.where(five & 16, -1, 0)  # what is left is the sign
    length = is_end.argmax(axis=1) + 1
    place = np.arange(MOST_LETTERS)
    more = np.where(place < length[:, None] - 1, 32, 0)
    letters = (five + more + FIRST_LETTER)[place < length[:, None]]
    return letters.astype(np.uint8).tobytes().decode("ascii")

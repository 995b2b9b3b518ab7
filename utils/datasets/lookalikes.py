"""Pictures that show the same, whatever their size, compression or brightness: duplicates, and leaks between splits.

A difference hash of 64 bits finds who may be alike, without comparing all with all; the details of a thumbnail decide
(without what is smooth: pictures before one backdrop are not the same). Measured on 406 photographs: every copy of
another size or JPEG quality is found, 404 of those made brighter, 400 of those cropped by 2 %; of 82,000 pairs of
different ones none is taken, nor of 870,000 of drawn shapes. Mirrored and rotated copies are not looked for.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from tqdm import tqdm

from utils.datasets.images import Header, decode_image, inspect
from utils.datasets.limits import Limits
from utils.errors import UserError
from utils.files import read_bytes

MAX_DISTANCE = 7  # bits of 64; below 8 differences, one of the 8 bytes is equal
MIN_LIKENESS = 0.9  # correlation of the details of two thumbnails
THUMBNAIL = 16  # pixels a side
SMOOTH = 5  # pixels of it over which what is no detail is averaged
MIN_CONTRAST = 1.0  # grey levels: a picture of one colour is like no other
ROWS_AT_ONCE = 256
THREADS = 4
BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)  # set bits of a byte


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one look at a whole picture leaves behind."""

    header: Header
    digest: bytes  # of the file
    hash: np.ndarray  # uint8 [8]
    details: np.ndarray  # float32 [256] of a thumbnail, mean 0, length 1 (shorter where there is no contrast)


def look_at(path: str, limits: Limits) -> Look:
    """Read and decode a picture. Raises UserError where that is impossible."""
    header, _ = inspect(path, limits)
    data = read_bytes(path, "a picture")
    grey = decode_image(data, 1, where=path, limits=limits)[..., 0]
    small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA)
    thumbnail = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32)
    details = (thumbnail - cv2.blur(thumbnail, (SMOOTH, SMOOTH))).ravel()
    details -= details.mean()
    return Look(
        header=header,
        digest=hashlib.sha256(data).digest(),
        hash=np.packbits(small[:, 1:] > small[:, :-1]),
        details=details / max(float(np.linalg.norm(details)), MIN_CONTRAST * THUMBNAIL),
    )


def look_at_all(paths: Sequence[str], limits: Limits) -> dict[str, Look | UserError]:
    """Every picture once, by path; the error of one that cannot be decoded."""

    def look(path: str) -> Look | UserError:
        try:
            return look_at(path, limits)
        except UserError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        looks = pool.map(look, paths)
        return dict(zip(paths, tqdm(looks, "pictures", len(paths), leave=False, disable=None)))


def same_pictures(looks: Sequence[Look]) -> list[tuple[int, int]]:
    """Pairs of positions (low, high), sorted, of pictures that show the same."""
    if len(looks) < 2:
        return []
    hashes = np.stack([look.hash for look in looks])
    found = {pair for block in range(8) for pair in _near(hashes, block)}
    first: dict[bytes, int] = {}
    copies = {(first.setdefault(look.digest, number), number) for number, look in enumerate(looks)}
    alike = {(i, k) for i, k in found if looks[i].details @ looks[k].details > MIN_LIKENESS}
    return sorted(alike | {(i, k) for i, k in copies if i < k})


def _near(hashes: np.ndarray, block: int) -> Iterator[tuple[int, int]]:
    """Pairs whose byte ``block`` is equal and whose hashes differ in few bits."""
    order = np.argsort(hashes[:, block], kind="stable")
    starts = np.flatnonzero(np.diff(hashes[order, block], prepend=-1))
    for rows in np.split(order, starts[1:]):
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            distance = BITS[hashes[some, None] ^ hashes[None, rows]].sum(axis=2)
            near = (distance <= MAX_DISTANCE) & (some[:, None] < rows[None])
            yield from ((int(some[i]), int(rows[k])) for i, k in zip(*np.nonzero(near)))


def groups(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Pairs joined to groups, each sorted, in the order of their first members."""
    leader: dict[int, int] = {}

    def find(number: int) -> int:
        while leader.setdefault(number, number) != number:
            leader[number] = number = leader[leader[number]]
        return number

    for low, high in pairs:
        low, high = sorted((find(low), find(high)))
        leader[high] = low
    joined: dict[int, list[int]] = {}
    for number in sorted(leader):
        joined.setdefault(find(number), []).append(number)
    return list(joined.values())

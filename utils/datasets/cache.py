"""Pictures decoded once: in memory, or in a memory-mapped file under ``runs/cache``.

Pictures larger than the training size are kept at that size: what a zoomed-in mosaic could have shown beyond it is
lost, and the cache is a fraction of the originals. Smaller ones are kept as they are, pixel by pixel.
"""

import hashlib
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.datasets.images import read_image
from utils.datasets.letterbox import fit, resize
from utils.datasets.limits import LIMITS, Limits
from utils.errors import ResourceError, UserError
from utils.structures import Record

HEADROOM = 0.8  # share of what is free that a cache may take: training needs some, too


class ImageCache:
    """Decoded pictures in one flat array: ``cache[index]`` -> uint8 [h, w, C], read-only, no copy.

    Args:
        pixels: uint8 [total], in memory or memory-mapped. One array: workers share its pages.
        shapes: int64 [n, 3], height, width and channels of each picture.
    """

    def __init__(self, pixels: np.ndarray, shapes: np.ndarray):
        assert len(pixels) == _num_bytes(shapes)
        self.pixels, self.shapes = np.asarray(pixels), shapes  # a plain view also of a memory-mapped file
        self.starts = np.concatenate([[0], np.cumsum(shapes.prod(axis=1))])

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> np.ndarray:
        image = self.pixels[self.starts[index] : self.starts[index + 1]].reshape(self.shapes[index])
        image.flags.writeable = False
        return image


class RecentImages:
    """The ``num`` pictures decoded last: neighbours in a batch show one another. A matter of speed alone."""

    def __init__(self, num: int):
        self.num, self.images = num, OrderedDict()

    def get(self, key: tuple, make: Callable[..., np.ndarray]) -> np.ndarray:
        """The picture of a key, read-only; made by ``make(*key)`` unless it is held."""
        image = self.images.pop(key, None)
        if image is None:
            image = make(*key)
            image.flags.writeable = False
        self.images[key] = image
        if len(self.images) > self.num:
            self.images.popitem(last=False)
        return image


def build_cache(
    kind: str,
    records: Sequence[Record],
    *,
    max_side: int,
    channels: int = 3,
    folder: str | Path = "runs/cache",
    limits: Limits = LIMITS,
) -> ImageCache:
    """Decode all pictures of ``records`` into a cache of a ``kind`` of ``CACHES``, none longer than ``max_side``.

    The size is known before the first picture is read. A cache on disk is found again under a key of the pictures'
    paths, sizes, inodes and times of change, written under another name and renamed when complete; one that is not
    what it should be is made anew.

    Raises:
        ResourceError: it does not fit into memory or onto the disk, or cannot be written.
        UserError: a picture cannot be read, or has another size than its record says.
    """
    sizes = [fit(record.size, (max_side, max_side), upscale=False)[0] for record in records]
    shapes = np.array([(*size, channels) for size in sizes], dtype=np.int64).reshape(-1, 3)
    try:
        return CACHES[kind](records, shapes, Path(folder), limits)
    except OSError as error:
        raise ResourceError(folder, f"cannot keep a cache: {error}") from error


def _in_memory(records, shapes, folder, limits) -> ImageCache:
    _check_room("--cache ram", _num_bytes(shapes), len(records), free_memory(), "memory", "--cache disk")
    cache = ImageCache(np.empty(_num_bytes(shapes), dtype=np.uint8), shapes)
    _fill(cache, records, "memory", limits)
    return cache


def _on_disk(records, shapes, folder, limits) -> ImageCache:
    target = folder / _key(records, shapes) / "images.npy"
    pixels = _map(target, _num_bytes(shapes))
    if pixels is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        _check_room("--cache disk", _num_bytes(shapes), len(records), free, f"disk under {folder}", "another disk")
        part = target.with_name(f"images.{os.getpid()}.part")
        try:
            pixels = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(_num_bytes(shapes),))
            _fill(ImageCache(pixels, shapes), records, str(target), limits)
            pixels.flush()
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        pixels = _map(target, _num_bytes(shapes))
    return ImageCache(pixels, shapes)


def _map(path: Path, num_bytes: int) -> np.ndarray | None:
    """The pixels of a cache file, memory-mapped; None where there is none, or no such array in it."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError) as error:
        print(f"warning: {path}: not a cache of pictures ({error}), made anew", file=sys.stderr)
        return None
    return pixels if pixels.shape == (num_bytes,) and pixels.dtype == np.uint8 else None


CACHES = {"ram": _in_memory, "disk": _on_disk}


def _fill(cache: ImageCache, records, place: str, limits: Limits) -> None:
    """Decode every picture into its place; threads, because decoding and resizing run outside Python's lock."""

    def decode(index: int) -> None:
        record, out = records[index], cache.pixels[cache.starts[index] : cache.starts[index + 1]]
        image = read_image(record.path, int(cache.shapes[index, 2]), limits=limits)
        if image.shape[:2] != tuple(record.size):
            found = f"the picture is {image.shape[1]}x{image.shape[0]}, it was {record.size[1]}x{record.size[0]}"
            raise UserError(record.path, found, "it changed while the data set was read: start again")
        resize(image, out.reshape(cache.shapes[index]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(decode, range(len(records)))
        title = f"caching pictures, {_gigabytes(len(cache.pixels))} in {place}"
        for _ in tqdm(done, total=len(records), desc=title, disable=None, leave=False):
            pass


def _key(records, shapes) -> str:
    """Name of a cache: which pictures, unchanged since when, at which sizes."""
    digest = hashlib.sha256(shapes.tobytes())
    for record in records:
        path = Path(record.path).absolute()
        state = path.stat()
        digest.update(os.fsencode(path) + f"\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ino}\0".encode())
    return digest.hexdigest()[:16]


def _num_bytes(shapes: np.ndarray) -> int:
    return int(shapes.prod(axis=1).sum())


def _check_room(where: str, needed: int, num: int, free: int, place: str, way_out: str) -> None:
    if needed > free * HEADROOM:
        message = (
            f"{num} pictures need {_gigabytes(needed)}, {_gigabytes(free)} of {place} are free, "
            f"of which a cache may take {HEADROOM:.0%}"
        )
        raise ResourceError(where, message, f"use {way_out}, a smaller --img-size or no cache")


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"


def free_memory() -> int:
    """Bytes of memory that can still be taken, also inside a container with a limit."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # all there is, where the system does not say more
    table = Path("/proc/meminfo")
    if table.exists():
        rows = dict(line.split(":") for line in table.read_text().splitlines())
        free = int(rows["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free

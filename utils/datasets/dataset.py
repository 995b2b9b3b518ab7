"""Record -> Sample."""

import os
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from utils.datasets.augment import Augment, flip, hsv, mixup, mosaic, random_perspective
from utils.datasets.cache import ImageCache, RecentImages
from utils.datasets.images import ImageError, read_image
from utils.datasets.letterbox import letterbox, reduced_to
from utils.datasets.limits import LIMITS, Limits
from utils.datasets.loader import NEIGHBOURS, SAMPLE, Draw, generator
from utils.datasets.quarantine import Quarantine
from utils.structures import ImageInfo, Letterbox, Outlines, Record, Sample

WHOLE = Letterbox()  # of a picture that is as it was


class DetectionDataset(Dataset):
    """Pictures and boxes at the size that a ``Draw`` asks for: letterboxed, or augmented for training.

    A sample is a function of (seed, draw) and nothing else: not of the worker, the order or what was made before.
    Records are held as a few flat arrays: reading a Python object writes its reference count, and worker processes
    would copy the whole list, page by page, by looking at it.

    Args:
        records: annotated pictures.
        channels: of the network: 3 (RGB) or 1 (grey).
        augment: None for evaluation: the picture as it is, with its way back in ``info.letterbox``.
        seed: of all chance.
        cache: decoded pictures (``build_cache``), read instead of the files.
        stretch: fill the size without keeping the aspect (Darknet without letter_box=1).
        epochs: of the whole run; its last ``augment.close_mosaic`` epochs go without mosaic and mixup.
        limits: which pictures are taken, and how many may become unreadable.

    A picture that cannot be read any more is noted in ``quarantine``. In training another one takes its place, the same
    each time; an evaluation goes without it, and its sample is None.

    Raises:
        QuarantineError: from ``dataset[draw]``: too many became unreadable.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        channels: int = 3,
        augment: Augment | None = None,
        seed: int = 0,
        cache: ImageCache | None = None,
        stretch: bool = False,
        epochs: int | None = None,
        limits: Limits = LIMITS,
    ):
        assert cache is None or len(cache) == len(records)
        self.channels, self.augment, self.seed, self.cache, self.stretch = channels, augment, seed, cache, stretch
        self.limits, self.quarantine = limits, Quarantine(len(records), seed=seed, max_bad=limits.max_bad)
        self._recent = RecentImages(NEIGHBOURS)
        self._canvas = np.empty(0, np.uint8)  # one for all samples: what was written last is still at hand
        self.open_epochs = np.inf if epochs is None or augment is None else epochs - augment.close_mosaic
        self.sizes = np.array([record.size for record in records], dtype=np.int64).reshape(-1, 2)
        self._paths = np.array([os.fsencode(record.path) for record in records], dtype=np.bytes_)
        self._starts = np.cumsum([0, *(len(record.labels) for record in records)])
        self._boxes = np.concatenate([np.zeros((0, 4), np.float32), *(record.boxes for record in records)])
        self._labels = np.concatenate([np.zeros(0, np.int64), *(record.labels for record in records)])
        self._ignore = np.concatenate([np.zeros(0, bool), *(record.ignore for record in records)])
        outlines = [record.outlines for record in records if record.outlines is not None]
        assert len(outlines) in (0, len(records)), "outlines for all pictures or for none"
        self._outlines = Outlines.cat(outlines) if outlines else None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, draw: Draw) -> Sample | None:
        return self.make(draw, np.empty((*draw.size, self.channels), np.uint8))

    def make(self, draw: Draw, out: np.ndarray) -> Sample | None:
        """``dataset[draw]`` with its pixels in ``out``, uint8 [H, W, C]: its place in a batch."""
        if self.augment is None:
            try:
                return self._plain(draw, out)
            except ImageError as error:
                self.quarantine.add(draw.index, error)
                return None
        if self._canvas.shape != out.shape:
            self._canvas = np.empty_like(out)
        rng = generator(self.seed, SAMPLE, draw.epoch, draw.position)
        sample = self._view(draw, draw.index, rng, self._canvas)
        if draw.epoch < self.open_epochs and rng.random() < self.augment.mixup:
            (other,) = _partners(draw, draw.index, 1, rng)
            sample = mixup(sample, self._view(draw, other, rng, np.empty_like(out)), rng, self._canvas)
        return flip(hsv(sample, self.augment, rng, out), self.augment, rng, out)

    def path(self, index: int) -> str:
        """The file of a picture."""
        return os.fsdecode(self._paths[index])

    def load(self, index: int, max_side: int | None = None) -> Sample:
        """The picture as it is read, with its boxes in its pixels (a cached one may be smaller than the original).

        With ``max_side`` it is reduced to that, and remembered: whoever loads it soon again shares its pixels.

        Raises:
            ImageError: it cannot be read, or is not the one it was.
        """
        path, (height, width) = self.path(index), self.sizes[index].tolist()
        if self.cache is not None:
            image = self.cache[index]
        elif max_side is None:
            image = self._read(index)
        else:
            image = self._recent.get((index, max_side), self._read_reduced)
        start, stop = self._starts[index : index + 2].tolist()
        rows, boxes = slice(start, stop), self._boxes[start:stop]
        outlines = None if self._outlines is None else self._outlines.between(start, stop)
        reduced = WHOLE
        if image.shape[:2] != (height, width):
            reduced = Letterbox(scale=(image.shape[1] / width, image.shape[0] / height))
            boxes = reduced.apply(boxes)
            outlines = None if outlines is None else outlines.moved(reduced.apply(outlines.corners))
        info = ImageInfo(id=index, path=path, size=(height, width), letterbox=reduced)
        labels, ignore = self._labels[rows], self._ignore[rows]
        return Sample(image=image, boxes=boxes, labels=labels, ignore=ignore, info=info, outlines=outlines)

    def _plain(self, draw: Draw, out: np.ndarray) -> Sample:
        sample = self.load(draw.index)
        image, placed = letterbox(sample.image, draw.size, stretch=self.stretch, out=out)
        reduced = sample.info.letterbox.scale
        whole = Letterbox(scale=(placed.scale[0] * reduced[0], placed.scale[1] * reduced[1]), pad=placed.pad)
        info = ImageInfo(id=draw.index, path=sample.info.path, size=sample.info.size, letterbox=whole)
        outlines = sample.outlines_after(placed.apply)
        return sample.replace(image=image, boxes=placed.apply(sample.boxes), info=info, outlines=outlines)

    def _view(self, draw: Draw, index: int, rng, out: np.ndarray) -> Sample:
        """One augmented sample before colour and mirroring: a mosaic around a picture, or the picture alone."""
        max_side = max(draw.size)  # as in a cache, so that a cache changes nothing
        if draw.epoch < self.open_epochs and rng.random() < self.augment.mosaic:
            samples = [self._load_or_replace(number, max_side) for number in (index, *_partners(draw, index, 3, rng))]
            return mosaic(samples, draw.size, self.augment, rng, stretch=self.stretch, out=out)
        sample = self._load_or_replace(index, max_side)
        return random_perspective(sample, draw.size, self.augment, rng, stretch=self.stretch, out=out)

    def _load_or_replace(self, index: int, max_side: int) -> Sample:
        while True:
            chosen = self.quarantine.substitute(index)  # of the first one: which others are known to be bad is chance
            try:
                return self.load(chosen, max_side)
            except ImageError as error:
                self.quarantine.add(chosen, error)

    def _read(self, index: int) -> np.ndarray:
        image, (height, width) = read_image(self.path(index), self.channels, limits=self.limits), self.sizes[index]
        if image.shape[:2] != (height, width):
            found = f"{image.shape[1]} x {image.shape[0]}, it was {width} x {height} when the data set was read"
            raise ImageError(self.path(index), found, "its boxes may be wrong now")
        return image

    def _read_reduced(self, index: int, max_side: int) -> np.ndarray:
        return reduced_to(self._read(index), max_side)


def _partners(draw: Draw, index: int, num: int, rng) -> list[int]:
    """Neighbours of a draw other than ``index``, none twice while there are enough; without any, itself."""
    others = [neighbour for neighbour in draw.neighbours if neighbour != index] or [index]
    order = rng.permutation(len(others)).tolist()
    return [others[order[row % len(order)]] for row in range(num)]

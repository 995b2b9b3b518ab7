"""Which sample when, and samples -> batches.

A sampler hands out ``Draw``s: everything that a sample depends on. So a sample is the same whichever worker makes it,
however far ahead, and a run that resumes in the middle of an epoch continues with exactly the batches that were left.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.datasets.workers import Loader
from utils.outlines import fill_boxes
from utils.structures import Batch, Sample, Targets

ORDER, SIZES, SAMPLE = range(3)  # independent streams of chance under one seed
NEIGHBOURS = 16  # pictures that are shown with one another: a batch of so many decodes each of them once


class Draw(NamedTuple):
    """One sample to make."""

    epoch: int
    position: int  # place in the epoch's order, over all ranks; with the epoch and the seed it decides all chance
    index: int  # which record
    size: tuple[int, int]  # H, W
    neighbours: tuple[int, ...] = ()  # records that may be shown with this one, itself among them


def generator(*key: int) -> np.random.Generator:
    """The stream of chance of a key of non-negative integers, e.g. (seed, SAMPLE, epoch, position)."""
    return np.random.Generator(np.random.Philox(key))


# ---------------------------------------------------------------------------------------------- samplers


class TrainSampler(Sampler):
    """Batches of an epoch: a seeded permutation of all pictures, dealt to the ranks.

    A global batch is ``batch_size * world`` places of the order, of which each rank takes its own ``batch_size``: two
    ranks see what one rank of doubled batch size sees. The order is lengthened to a multiple of ``world`` from its own
    beginning, so that all ranks always have equally many equally large batches. The last batch of an epoch may be
    smaller; nothing is dropped, and fewer pictures than a batch still train.

    Partners of a mosaic are a picture's neighbours in the order: NEIGHBOURS places in a row, whatever the batch size,
    the ranks and the workers are. So a batch needs hardly more pictures than it has samples, and a worker decodes
    them once (as ultralytics does with a buffer of the pictures read last, which is another one in every worker).

    Args:
        num: pictures.
        batch_size: samples of a batch on one rank.
        size: (H, W) of the samples.
        multi_scale: each batch is this much smaller or larger, drawn between the two, in multiples of ``stride``.
        weights: [num], how often a picture is drawn relative to others (``balance_weights``). An epoch keeps its
            length; each picture comes as often as its share says, rounded up or down by chance.
        image_sizes: [num, 2] heights and widths of the pictures: given, batches are rectangular: pictures of like
            aspect share a batch, as large as they need (``rect_size``), and batches come in random order.
        rank, world: this process and how many there are.
        stride: the network's largest stride.
    """

    def __init__(
        self,
        num: int,
        batch_size: int,
        *,
        size: tuple[int, int],
        seed: int = 0,
        multi_scale: tuple[float, float] = (1.0, 1.0),
        weights: Sequence[float] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        rank: int = 0,
        world: int = 1,
        stride: int = 32,
    ):
        assert 0 <= rank < world and batch_size > 0
        self.num, self.batch_size, self.size, self.seed = num, batch_size, tuple(size), seed
        self.multi_scale, self.rank, self.world, self.stride = tuple(multi_scale), rank, world, stride
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        self.image_sizes = None if image_sizes is None else np.asarray(image_sizes)
        self.epoch, self.start = 0, 0

    @property
    def largest_batch(self) -> int:
        """Pixels of the largest batch that can come; a side may be rounded up to the stride, twice."""
        height, width = (math.ceil(side * self.multi_scale[1]) + 2 * self.stride for side in self.size)
        return self.batch_size * height * width

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The epoch that comes next, and its first batch to hand out (resume within an epoch)."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches of a whole epoch on one rank, wherever this one starts."""
        return -(-self.num // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[Draw]]:
        order, block = self._order(), self.batch_size * self.world
        numbers = np.arange(len(self))
        if self.image_sizes is not None:
            numbers = generator(self.seed, ORDER, self.epoch, 1).permutation(numbers)
        for place in range(self.start, len(self)):
            indices = order[numbers[place] * block :][:block]
            share = len(indices) // self.world
            first = self.rank * share
            position, size = int(numbers[place]) * block + first, self._size(place, indices)
            mine = enumerate(indices[first : first + share].tolist(), start=position)
            yield [Draw(self.epoch, number, index, size, _neighbours(order, number)) for number, index in mine]

    def _order(self) -> np.ndarray:
        """Which picture at which position, over all ranks."""
        rng = generator(self.seed, ORDER, self.epoch, 0)
        order = rng.permutation(self.num)
        if self.weights is not None:  # systematic sampling: every count is its expectation rounded up or down
            shares = np.cumsum(self.weights[order])
            order = order[np.searchsorted(shares / shares[-1] * self.num, np.arange(self.num) + rng.random())]
            order = rng.permutation(order)
        order = np.resize(order, -(-self.num // self.world) * self.world)
        if self.image_sizes is not None:
            shapes = [rect_size(self.image_sizes[[index]], self.size, self.stride) for index in order]
            order = order[np.argsort([height / width for height, width in shapes], kind="stable")]
        return order

    def _size(self, place: int, indices: np.ndarray) -> tuple[int, int]:
        """(H, W) of the batch at a place: the same on all ranks."""
        size = self.size
        if self.image_sizes is not None:
            size = rect_size(self.image_sizes[indices], size, self.stride)
        low, high = self.multi_scale
        if low == high == 1:
            return size
        factor = generator(self.seed, SIZES, self.epoch, place).uniform(low, high)
        return tuple(max(1, round(side * factor / self.stride)) * self.stride for side in size)


def _neighbours(order: np.ndarray, position: int) -> tuple[int, ...]:
    """The NEIGHBOURS records around a place of the order; the last ones of an order have as many."""
    first = max(0, min(position // NEIGHBOURS * NEIGHBOURS, len(order) - NEIGHBOURS))
    return tuple(order[first : first + NEIGHBOURS].tolist())


class EvalSampler(Sampler):
    """Batches that show every picture exactly once, in a fixed order.

    With ``rect`` pictures are sorted by aspect and a batch is as large as its pictures need (``rect_size``); without,
    every batch has the given size and the order is that of the records. Ranks take whole batches in turn; one may have
    a batch more than another.
    """

    def __init__(
        self,
        image_sizes: Sequence[tuple[int, int]],
        batch_size: int,
        size: tuple[int, int],
        *,
        rect: bool = True,
        stride: int = 32,
        rank: int = 0,
        world: int = 1,
    ):
        image_sizes, order = np.asarray(image_sizes).reshape(-1, 2), np.arange(len(image_sizes))
        if rect:
            order = np.argsort(image_sizes[:, 0] / image_sizes[:, 1], kind="stable")
        self.batches = []
        for first in range(rank * batch_size, len(order), world * batch_size):
            indices = order[first : first + batch_size]
            batch_shape = rect_size(image_sizes[indices], size, stride) if rect else tuple(size)
            self.batches.append(
                [Draw(0, first + row, index, batch_shape) for row, index in enumerate(indices.tolist())]
            )

    @property
    def largest_batch(self) -> int:
        """Pixels of the largest batch."""
        return max((len(batch) * batch[0].size[0] * batch[0].size[1] for batch in self.batches), default=0)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        return iter(self.batches)


def rect_size(image_sizes: np.ndarray, size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(H, W) that pictures of sizes [n, 2] need, each fitted into ``size``, rounded up to multiples of ``stride``."""
    fitted = image_sizes * (np.asarray(size) / image_sizes).min(axis=1, keepdims=True)
    # a millionth less: a side that fits exactly must not be rounded up by its last float digit
    return tuple(int(side) * stride for side in np.ceil(fitted.max(axis=0) / stride - 1e-6))


def balance_weights(records, num_classes: int) -> np.ndarray:
    """[len(records)] weights that show pictures of rare classes more often.

    A picture counts sqrt(most frequent class / its own rarest class), frequencies in pictures: the repeat factor of
    LVIS (arXiv 1908.03195, appendix B.2) with the most frequent class as the threshold. Without objects it counts 1.
    """
    classes = [np.unique(record.labels[~record.ignore]) for record in records]
    frequency = np.bincount(np.concatenate([*classes, np.zeros(0, np.int64)]), minlength=num_classes)
    repeat = np.sqrt(frequency.max(initial=1) / np.maximum(frequency, 1))
    return np.array([repeat[labels].max(initial=1.0) for labels in classes])


# ---------------------------------------------------------------------------------------------- batches


def make_batch(dataset, draws: Sequence[Draw], allocate: Callable = np.empty) -> Batch | None:
    """The samples of some draws of one size, each made in its place of the batch: ``dataset.make(draw, out)``.

    Pictures that an evaluation goes without are left out; None where nothing is left. ``allocate(shape, dtype)`` says
    where the pictures lie.
    """
    images = allocate((len(draws), *draws[0].size, dataset.channels), np.uint8)
    samples = []
    for draw in draws:
        sample = dataset.make(draw, images[len(samples)])
        if sample is not None:
            samples.append(sample)
    return collate(samples, images[: len(samples)]) if samples else None


def collate(samples: Sequence[Sample], images: np.ndarray | None = None) -> Batch:
    """Samples of one size -> Batch. As channels-last memory pixels are already [B, C, H, W].

    ``images``: uint8 [B, H, W, C] where the samples' pictures lie side by side; copied there without.
    """
    images = np.stack([sample.image for sample in samples]) if images is None else images
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    number = np.repeat(np.arange(len(samples)), [len(sample.labels) for sample in samples])
    boxes, labels, ignore = (
        np.concatenate([getattr(sample, name) for sample in samples]) for name in ("boxes", "labels", "ignore")
    )
    masks = None
    if samples[0].outlines is not None:
        filled = [fill_boxes(sample.outlines[~sample.ignore], sample.boxes[~sample.ignore]) for sample in samples]
        masks = torch.from_numpy(np.concatenate(filled))
    targets = Targets.of(
        image=torch.from_numpy(number[~ignore]),
        labels=torch.from_numpy(labels[~ignore]),
        boxes=torch.from_numpy(boxes[~ignore]),
        ignore_image=torch.from_numpy(number[ignore]),
        ignore_boxes=torch.from_numpy(boxes[ignore]),
        masks=masks,
    )
    return Batch(images=images, targets=targets, infos=tuple(sample.info for sample in samples))


def build_loader(dataset, sampler: Sampler, *, workers: int = 0, pin_memory: bool = False) -> Loader:
    """Loader of ``Batch`` over the draws of a batch sampler."""
    batch_bytes = sampler.largest_batch * dataset.channels
    return Loader(dataset, sampler, make_batch, workers=workers, pin_memory=pin_memory, batch_bytes=batch_bytes)

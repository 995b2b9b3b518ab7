"""What training and validation look at: both splits of a data set, and their loaders."""

from pathlib import Path
from typing import NamedTuple

from utils.datasets.augment import Augment
from utils.datasets.cache import build_cache
from utils.datasets.dataset import DetectionDataset
from utils.datasets.limits import LIMITS, Limits
from utils.datasets.loader import EvalSampler, TrainSampler, balance_weights, build_loader
from utils.datasets.overlap import shared_pictures
from utils.datasets.quarantine import refuse_bad
from utils.datasets.records import Problem, read_dataset
from utils.datasets.workers import Loader, check_room
from utils.distributed import is_main, main_first, rank, world_size
from utils.errors import UserError, printable
from utils.structures import Record


class Splits(NamedTuple):
    """A data set to learn from and to be measured on."""

    names: list[str]
    train: list[Record]
    val: list[Record]
    problems: tuple[Problem, ...] = ()  # what is not as it should be in either
    fingerprint: str = ""  # of both: a run that continues must see the same
    limits: Limits = LIMITS


def read_splits(path: str | Path, *, single_cls: bool = False, masks: bool = False, limits: Limits = LIMITS) -> Splits:
    """Both splits; says what is in them and what is wrong with them.

    Args:
        single_cls: all classes are one.
        masks: with the outlines of the objects.
        limits: which pictures are taken, and how many may be bad.

    Raises:
        UserError: as ``read_dataset``; splits with other classes; with no tolerance, a picture in both.
        QuarantineError: too much of a split is bad.
    """
    splits = [read_dataset(path, split, masks=masks, limits=limits) for split in ("train", "val")]
    if is_main():
        print("\n".join(split.summary() for split in splits))
    train, val = splits
    if train.names != val.names:
        found = f"the training split has the classes {', '.join(train.names)}, the other one {', '.join(val.names)}"
        raise UserError(path, found, "write them into a data yaml: names: [...]")
    for split in splits:
        refuse_bad(split, limits.max_bad)
    _check_overlap(path, train.records, val.records, limits)
    if single_cls:
        train, val = train.as_single_class(), val.as_single_class()
    return Splits(
        names=list(train.names),
        train=train.records,
        val=val.records,
        problems=(*train.problems, *val.problems),
        fingerprint=f"{train.fingerprint()}{val.fingerprint()}",
        limits=limits,
    )


def _check_overlap(path: str | Path, train: list[Record], val: list[Record], limits: Limits) -> None:
    """Say how many pictures are in both splits; an error where nothing bad is allowed."""
    shared = shared_pictures(train, val)
    if not shared:
        return
    found = f"{len(shared)} training pictures are validation pictures, too, such as {printable(shared[0][0])}"
    if limits.max_bad == 0:
        raise UserError(path, found, "what is measured on them says nothing")
    if is_main():
        print(f"warning: {path}: {found}")


def build_loaders(
    data: Splits,
    augment: Augment,
    *,
    batch_size: int,
    size: tuple[int, int],
    stride: int,
    channels: int,
    stretch: bool,
    rect: bool,
    balance: bool,
    cache: str | None,
    seed: int,
    epochs: int,
    workers: int,
    pin_memory: bool,
) -> tuple[Loader, Loader]:
    """(training, validation): augmented batches dealt to all processes; plain ones in full for the first process.

    Args:
        batch_size: images over all processes.
        size, stride, channels: of the network's input, (H, W).
        stretch: pictures fill the input without keeping their aspect; validation batches are rectangular otherwise.
        rect: pictures of like shape share a training batch.
        balance: pictures with rare classes come more often.
        cache: keep decoded pictures in ``ram`` or on ``disk``.
        workers: loading processes.

    Raises:
        UserError: batches that cannot be dealt to the processes, pictures that cannot be cached.
        ResourceError: no room for what ``workers`` make.
    """
    share, rest = divmod(batch_size, world_size())
    if share < 1 or rest:
        raise UserError(f"--batch-size {batch_size}", f"not a positive multiple of {world_size()} processes")
    largest = size[0] * size[1] * max(1.0, *augment.multi_scale) ** 2
    check_room(workers, int(share * channels * largest))
    caches = [None, None]
    if cache:
        with main_first():
            caches = [
                build_cache(cache, split, max_side=max(size), channels=channels, limits=data.limits)
                for split in (data.train, data.val)
            ]
    common = {"channels": channels, "stretch": stretch, "limits": data.limits}
    train = DetectionDataset(data.train, augment=augment, seed=seed, cache=caches[0], epochs=epochs, **common)
    val = DetectionDataset(data.val, cache=caches[1], **common)
    sampler = TrainSampler(
        len(train),
        share,
        size=size,
        seed=seed,
        multi_scale=augment.multi_scale,
        weights=balance_weights(data.train, len(data.names)) if balance else None,
        image_sizes=train.sizes if rect else None,
        rank=rank(),
        world=world_size(),
        stride=stride,
    )
    options = {"workers": workers, "pin_memory": pin_memory}
    eval_sampler = EvalSampler(val.sizes, share, size, rect=not stretch, stride=stride)
    return build_loader(train, sampler, **options), build_loader(val, eval_sampler, **options)

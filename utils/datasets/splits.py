"""What training and validation look at: both splits of a data set, and their loaders."""

from pathlib import Path
from typing import NamedTuple

from torch.utils.data import DataLoader

from utils.datasets.augment import Augment
from utils.datasets.cache import build_cache
from utils.datasets.dataset import DetectionDataset
from utils.datasets.loader import EvalSampler, TrainSampler, balance_weights, build_loader
from utils.datasets.records import read_dataset
from utils.distributed import is_main, main_first, rank, world_size
from utils.errors import UserError
from utils.structures import Record


class Splits(NamedTuple):
    """A data set to learn from and to be measured on."""

    names: list[str]
    train: list[Record]
    val: list[Record]


def read_splits(path: str | Path, *, single_cls: bool = False, masks: bool = False) -> Splits:
    """Both splits; says what is in them and what is wrong with them.

    Args:
        single_cls: all classes are one.
        masks: with the outlines of the objects.

    Raises:
        UserError: as ``read_dataset``.
    """
    splits = [read_dataset(path, split, masks=masks) for split in ("train", "val")]
    if is_main():
        print("\n".join(split.summary() for split in splits))
    if single_cls:
        splits = [split.as_single_class() for split in splits]
    return Splits(list(splits[0].names), *(split.records for split in splits))


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
) -> tuple[DataLoader, DataLoader]:
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
    """
    share, rest = divmod(batch_size, world_size())
    if share < 1 or rest:
        raise UserError(f"--batch-size {batch_size}", f"not a positive multiple of {world_size()} processes")
    caches = [None, None]
    if cache:
        with main_first():
            caches = [
                build_cache(cache, split, max_side=max(size), channels=channels) for split in (data.train, data.val)
            ]
    common = {"channels": channels, "stretch": stretch}
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

"""One augmented training sample: mosaic of four, scale and shift, colour, mirroring, until it lies in a batch.

python -m benchmarks.input
python -m benchmarks.input --quick                  # does it run?

640 x 480 JPEGs of about 200 KB, the size of COCO's, made of noise in octaves from a seed; ten boxes each. ``scale``
0.5, ``translate`` 0.1, ``fliplr`` 0.5, ``hsv`` 0.015, 0.7, 0.4, nothing turns: ultralytics' default recipe, and the
same here.

The peer is ultralytics' own ``YOLODataset`` with its transforms and its ``collate_fn``, in batches of 16 like ours. It
keeps decoded pictures in a buffer, 128 of them at this batch size, and draws a mosaic's partners from there: one
decode per sample, which also is what ours does with a sample's neighbours in the order of the epoch. 512 pictures are
read in that order, so that the buffer holds what it would hold of a large data set. With ``cache="ram"`` both read
their own cache of decoded pictures at the training size; the goal of the cache is against the peer's JPEGs.

CPU time of one thread, loading alone: no process hands anything over. Freed memory is kept as in train.py, for the
peer too. The floor is decoding each picture once.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.paired import peer, take_turns, verdict
from utils.allocator import keep_freed_memory
from utils.datasets.augment import Augment
from utils.datasets.cache import build_cache
from utils.datasets.dataset import DetectionDataset
from utils.datasets.images import read_image
from utils.datasets.loader import TrainSampler, make_batch
from utils.errors import run_main
from utils.structures import Record

HEIGHT, WIDTH, NUM_BOXES, QUALITY, BATCH = 480, 640, 10, 90, 16
AUGMENT = Augment(hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, translate=0.1, scale=0.5, fliplr=0.5, mosaic=1.0)
GOALS = {"JPEG": 2.2, "RAM": 6.0}
PEER, FLOOR = "ultralytics", "decoding alone"


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.input", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=4, help="batches of 16 per round")
    parser.add_argument("--sizes", type=int, nargs="+", default=(640, 416))
    parser.add_argument("--quick", action="store_true", help="one batch, one round, at 64")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    num = 512
    if args.quick:
        args.rounds, args.batches, args.sizes, num = 1, 1, (64,), 32
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    keep_freed_memory()
    ultralytics = peer("ultralytics.data.dataset", "ultralytics")
    with tempfile.TemporaryDirectory() as folder:
        records = write_pictures(Path(folder), num)
        for size in args.sizes:
            contenders = {FLOOR: forever(decode(records))}
            contenders |= {f"matchbox {kind}": forever(ours(records, size, kind)) for kind in GOALS}
            if ultralytics:
                contenders |= {
                    f"{PEER} {kind}": forever(theirs(ultralytics, folder, size, kind, num)) for kind in GOALS
                }
            # warm up until the buffers are full
            warmup = 1 if args.quick else -(-160 // (args.batches * BATCH))
            turns = {name: lambda run=run: run(args.batches) for name, run in contenders.items()}
            rounds = take_turns(turns, rounds=args.rounds, warmup=warmup, units=args.batches * BATCH)
            base = f"{PEER} JPEG" if ultralytics else FLOOR
            print(f"\nsamples of {size} x {size}\n{rounds.table(base)}")
            if ultralytics and not args.quick:
                for kind, goal in GOALS.items():
                    print(verdict(f"input {size}", f"matchbox {kind}", base, rounds, goal, torch.device("cpu")))


def write_pictures(folder: Path, num: int, distinct: int = 32) -> list[Record]:
    """``images`` and ``labels`` of a YOLO data set, and the same as records. Some contents come several times."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    contents = [cv2.imencode(".jpg", texture(rng), (cv2.IMWRITE_JPEG_QUALITY, QUALITY))[1] for _ in range(distinct)]
    print(f"{num} JPEGs of {np.mean([len(content) for content in contents]) / 1e3:.0f} KB")
    records = []
    for number in range(num):
        path = folder / f"images/{number:04d}.jpg"
        path.write_bytes(contents[number % distinct].tobytes())
        centers, sides = rng.uniform(0.2, 0.8, (NUM_BOXES, 2)), rng.uniform(0.05, 0.4, (NUM_BOXES, 2))
        labels = rng.integers(0, 80, NUM_BOXES)
        rows = [f"{label} {x} {y} {w} {h}" for label, (x, y), (w, h) in zip(labels, centers, sides)]
        (folder / f"labels/{number:04d}.txt").write_text("\n".join(rows), encoding="utf-8")
        boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1) * (WIDTH, HEIGHT, WIDTH, HEIGHT)
        nothing = np.zeros(NUM_BOXES, bool)
        records.append(
            Record(
                path=str(path),
                size=(HEIGHT, WIDTH),
                boxes=boxes.astype(np.float32),
                labels=labels,
                ignore=nothing,
                crowd=nothing,
                area=(sides * (WIDTH, HEIGHT)).prod(1).astype(np.float32),
            )
        )
    return records


def texture(rng) -> np.ndarray:
    """Noise of every scale, the finer the weaker, as in a photograph."""
    image = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for side in (4, 8, 16, 32, 64, 128, 256, 512):
        noise = rng.normal(0, 46 / side**0.05, (side * 3 // 4, side, 3)).astype(np.float32)
        image += cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
    return np.clip(image, 0, 255).astype(np.uint8)


# ---- contenders: an endless stream of batches each -------------------------------------------------------------------


def forever(batches: Iterator) -> Callable[[int], None]:
    """Takes the next so many batches."""

    def run(num: int) -> None:
        for _ in islice(batches, num):
            pass

    return run


def ours(records: list[Record], size: int, kind: str) -> Iterator:
    cache = build_cache("ram", records, max_side=size) if kind == "RAM" else None
    dataset = DetectionDataset(records, augment=AUGMENT, cache=cache)
    sampler = TrainSampler(len(records), BATCH, size=(size, size))
    for epoch in range(1_000_000):
        sampler.set_epoch(epoch)
        for draws in sampler:
            yield make_batch(dataset, draws)


def theirs(ultralytics, folder: str, size: int, kind: str, num: int) -> Iterator:
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import LOGGER

    LOGGER.setLevel(logging.ERROR)
    keys = ("hsv_h", "hsv_s", "hsv_v", "translate", "scale", "fliplr", "mosaic")
    hyp = get_cfg(overrides={"imgsz": size, "close_mosaic": 0, **{key: getattr(AUGMENT, key) for key in keys}})
    names = {number: str(number) for number in range(80)}
    dataset = ultralytics.YOLODataset(
        img_path=f"{folder}/images",
        imgsz=size,
        batch_size=BATCH,
        augment=True,
        hyp=hyp,
        cache="ram" if kind == "RAM" else None,
        data={"names": names, "nc": 80, "channels": 3},
        task="detect",
    )
    rng = np.random.default_rng(0)
    order = cycle(rng.permutation(num).tolist())
    while True:
        yield dataset.collate_fn([dataset[index] for index in islice(order, BATCH)])


def decode(records: list[Record]) -> Iterator:
    paths = cycle([record.path for record in records])
    while True:
        yield [read_image(path) for path in islice(paths, BATCH)]


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))

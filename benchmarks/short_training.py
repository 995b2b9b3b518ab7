"""One short training and what came of it; the same for every benchmark, so that only what is compared differs."""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from models.assigners import build_targets
from models.darknet import Darknet
from models.losses import Criterion, TrainStep
from models.predictor import Predictor
from utils.datasets.augment import Augment
from utils.datasets.splits import Splits, build_loaders, read_splits
from utils.evaluate import evaluate
from utils.optim import Optim
from utils.run import select_precision
from utils.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
TIMED_BATCHES = 5


class Budget(NamedTuple):
    """How much a training may see."""

    epochs: int
    batch_size: int = 16
    pictures: int | None = None  # of each split; None: all


QUICK = Budget(epochs=1, batch_size=8, pictures=16)


def parse_args(argv, *, name: str, description: str) -> argparse.Namespace:
    """The command line of a comparison; ``budget`` is made of it."""
    parser = argparse.ArgumentParser(
        prog=f"benchmarks.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(ROOT / "data/shapes.yaml"), help="data.yaml, .data, COCO .json or folder")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="", help="cpu, 0, ... (default: the first GPU, else the CPU)")
    parser.add_argument("--journal", default=str(ROOT / f"runs/bench/{name}.jsonl"), help="where results are kept")
    parser.add_argument("--quick", action="store_true", help="one epoch of 16 pictures, one seed: does it run?")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/README.md")
    args = parser.parse_args(argv)
    args.budget = QUICK if args.quick else Budget(epochs=args.epochs)
    args.seeds = args.seeds[:1] if args.quick else args.seeds
    return args


def read_data(path: str, budget: Budget) -> Splits:
    """Both splits, cut to the budget."""
    data = read_splits(path)
    return Splits(data.names, data.train[: budget.pictures], data.val[: budget.pictures])


def data_name(path: str) -> str:
    """What a data set is called in a table: no folder of this machine."""
    path = Path(path)
    return path.parent.name if path.stem == "data" else path.stem


def title(what: str, args: argparse.Namespace, data: Splits) -> str:
    """What a table shows."""
    budget = f"{len(data.train)} pictures, {args.budget.epochs} epochs"
    return f"{what} on {data_name(args.data)}, {budget}, {len(args.seeds)} seeds: median (min-max)"


def command(name: str, args: argparse.Namespace) -> str:
    """What makes the table again, without folders of this machine."""
    return f"python -m benchmarks.{name} --data data/{data_name(args.data)}.yaml --epochs {args.budget.epochs}"


def train(
    model: Darknet, criterion: Criterion, data: Splits, *, optim: Optim, augment: Augment, budget: Budget, seed: int
) -> dict[str, float]:
    """Train from scratch, measure, and return plain numbers: mAP, seconds, and what `measure_assignment` says.

    The model's device is used; workers are off, so that two benchmarks on two cores do not disturb each other.
    """
    device = next(model.parameters()).device
    precision = select_precision("auto", device)
    loader, val_loader = build_loaders(
        data,
        augment,
        batch_size=budget.batch_size,
        size=model.size,
        stride=model.stride,
        channels=model.channels,
        stretch=False,
        rect=False,
        balance=False,
        cache="ram",
        seed=seed,
        epochs=budget.epochs,
        workers=0,
        pin_memory=False,
    )
    step = TrainStep(model, criterion).to(device, memory_format=torch.channels_last)
    trainer = Trainer(
        step,
        optim=replace(optim, nominal_batch=budget.batch_size),
        device=device,
        precision=precision,
        num_batches=len(loader),
        batch_size=budget.batch_size,
        epochs=budget.epochs,
    )
    start = time.perf_counter()
    for epoch in range(budget.epochs):
        loader.batch_sampler.set_epoch(epoch)
        losses = trainer.train_epoch(loader)
        trainer.end_epoch()
    seconds = time.perf_counter() - start
    predictor = Predictor(trainer.ema.module, conf_thres=0.001, iou_thres=0.6, amp=precision.autocast)
    scalars = evaluate(predictor, val_loader, data.val, data.names, progress=False).scalars()
    numbers = {name: scalars[f"metrics/{name}"] for name in ("mAP50", "mAP50-95")}
    numbers |= {"seconds": seconds, "loss": sum(losses.values()), "precision": precision.name}
    return numbers | measure_assignment(step, loader, precision.autocast)


@torch.no_grad()
def measure_assignment(step: TrainStep, loader, autocast: torch.dtype | None) -> dict[str, float]:
    """What the assigner does with training batches once the network is trained, and how long it takes.

    Returns:
        positives per object; median milliseconds of the forward pass and of the assignment of one batch.
    """
    model, assigner = step.model.eval(), step.criterion.assigner
    device = next(model.parameters()).device
    positives = objects = 0
    forward, assignment = [], []
    for _, batch in zip(range(TIMED_BATCHES), loader):
        batch = batch.to(device)
        images = batch.images.float() / 255
        start = _now(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            outputs = model(images)
        forward.append(_now(device) - start)
        preds = model.decode([output.float() for output in outputs], tuple(images.shape[-2:]))
        start = _now(device)
        rows = build_targets(preds, batch.targets, assigner)
        assignment.append(_now(device) - start)
        positives += int((rows.weight > 0).sum())
        objects += len(batch.targets)
    return {
        "positives": positives / max(objects, 1),
        "forward_ms": 1000 * statistics.median(forward),
        "assign_ms": 1000 * statistics.median(assignment),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

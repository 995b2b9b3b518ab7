"""Training on a GPU: images per second, share of the matrix rate, memory, what waits, and where the time goes.

python -m benchmarks.gpu                                # the first GPU; one line where there is none
python -m benchmarks.gpu --networks yolov3 --batch-size 64 128
python -m benchmarks.gpu --device cpu --quick           # does it run?

A step is the trainer's own: forward in bf16 with channels-last layout, assignment, loss, backward, clipping, fused
optimiser, average. Contenders are the ways in which ``train.py --compile`` lets a network run, on one synthetic uint8
batch that lies on the device; then the best of them fed by the real loader, mosaics and all, from JPEGs of about
200 KB and from their RAM cache.

MFU: three times the forward pass's FLOPs (``LayerSpec.flops``), per second, as a share of the rate at which this
device multiplies two bf16 matrices of 8192 x 8192 in the same run. Memory is the peak above what lay there before the
network was built. *Waits* are device-to-host copies and other synchronisations that CUDA sees in an epoch of so many
steps; the loop itself reads its losses every ten steps.

Goals, on an H200: yolov3 at 416 1500 images/s, yolov3-spp ten times the 122 that its authors publish for a V100.
"""

import argparse
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.input import write_pictures
from benchmarks.journal import table
from benchmarks.paired import Rounds, span, take_turns, verdict
from models.cfg import read_cfg
from models.darknet import Darknet
from models.graph import build_graph
from models.losses import TrainStep, build_criterion
from utils.arguments import count
from utils.boxes import xywh_to_xyxy
from utils.config import read_recipe
from utils.datasets.splits import Splits, build_loaders
from utils.errors import UserError, run_main
from utils.run import select_device, select_precision, set_seed, share_cores
from utils.structures import Batch, Targets
from utils.timing import Waiting
from utils.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"yolov3": 1500.0, "yolov3-spp": 10 * 122.0}  # images/s at 416
RECIPE, GOAL_SIZE, CLASSES, OBJECTS = "yolov3", 416, 80, 8  # objects per picture
MODES = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}  # of torch.compile
ONLY_EAGER = {"eager": None}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["yolov3-tiny", "yolov3", "yolov3-spp"], help="of cfg/")
    parser.add_argument("--batch-size", type=count, nargs="+", default=[64])
    parser.add_argument("--img-size", type=count, default=GOAL_SIZE)
    parser.add_argument("--steps", type=count, default=20, help="per round")
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--pictures", type=count, default=8192, help="of an epoch of the loader")
    parser.add_argument("--device", default="", help="default: the first GPU")
    parser.add_argument("--quick", action="store_true", help="yolov3-tiny at 96, two pictures, one round, uncompiled")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA device")
        return
    device, modes, side = select_device(args.device), MODES, 8192
    if args.quick:
        args.networks, args.batch_size, args.img_size, args.steps, args.rounds = ["yolov3-tiny"], [2], 96, 2, 1
        args.pictures, modes, side = 8, ONLY_EAGER, 256
    set_seed(0)
    rate = matrix_rate(device, side)
    print(f"{select_precision('auto', device).name}, matrix rate {rate / 1e12:.3g} TFLOP/s")
    for name in args.networks:
        for batch_size in args.batch_size:
            compare(name, batch_size, modes, rate, device, args)


def compare(name: str, batch_size: int, modes: dict, rate: float, device, args: argparse.Namespace) -> None:
    """All about one network at one batch size."""
    title, units = f"{name} at {args.img_size}, batches of {batch_size}", args.steps * batch_size
    batch, runs, memory = synthetic(batch_size, args.img_size, device), {}, {}
    for mode, how in modes.items():
        try:
            runs[mode], memory[mode] = ready(name, how, batch, args.steps, device)
        except (RuntimeError, UserError) as error:  # too little memory, no compiler for the compiler
            print(f"{title}: {mode} left out, {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    if "eager" not in runs:
        return
    rounds = take_turns(runs, rounds=args.rounds, units=units, clock=time.perf_counter)
    work = 3 * flops(name, args.img_size)
    rows = [
        (mode, *speed(seconds, work / rate), f"{memory[mode] / 1e9:.2f}") for mode, seconds in rounds.seconds.items()
    ]
    print(f"\n{title}, {work / 1e9:.1f} GFLOP per image\n{table(('step', 'images/s', 'MFU', 'peak GB'), rows)}")
    best = min(runs, key=lambda mode: median(rounds.seconds[mode]))
    if device.type == "cuda":
        print(f"waits in {args.steps} steps, eager: {waits(runs['eager'])}")
    print(table(("largest items, eager", "share"), largest(runs["eager"], device)))
    print(
        table(("loader, " + best, "images/s", "MFU", "waiting"), fed(name, modes[best], batch_size, work / rate, args))
    )
    if name in GOALS and args.img_size == GOAL_SIZE and device.type == "cuda" and not args.quick:
        goal = f"{GOALS[name]:g} images/s"
        against = Rounds(rounds.seconds | {goal: [1 / GOALS[name]] * args.rounds})
        print(verdict(f"gpu {title}", best, goal, against, 1.0, device))


def speed(seconds: list[float], ideal: float) -> tuple[str, str]:
    """(images/s, MFU) of seconds per image; ``ideal`` would be those of matrix products alone."""
    return span([1 / each for each in seconds]), f"{ideal / median(seconds):.1%}"


# ------------------------------------------------------------------------------------------------------------- the step


def teacher(name: str, how: str | None, num_batches: int, batch_size: int, device: torch.device) -> Trainer:
    """A trainer as ``train.py`` makes it; every batch is a step. ``how``: the mode of torch.compile, None without."""
    model, recipe = Darknet(read_cfg(ROOT / f"cfg/{name}.cfg")), read_recipe(RECIPE, [])
    criterion = build_criterion(recipe.assigner, recipe.loss, model.num_classes, RECIPE, model.heads)
    step = TrainStep(model, criterion).to(device).to(memory_format=torch.channels_last)
    if how:
        model.compile(mode=how, dynamic=False)
    return Trainer(
        step,
        optim=replace(recipe.optim, nominal_batch=batch_size, lr0=1e-5),  # one batch again and again: hardly move
        device=device,
        precision=select_precision("auto", device),
        num_batches=num_batches,
        batch_size=batch_size,
        epochs=1_000_000,
    )


def synthetic(batch_size: int, size: int, device: torch.device) -> Batch:
    """Random pictures with random objects, on the device."""
    images = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8)
    image = torch.arange(batch_size).repeat_interleave(OBJECTS)
    side = size * (0.05 + 0.4 * torch.rand(len(image), 2))
    center = side / 2 + torch.rand(len(image), 2) * (size - side)
    targets = Targets.of(image, torch.randint(CLASSES, (len(image),)), xywh_to_xyxy(torch.cat([center, side], dim=1)))
    return Batch(images=images.contiguous(memory_format=torch.channels_last), targets=targets, infos=()).to(device)


def ready(name: str, how: str | None, batch: Batch, steps: int, device: torch.device) -> tuple[Callable, float]:
    """(an epoch of so many steps on one batch, its peak memory in bytes), run once.

    An epoch ends by reading its losses: when it returns, the device is done.
    """
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else float("nan")
    trainer = teacher(name, how, steps, len(batch), device)

    def epoch() -> None:
        trainer.train_epoch(repeat(batch, steps))
        trainer.end_epoch()

    if device.type != "cuda":
        epoch()
        return epoch, before
    torch.cuda.reset_peak_memory_stats(device)
    epoch()
    return epoch, torch.cuda.max_memory_allocated(device) - before


def fed(name: str, how: str | None, batch_size: int, ideal: float, args: argparse.Namespace) -> list[tuple]:
    """Rows: the same with the real loader, from JPEGs and from memory."""
    device, recipe, rows = select_device(args.device), read_recipe(RECIPE, []), []
    with tempfile.TemporaryDirectory() as folder:
        written = write_pictures(Path(folder), min(args.pictures, 512))
        records = (written * -(-args.pictures // len(written)))[: args.pictures]
        for title, cache in {"JPEG": None, "RAM cache": "ram"}.items():
            loader, _ = build_loaders(
                Splits([str(label) for label in range(CLASSES)], records, records[:1]),
                recipe.augment,
                batch_size=batch_size,
                size=(args.img_size, args.img_size),
                stride=32,
                channels=3,
                stretch=False,
                rect=False,
                balance=False,
                cache=cache,
                seed=0,
                epochs=1_000_000,
                workers=share_cores(device, None),
                pin_memory=device.type == "cuda",
            )
            trainer = teacher(name, how, len(loader), batch_size, device)
            shares = []

            def run(number: Iterator[int], trainer=trainer, loader=loader, shares=shares) -> None:
                waiting, start = Waiting(loader), time.perf_counter()
                loader.batch_sampler.set_epoch(next(number))
                trainer.train_epoch(waiting)
                trainer.end_epoch()
                shares.append(waiting.seconds / (time.perf_counter() - start))

            turns = {title: partial(run, iter(range(1_000_000)))}
            rounds = take_turns(turns, rounds=min(args.rounds, 3), units=len(records), clock=time.perf_counter)
            rows.append((title, *speed(rounds.seconds[title], ideal), f"{median(shares[1:]):.1%}"))
    return rows


# --------------------------------------------------------------------------------------------------------- the measures


def matrix_rate(device: torch.device, side: int, repeats: int = 10) -> float:
    """FLOP/s of bf16 matrix products of ``side`` x ``side``: the ceiling that MFU is a share of."""
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)

    def multiply() -> None:
        for _ in range(repeats):
            left @ right
        wait(device)

    seconds = take_turns({"product": multiply}, rounds=5, warmup=2, units=repeats, clock=time.perf_counter)
    return 2 * side**3 / median(seconds.seconds["product"])


def flops(name: str, size: int) -> int:
    """Of one forward pass of one picture."""
    return sum(spec.flops for spec in build_graph(read_cfg(ROOT / f"cfg/{name}.cfg"), width=size, height=size).layers)


def waits(run) -> str:
    """Where the host waited for the device, and how often."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in seen if "called a sync" in str(each.message)]
    return ", ".join(f"{number} at {place}" for place, number in Counter(places).items()) or "none"


def largest(run, device: torch.device, num: int = 5) -> list[tuple[str, str]]:
    """The operations that take most of the device's own time, and their shares."""
    kinds = {"cpu": [ProfilerActivity.CPU], "cuda": [ProfilerActivity.CPU, ProfilerActivity.CUDA]}
    with profile(activities=kinds[device.type], acc_events=True) as profiled:
        run()
        wait(device)
    own = {"cpu": "self_cpu_time_total", "cuda": "self_device_time_total"}[device.type]
    # operations only: the kernels they start are events of their own, and would count twice
    events = [event for event in profiled.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    events.sort(key=lambda event: getattr(event, own), reverse=True)
    total = sum(getattr(event, own) for event in events)
    return [(event.key[:60], f"{getattr(event, own) / total:.1%}") for event in events[:num]]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))

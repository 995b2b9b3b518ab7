"""What a training will take, before it is begun: the batch that fits, time, memory, disk.

Letters: B images of a batch.
"""

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from utils.datasets.workers import Loader
from utils.errors import ResourceError
from utils.evaluate import Predict
from utils.memory import memory_of, peak_of
from utils.outlines import MASK_SIDE
from utils.run import Precision
from utils.structures import Batch, Record, Targets
from utils.timing import Waiting
from utils.trainer import Trainer

STEPS, WARM_UP = 20, 3  # measured, and before them
LONGEST = 120.0  # seconds of measuring, once two steps are done
SHARE = 0.8  # of the memory that an automatic batch may take: augmented batches differ
MORE_STATE = 3  # times the weights: their average and two moments of the optimiser
COPIES = 4  # checkpoints: last, previous, best, and the one being written
RESULTS = 50_000_000  # bytes of curves and pictures


# ------------------------------------------------------------------------------------------------------------ the batch


def trial_batch(
    records: Sequence[Record], num: int, size: tuple[int, int], channels: int, *, mosaic: bool = False
) -> Batch:
    """``num`` pictures of noise with the objects of the fullest records; four of them each, as a mosaic has."""
    fullest = sorted(records, key=lambda record: -len(record.labels))[: 4 * num]
    groups = [np.resize(np.arange(len(fullest)), 4 * num)[row::num][: 4 if mosaic else 1] for row in range(num)]
    scaled = [r.boxes * np.tile(np.divide(size, r.size)[::-1], 2).astype(np.float32) for r in fullest]
    boxes = [np.concatenate([scaled[i] for i in group]) for group in groups]
    labels = [np.concatenate([fullest[i].labels for i in group]) for group in groups]
    count = sum(map(len, labels))
    masked = fullest[0].outlines is not None
    targets = Targets.of(
        torch.from_numpy(np.repeat(np.arange(num), [len(mine) for mine in labels])),
        torch.from_numpy(np.concatenate(labels)),
        torch.from_numpy(np.concatenate(boxes)),
        masks=torch.ones(count, MASK_SIDE, MASK_SIDE, dtype=torch.uint8) if masked else None,
    )
    noise = np.random.default_rng(0).integers(0, 256, (num, channels, *size), dtype=np.uint8)
    return Batch(images=torch.from_numpy(noise), targets=targets, infos=())


def forward_backward(step: nn.Module, batch: Batch, device: torch.device, precision: Precision) -> None:
    """What takes the memory of a step."""
    batch, dtype = batch.to(device), precision.autocast
    step.train()
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            terms = step(batch.images, batch.targets)
        sum(terms.values()).backward()
    finally:
        step.zero_grad(set_to_none=True)


def fitting_batch(
    step: nn.Module, make: Callable[[int], Batch], device: torch.device, precision: Precision, *, most: int
) -> tuple[int, str]:
    """The largest power of two up to ``most`` pictures that takes at most 80 % of the memory, and a line that says so.

    A copy of ``step`` is tried with 2, 4, 8, ... pictures while the next doubling looks as if it would fit.

    Raises:
        ResourceError: not even one picture does.
    """
    memory, tried = memory_of(device), copy.deepcopy(step)
    room, more = SHARE * memory.room(), MORE_STATE * sum(p.nbytes for p in step.parameters())
    peaks: dict[int, int] = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for num in (2**power for power in range(most.bit_length())):
            last = list(peaks.values())[-2:]
            if len(last) == 2 and last[1] + 2 * (last[1] - last[0]) > room:
                break
            peak = peak_of(memory, lambda num=num: forward_backward(tried, make(num), device, precision))
            if peak is None or peak + more > room:
                break
            peaks[num] = peak + more
    if not peaks:
        raise ResourceError("--batch-size auto", f"no picture fits into {room / 1e9:.1f} GB", "a smaller --img-size")
    num = max(peaks)
    return num, f"batches of {num}: {peaks[num] / 1e9:.1f} GB of {room / SHARE / 1e9:.1f} GB on {device}"


# ------------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training was measured to take."""

    epochs: int
    steps: int  # of an epoch
    num_steps: int  # measured
    step_seconds: float
    wait_share: float  # of that, waiting for data
    evaluation_seconds: float  # of one
    num_evaluations: int
    batch_size: int
    peaks: dict[int, int | None]  # bytes, by batch size; None: does not fit
    room: int  # bytes
    where: str  # the device
    disk_needed: int
    disk_free: int
    folder: Path

    @property
    def seconds(self) -> float:
        return self.epochs * self.steps * self.step_seconds + self.num_evaluations * self.evaluation_seconds

    def table(self, now: datetime) -> str:
        """Aligned lines."""
        sizes = [
            (f"memory at {num}", "does not fit" if peak is None else f"{peak / 1e9:.2f} GB of {self.room / 1e9:.2f} GB")
            for num, peak in self.peaks.items()
        ]
        spent = self.wait_share * 100
        data = "the loading is the bottleneck: --workers, --cache" if spent > 30 else "the network is the bottleneck"
        lines = [
            ("a step", f"{self.step_seconds:.3g} s, mean of {self.num_steps}, on {self.where}"),
            ("waiting for data", f"{spent:.0f} % of that; {data}"),
            ("an epoch", f"{self.steps} steps, {span(self.steps * self.step_seconds)}"),
            ("an evaluation", span(self.evaluation_seconds)),
            ("all of it", f"{self.epochs} epochs, {self.num_evaluations} evaluations: {span(self.seconds)}"),
            ("begun now, ends", f"{now + timedelta(seconds=self.seconds):%A %d %B %Y, %H:%M}"),
            *sizes,
            ("disk", f"{self.disk_needed / 1e9:.2f} GB of {self.disk_free / 1e9:.1f} GB free at {self.folder}"),
        ]
        return "\n".join(f"{name:<18}{text}" for name, text in lines)

    def refuse(self) -> None:
        """Raises ResourceError where this training would not come to its end."""
        peak = self.peaks[self.batch_size]
        if peak is None or peak > self.room:
            found = f"batches of {self.batch_size} need {(peak or self.room) / 1e9:.2f} GB of {self.room / 1e9:.2f} GB"
            raise ResourceError(self.where, found, "--batch-size auto, or a smaller --img-size")
        if self.disk_needed > self.disk_free:
            found = f"{self.disk_free / 1e9:.2f} GB free, checkpoints need up to {self.disk_needed / 1e9:.2f} GB"
            raise ResourceError(self.folder, found, "make room, see --project, or a larger --save-period")


def measure(
    trainer: Trainer,
    train: Loader,
    val: Loader,
    predict: Predict,
    make: Callable[[int], Batch],
    *,
    num_evaluations: int,
    save_period: int,
    project: str | Path,
) -> Plan:
    """Take the first steps of a training, evaluate a few batches, try larger ones. The trainer is used up.

    Args:
        make: a batch of so many pictures (``trial_batch``).
        num_evaluations: of the whole training.
        save_period: a checkpoint of every so many epochs is kept; 0: none.
        project: the folder of all runs; need not be there.

    Raises:
        ResourceError: a step does not fit.
    """
    memory = memory_of(trainer.device)
    memory.forget()
    times, waits = take_steps(trainer, train)
    warm = min(WARM_UP, len(times) - 2)
    seconds = times[-1] - times[warm]
    peaks: dict[int, int | None] = {trainer.batch_size: memory.peak()}
    num_steps = len(times) - 1 - warm
    for factor in (2, 4):
        if seconds / num_steps * factor > LONGEST or None in peaks.values():
            break  # too slow to try
        batch = make(trainer.batch_size * factor)
        expected = peaks[trainer.batch_size] + factor * batch.images.nbytes
        work = None if expected > memory.room() else lambda batch=batch: _try(trainer, batch)
        peaks[trainer.batch_size * factor] = work and peak_of(memory, work)
    start, few = time.perf_counter(), list(islice(val, 3))
    for batch in few:
        predict(batch.images)
    pictures = max(sum(map(len, few)), 1)
    folder = next(place for place in (Path(project), *Path(project).resolve().parents) if place.is_dir())
    checkpoint = sum(tensor.nbytes for tensor in trainer.tensors().values())
    return Plan(
        epochs=trainer.epochs,
        steps=len(trainer.groups),
        num_steps=num_steps,
        step_seconds=seconds / num_steps,
        wait_share=(waits[-1] - waits[warm]) / seconds,
        evaluation_seconds=(time.perf_counter() - start) / pictures * len(val.dataset),
        num_evaluations=num_evaluations,
        batch_size=trainer.batch_size,
        peaks=peaks,
        room=memory.room(),
        where=str(trainer.device),
        disk_needed=checkpoint * (COPIES + (trainer.epochs // save_period if save_period else 0)) + RESULTS,
        disk_free=shutil.disk_usage(folder).free,
        folder=folder,
    )


def take_steps(trainer: Trainer, train: Loader) -> tuple[list[float], list[float]]:
    """When each of the first steps had ended, and how long all up to it had waited for data; seconds."""
    times, waits, before, begun = [], [], 0.0, time.perf_counter()
    with tqdm(total=WARM_UP + STEPS + 1, desc="measure", unit="step", leave=False, disable=None) as bar:

        def between() -> None:
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            times.append(time.perf_counter())
            waits.append(before + waiting.seconds)
            bar.update()
            if len(times) > WARM_UP + STEPS or (len(times) > 2 and times[-1] - begun > LONGEST):
                raise _EnoughError

        try:
            while True:
                train.batch_sampler.set_epoch(trainer.epoch)
                waiting = Waiting(train)
                trainer.train_epoch(waiting, between=between)
                trainer.end_epoch()
                before += waiting.seconds
        except _EnoughError:
            return times, waits


class _EnoughError(Exception):
    """The steps that were to be measured are done."""


def _try(trainer: Trainer, batch: Batch) -> None:
    forward_backward(trainer.train_step, batch, trainer.device, trainer.precision)


def span(seconds: float) -> str:
    """A time in words."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"

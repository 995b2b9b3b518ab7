"""One network being taught: its weights, their optimiser and average, and how far it has come.

Letters: a *batch* is what the loader hands over; a *step* is one move of the weights, after one or several batches.

The state stands between two steps: (epoch, steps done in it), sums of the epoch's losses, weights, average, optimiser,
torch's generators. A run that continues from it ends as if it had never stopped.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import checkpoint
from utils.distributed import all_reduce_mean, world_size
from utils.ema import EMA
from utils.errors import DivergenceError, ResourceError
from utils.failpoints import failpoint
from utils.ledger import KeptBuffers, Ledger, Note, culprit, describe
from utils.optim import Optim, build_optimizer, clip_gradients, guarded_step, rates, set_rates, split_evenly
from utils.run import Precision
from utils.structures import Batch

READ_EVERY = 10  # steps between two looks at what they were like: each look waits for the device
IN_A_ROW = 3  # steps that may be left out one after the other
TINY_SCALE_STEPS = 20  # that float16 gradients may take with a scale below 1


class Trainer:
    """Teaches ``train_step``: a module with parts ``model`` and ``criterion``, from (images, targets) to loss terms.

    DistributedDataParallel wraps the whole of it, because a criterion may learn too (AutoAssign's centre prior).

    A step whose loss or gradient is not finite, on whichever process, is left out on all: no weight, no moment of the
    optimiser and no batch norm sees it (the average moves on towards weights that stood still). That is decided on
    the device; every READ_EVERY steps the notes are read, and IN_A_ROW such steps one after the other end the epoch.

    Args:
        optim: how the weights move.
        num_batches: of an epoch, on this process; the same on all.
        batch_size: images of one batch over all processes; up to ``optim.nominal_batch`` of them make one step.
        epochs: of the whole training; the schedule's length.
        report: is told of every step that was left out.
    """

    def __init__(
        self,
        train_step: nn.Module,
        *,
        optim: Optim,
        device: torch.device,
        precision: Precision,
        num_batches: int,
        batch_size: int,
        epochs: int,
        report: Callable[[Note], None] = lambda note: None,
    ):
        self.train_step, self.optim, self.device, self.precision = train_step, optim, device, precision
        self.groups = list(split_evenly(num_batches, max(1, round(optim.nominal_batch / batch_size))))
        self.batch_size, self.epochs, self.report = batch_size, epochs, report
        self.epoch, self.step, self.steps_done = 0, 0, 0
        self.ema = EMA(train_step.model, decay=optim.ema_decay, tau=optim.ema_tau)
        self.optimizer = build_optimizer(train_step, optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
        self.parallel = train_step if world_size() == 1 else DistributedDataParallel(train_step)
        self.ledger, self.buffers = Ledger(), KeptBuffers(train_step)
        self.lr, self.lr_factor = 0.0, 1.0
        self.left_out, self.tiny_scale = 0, 0  # in a row
        self._forget_epoch()

    # ---------------------------------------------------------------------------------------------------------- epochs

    @property
    def batches_done(self) -> int:
        """How many batches of this epoch have been used: the next one's number."""
        return self.groups[self.steps_done - 1].stop if self.steps_done else 0

    def train_epoch(
        self,
        batches: Iterable[Batch],
        watch: Callable[[int, dict[str, float]], None] = lambda batches, terms: None,
        between: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """The rest of the present epoch; returns ``means()`` of all of it.

        Args:
            batches: from number ``batches_done`` on.
            watch: called with the number of batches done and the means so far, every few steps.
            between: called after every step, when the state is whole: the time to save or to stop.

        Raises:
            DivergenceError: IN_A_ROW steps one after the other were not finite, or float16 has no scale that works.
            ResourceError: a step does not fit into memory.
        """
        self._train_mode()
        self.train_step.criterion.set_epoch(self.epoch, self.epochs)
        batches = iter(batches)
        for group in self.groups[self.steps_done :]:
            self._take_step(group, batches)
            if self.steps_done % READ_EVERY == 0:
                self.look()
                watch(group.stop, self.means())
            between()
        next(batches, None)  # there are no more: a loader may keep its processes for the next epoch
        self.look()
        return self.means()

    def end_epoch(self) -> None:
        """Turn to the next epoch."""
        self.epoch, self.steps_done = self.epoch + 1, 0
        self._forget_epoch()

    def means(self) -> dict[str, float]:
        """Mean of each loss term over the epoch's batches so far and all processes, those left out apart."""
        return {name: total / max(self.counted, 1) for name, total in self.sums.items()}

    def _forget_epoch(self) -> None:
        self.sums, self.counted, self.skipped, self.clipped = {}, 0, 0, 0

    def look(self) -> None:
        """Read what the last steps were like, on all processes together. Raises as ``train_epoch``."""
        notes = self.ledger.read()
        for note in notes:
            if note.finite:
                self.left_out = 0
                self.counted += len(note.batches)
                self.clipped += note.norm > self.optim.clip_norm
                for name, term in note.terms.items():
                    self.sums[name] = self.sums.get(name, 0.0) + term
            else:
                self._leave_out(note)
        self._watch_scale(len(notes))

    def _leave_out(self, note: Note) -> None:
        self.skipped += 1
        if self.scaler.is_enabled() and all(abs(term) < float("inf") for term in note.terms.values()):
            return  # float16 gradients overflow now and then; the scale goes down
        self.left_out += 1
        self.report(note)
        if self.left_out == IN_A_ROW:
            raise DivergenceError(
                f"epoch {note.epoch}, step {note.step}",
                f"{IN_A_ROW} steps in a row were not finite: {describe(note)}",
                "a smaller lr0 or --precision float32 may help",
            )

    def _watch_scale(self, num_steps: int) -> None:
        if not self.scaler.is_enabled():
            return
        self.tiny_scale = self.tiny_scale + num_steps if self.scaler.get_scale() < 1 else 0
        if self.tiny_scale >= TINY_SCALE_STEPS:
            found = f"float16 gradients overflow even with a scale of {self.scaler.get_scale():.2g}"
            raise DivergenceError(f"epoch {self.epoch}, step {self.step}", found, "--precision bf16 or float32")

    # ----------------------------------------------------------------------------------------------------------- steps

    def _take_step(self, group: range, batches: Iterator[Batch]) -> None:
        """One step of the optimiser and of the average; tried twice where memory is short."""
        now = rates(self.optim, self.step, len(self.groups), self.epochs)
        now = now._replace(lr=now.lr * self.lr_factor, bias_lr=now.bias_lr * self.lr_factor)
        set_rates(self.optimizer, now)
        self.lr = now.lr
        mine = [next(batches) for _ in group]
        try:
            sums = self._gradients(group, mine)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if world_size() > 1:  # the others are in the middle of an exchange: no way back
                raise self._no_memory(mine, error) from error
            sums = None
        if sums is None:  # outside of the handler, which holds on to the memory of the failed try
            sums = self._again(group, mine)
        self._move(group, sums)
        self.step, self.steps_done = self.step + 1, self.steps_done + 1

    def _again(self, group: range, batches: list[Batch]) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.put_back()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            return self._gradients(group, batches)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise self._no_memory(batches, error) from error
            raise

    def _gradients(self, group: range, batches: list[Batch]) -> dict[str, Tensor]:
        """Forward and backward; returns the sum of each loss term over the batches."""
        fault, sums = failpoint("step", self.step + 1), {}
        if fault == "oom":
            raise torch.OutOfMemoryError("failpoint step")
        for position, batch in zip(group, batches):
            with self._maybe_quiet(position == group.stop - 1):
                terms = self._forward(batch)
                if fault == "nan":
                    terms = {name: term * float("nan") for name, term in terms.items()}
                self.scaler.scale(sum(terms.values()) * self._share(group)).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach().double()
        return sums

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        batch = batch.to(self.device)
        dtype = self.precision.autocast
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.parallel(batch.images, batch.targets)

    def _share(self, group: range) -> float:
        """What a batch's loss, a mean over images, counts in its step, whose loss is a mean too or (YOLOv5) a sum."""
        return self.batch_size if self.train_step.criterion.sums_images else 1 / len(group)

    def _maybe_quiet(self, is_last: bool):
        """Processes exchange gradients once per step, with its last batch."""
        return nullcontext() if is_last or self.parallel is self.train_step else self.parallel.no_sync()

    def _move(self, group: range, sums: dict[str, Tensor]) -> None:
        """Move the weights and their average, unless a number is not finite, and note what the step was like."""
        taught = {name: p for name, p in self.train_step.named_parameters() if p.grad is not None}
        self.scaler.unscale_(self.optimizer)
        norms, norm = clip_gradients(list(taught.values()), self.optim.clip_norm)
        terms = torch.stack(list(sums.values()))
        check = norm + all_reduce_mean(terms.sum())  # one process's loss may be infinite with a gradient that is not
        guarded_step(self.optimizer, check)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.keep(torch.isfinite(check))
        self.ema.update(self.train_step.model)
        row = torch.cat([torch.stack([torch.isfinite(check).double(), norm.double(), culprit(norms)]), terms])
        self.ledger.note(self.epoch, self.step, group, tuple(sums), row, list(taught))

    def _no_memory(self, batches: list[Batch], error: Exception) -> ResourceError:
        height, width = batches[0].images.shape[-2:]
        found = (
            f"{len(batches[0])} pictures of {height} x {width} do not fit: {str(error).strip().splitlines()[0][:200]}"
        )
        return ResourceError(
            f"step {self.step}, {self.device}",
            found,
            "a smaller --batch-size: nominal_batch pictures still make a step",
        )

    def _train_mode(self) -> None:
        """Train mode, except for frozen parts: their batch norms must not go on measuring."""
        self.train_step.train()
        for module in self.train_step.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()

    # ------------------------------------------------------------------------------------------------- save and restore

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs, by the names of ``utils.checkpoint``."""
        parts = {
            "model": self.train_step.model.state_dict(),
            "criterion": self.train_step.criterion.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optim": checkpoint.optimizer_tensors(self.optimizer),
            "rng": {"cpu": torch.get_rng_state()},
        }
        if self.device.type == "cuda":
            parts["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)
        return {name: tensor for part in parts for name, tensor in checkpoint.with_prefix(part, parts[part]).items()}

    def counters(self) -> dict[str, Any]:
        """The plain half of the state, after a ``look``."""
        assert not self.ledger.rows, "look() first: it takes all processes"
        return {name: getattr(self, name) for name in COUNTERS} | {
            "batches_done": self.batches_done,
            "ema_updates": self.ema.updates,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any], where: object) -> None:
        """Continue where a checkpoint stopped. Raises UserError where it belongs to another network."""

        def part(name):
            return checkpoint.without_prefix(name, tensors)

        checkpoint.load_module(self.train_step.model, part("model"), where)
        checkpoint.load_module(self.train_step.criterion, part("criterion"), where)
        checkpoint.load_module(self.ema.module, part("ema"), where)
        checkpoint.load_optimizer_tensors(self.optimizer, part("optim"))
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self._forget_epoch()
        for name in COUNTERS:
            if name in counters:  # a checkpoint of format 1 stands at the end of an epoch and has fewer
                setattr(self, name, counters[name])
        self.ema.updates = counters["ema_updates"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(counters["scaler"])
        self.ledger = Ledger()
        self.buffers.renew()


COUNTERS = (
    *("epoch", "step", "steps_done", "lr", "lr_factor", "left_out", "tiny_scale"),
    *("sums", "counted", "skipped", "clipped"),  # of the epoch
)


def is_out_of_memory(error: Exception) -> bool:
    """torch has a type of its own for a GPU; for the CPU's memory there is only a text."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)

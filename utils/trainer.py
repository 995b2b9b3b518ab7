"""One network being taught: its weights, their optimiser and average, and how far it has come.

Letters: a *batch* is what the loader hands over; a *step* is one move of the weights, after one or several batches.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import checkpoint
from utils.distributed import all_reduce_mean, world_size
from utils.ema import EMA
from utils.errors import DivergenceError
from utils.optim import Optim, build_optimizer, clip_gradients, guarded_step, rates, set_rates, split_evenly
from utils.run import Precision
from utils.structures import Batch

READ_EVERY = 10  # steps between two looks at the losses: each look waits for the device


class Trainer:
    """Teaches ``train_step``: a module with parts ``model`` and ``criterion``, from (images, targets) to loss terms.

    DistributedDataParallel wraps the whole of it, because a criterion may learn too (AutoAssign's centre prior).

    Args:
        optim: how the weights move.
        num_batches: of an epoch, on this process; the same on all.
        batch_size: images of one batch over all processes; up to ``optim.nominal_batch`` of them make one step.
        epochs: of the whole training; the schedule's length.
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
    ):
        self.train_step, self.optim, self.device, self.precision = train_step, optim, device, precision
        self.groups = list(split_evenly(num_batches, max(1, round(optim.nominal_batch / batch_size))))
        self.batch_size, self.epochs, self.epoch, self.step = batch_size, epochs, 0, 0
        self.ema = EMA(train_step.model, decay=optim.ema_decay, tau=optim.ema_tau)
        self.optimizer = build_optimizer(train_step, optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
        self.parallel = train_step if world_size() == 1 else DistributedDataParallel(train_step)
        self.lr = 0.0

    def train_epoch(
        self, batches: Iterable[Batch], watch: Callable[[int, dict[str, float]], None] = lambda steps, terms: None
    ) -> dict[str, float]:
        """One epoch; returns the mean of each loss term over all batches and processes.

        ``watch(batches_done, means)`` is called every few steps with the means so far.

        Raises:
            DivergenceError: a loss is not finite. Its step was left out: no weight has seen it.
        """
        self._train_mode()
        self.train_step.criterion.set_epoch(self.epoch, self.epochs)
        batches, totals = iter(batches), {}
        for number, group in enumerate(self.groups):
            now = rates(self.optim, self.step, len(self.groups), self.epochs)
            set_rates(self.optimizer, now)
            self.lr = now.lr
            for position in group:
                with self._maybe_quiet(position == group.stop - 1):
                    terms = self._forward(next(batches))
                    self.scaler.scale(sum(terms.values()) * self._share(group)).backward()
                for name, term in terms.items():
                    totals[name] = totals.get(name, 0) + term.detach()
            self._move()
            if number % READ_EVERY == READ_EVERY - 1:
                watch(group.stop, self._means(totals, group.stop))
        means = self._means(totals, self.groups[-1].stop)
        self.epoch += 1
        return means

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

    def _move(self) -> None:
        """One step of the optimiser and of the average."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.optimizer, self.optim.clip_norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            guarded_step(self.optimizer, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.train_step.model)
        self.step += 1

    def _means(self, totals: Mapping[str, Tensor], count: int) -> dict[str, float]:
        """Read the loss terms, the same on all processes; the one place where training waits for the device."""
        sums = all_reduce_mean(torch.stack([total.to(torch.float64) for total in totals.values()]))
        means = dict(zip(totals, sums.div(count).tolist()))
        for name, mean in means.items():
            if not abs(mean) < float("inf"):
                where = f"epoch {self.epoch}, step {self.step}"
                raise DivergenceError(
                    where, f"loss '{name}' is {mean}", "a smaller lr0 or --precision float32 may help"
                )
        return means

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
        """The plain half of the state."""
        return {
            "epoch": self.epoch,
            "step": self.step,
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
        self.epoch, self.step = counters["epoch"], counters["step"]
        self.ema.updates = counters["ema_updates"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(counters["scaler"])

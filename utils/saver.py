"""When a training is saved, what a checkpoint holds, and the way back to one."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.checkpoint import read_checkpoint
from utils.distributed import all_reduce_max, broadcast, is_main
from utils.errors import DivergenceError, ResourceError, UserError
from utils.fitness import Best
from utils.interrupts import Interrupts, stopped
from utils.logger import Logger
from utils.store import Found, Store
from utils.trainer import Trainer

SMALLER = 0.5  # learning rate after a way back, of what it was


class Saver:
    """Saves a training at any step: every few minutes, when a signal asks for it, and when told to.

    All processes call its methods at the same step; the first one writes.

    Args:
        fixed: what of a checkpoint's header never changes: cfg, names, recipe, arguments, the data's fingerprint.
        minutes: between two saves; infinite: only when asked.
        resumed: the checkpoint that the training begins with.
    """

    def __init__(
        self,
        store: Store,
        trainer: Trainer,
        best: Best,
        logger: Logger,
        interrupts: Interrupts,
        *,
        fixed: Mapping[str, Any],
        minutes: float,
        resumed: Found | None,
    ):
        self.store, self.trainer, self.best, self.logger, self.interrupts = store, trainer, best, logger, interrupts
        self.fixed, self.minutes = fixed, minutes
        self.since = time.monotonic()
        self.has_saved = resumed is not None
        if resumed:
            trainer.restore(resumed.tensors, resumed.meta, resumed.path)
            best.restore(resumed.meta["best"])
        self.kept = best.as_dict()

    def save(self, names: Sequence[str] = ()) -> bool:
        """Commit the present state as ``last``, and under more names. False: the disk did not take it, and the best
        epoch is still the one that it holds. Raises as ``Trainer.look`` and ``Store.save``.
        """
        self.trainer.look()
        meta = {**self.fixed, "best": self.best.as_dict(), **self.trainer.counters()}
        done, problem = False, None
        if is_main():
            try:
                done = self.store.save(self.trainer.tensors(), meta, self.trainer.step, names)
            except DivergenceError as error:
                problem = error.where, error.message, error.hint
        done, problem = broadcast([done, problem])
        if problem:
            raise DivergenceError(*problem)
        self.since = time.monotonic()
        if done:
            self.has_saved, self.kept = True, self.best.as_dict()
        elif "best" in names:
            self.best.restore(self.kept)
        return done

    def save_at_last(self, names: Sequence[str] = ()) -> None:
        """As ``save``, where no other one comes after it. Raises also ResourceError: the disk did not take it."""
        if not self.save(names):
            found = "the last save failed (the warning above says why), the one before it stays"
            raise ResourceError(self.store.folder, found, "make room; --resume goes on from there")

    def final(self) -> tuple[Path, dict[str, Tensor]]:
        """The checkpoint to look at closely: the best epoch's where it was saved, else the last one.

        A file that another training left under such a name (--exist-ok) knows of another best.
        """
        for name in ("best", "last", "previous"):
            path = self.store.path(name)
            if path.exists():
                tensors, meta = read_checkpoint(path)
                if meta["best"] == self.best.as_dict():
                    return path, tensors
        raise UserError(self.store.folder, "no checkpoint of the last epoch", "--resume RUN names one to go on from")

    def between_steps(self) -> None:
        """Save if it is time or asked for, and stop if that is. Raises Stopped."""
        due = is_main() and time.monotonic() - self.since > 60 * self.minutes
        stop, wanted = all_reduce_max([self.interrupts.stop, self.interrupts.save or due])
        if wanted and not stop:
            self.interrupts.save = False
            self.save()
        self.stop_if(stop)

    def stop_if(self, number: int) -> None:
        """End the program where a signal asked for it; nothing is lost. Raises Stopped, or as ``save_at_last``."""
        if number:
            self.save_at_last()
            self.logger.close()  # rows that did not fit are of epochs that the run which continues does not make again
            place = f"epoch {self.trainer.epoch}, step {self.trainer.step}"
            raise stopped(number, f"saved at {place}; --resume {self.store.folder.parent} continues")

    def roll_back(self, error: DivergenceError) -> None:
        """Return to the newest checkpoint, once in a training, and learn half as fast from there on.

        Raises:
            DivergenceError: ``error``, the second time, or where this training has not saved anything.
        """
        if self.trainer.lr_factor < 1 or not self.has_saved:
            raise error
        try:
            found = self.store.latest()
        except UserError as missing:
            raise error from missing
        self.trainer.restore(found.tensors, found.meta, found.path)
        self.trainer.lr_factor, self.trainer.left_out = SMALLER, 0
        self.best.restore(found.meta["best"])
        self.logger.rewind(self.trainer.epoch)
        self.logger.say(f"warning: {error}; back to step {self.trainer.step} ({found.path}), learning rate halved")

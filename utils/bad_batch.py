"""What a step looked at that had to be left out: a line on the console, and files to look at it again."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np

from utils.datasets.loader import collate
from utils.datasets.workers import Loader
from utils.distributed import is_main
from utils.files import atomic_write, write_text
from utils.ledger import Note, describe
from utils.logger import Logger, finite_or_none

NAME = "bad_batch"
SHOWN = 4  # pictures named on the console


class BadBatches:
    """Is told of steps that were left out. Says each; of some in a row the first, where it began, is written to
    ``bad_batch.json`` and ``bad_batch.npz``. A batch is a function of its draws, so nothing of it was kept: it is made
    again, as all processes together saw it.
    """

    def __init__(self, folder: Path, loader: Loader, logger: Logger):
        self.folder, self.loader, self.logger = folder, loader, logger
        self.last_step = -2

    def __call__(self, note: Note) -> None:
        self.logger.say(f"warning: epoch {note.epoch}, step {note.step} is left out: {describe(note)}")
        if is_main() and note.step != self.last_step + 1:
            with self.logger.guard("bad_batch"):
                files = self._write(note)
                more = f" and {len(files) - SHOWN} more" * (len(files) > SHOWN)
                self.logger.say(f"its pictures: {', '.join(files[:SHOWN])}{more}; {self.folder / NAME}.json, .npz")
        self.last_step = note.step

    def _write(self, note: Note) -> list[str]:
        sampler = copy.copy(self.loader.batch_sampler)
        sampler.batch_size, sampler.rank, sampler.world = sampler.batch_size * sampler.world, 0, 1
        sampler.set_epoch(note.epoch, note.batches.start)
        draws = list(itertools.islice(sampler, len(note.batches)))
        samples = [[self.loader.dataset[draw] for draw in batch] for batch in draws]
        files = [sample.info.path for batch in samples for sample in batch]
        arrays = {}
        for number, batch in zip(note.batches, map(collate, samples)):
            targets = {name: getattr(batch.targets, name).numpy() for name in ("image", "labels", "boxes")}
            arrays |= {
                f"{number}.{name}": array for name, array in ({"images": batch.images.numpy()} | targets).items()
            }
        with atomic_write(self.folder / f"{NAME}.npz") as file:
            np.savez_compressed(file, **arrays)
        facts = note._asdict() | {"batches": list(note.batches), "pictures": files, "draws": draws}
        write_text(self.folder / f"{NAME}.json", json.dumps(finite_or_none(facts), indent=1) + "\n")
        return files

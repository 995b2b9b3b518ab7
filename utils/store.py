"""The checkpoints of one run: how they are committed, kept and found again.

Names: ``last`` the newest, ``previous`` the one before, ``best`` and ``epochN`` what was kept for good.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from utils.checkpoint import SUFFIX, checkpoint_bytes, read_checkpoint, step_of, without_prefix
from utils.errors import DivergenceError, ResourceError, UserError
from utils.failpoints import failpoint
from utils.files import PART, atomic_write

BLOCKS = 16  # that a save is written in
ATTEMPTS = 3  # saves in a row that may fail
COPIES = 3  # last, previous and the one being written


class Found(NamedTuple):
    """The newest checkpoint of a run that reads well, and what is wrong with newer ones."""

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    passed_over: list[UserError]


class Store:
    """The checkpoints of one run. ``last`` is the newest, ``previous`` the one before; others are kept under a name.

    A save is written beside them, read back, and only then takes its name, so that whenever a process is killed or the
    power fails there is a valid checkpoint, two from the second save on. Nothing but a newer, verified save ever
    replaces a file, and ``previous`` gives way to a ``last`` that reads well only.

    Args:
        folder: of one run, locked by it (``utils.run.lock_run``).
        say: takes warnings.
    """

    def __init__(self, folder: str | Path, say: Callable[[str], None] = print):
        self.folder, self.say = Path(folder), say
        self.last, self.previous = self.path("last"), self.path("previous")
        self.failures, self.last_is_good = 0, None

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def save(
        self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], step: int, names: Iterable[str] = ()
    ) -> bool:
        """Commit a checkpoint as ``last``. False: the disk did not take it, the older ones are as they were.

        Args:
            names: under which it is kept for good, too. They come before ``last``: a run that is killed in between
                continues from before this save, and makes it again.

        Raises:
            DivergenceError: a tensor is not finite; nothing is written.
            ResourceError: the third save in a row that failed.
        """
        refuse_nonfinite(tensors, self.last)
        data = checkpoint_bytes(tensors, {**meta, "step": step})

        def commit(part: Path) -> None:
            _verify(part, data)
            for name in names:
                _link_or_copy(part, self.path(name))
            failpoint("save.prune")
            self._rotate()

        try:
            with atomic_write(self.last, point="save", before_rename=commit) as file:
                _write_blocks(file, data)
        except ResourceError as error:
            self.failures += 1
            if self.failures == ATTEMPTS:
                raise ResourceError(self.folder, f"{ATTEMPTS} saves in a row failed, the last one: {error}") from error
            self.say(f"warning: not saved, the next save tries again: {error}")
            return False
        self.failures, self.last_is_good = 0, True
        return True

    def latest(self) -> Found:
        """The newest checkpoint that reads well. The names say which are newer, then the steps; no clock is asked.

        Raises:
            UserError: there is none.
        """
        others = [file for file in self.folder.glob(f"*{SUFFIX}") if file not in (self.last, self.previous)]
        files = [file for file in (self.last, self.previous) if file.exists()]
        files += sorted(others, key=lambda file: (-step_of(file), file.name))
        passed_over = []
        for file in files:
            try:
                return Found(file, *read_checkpoint(file), passed_over)
            except UserError as error:
                passed_over.append(error)
        raise UserError(self.folder, f"no readable checkpoint among {len(files)}", "; ".join(map(str, passed_over)))

    def check_space(self, tensors: Mapping[str, Tensor]) -> None:
        """Before a run starts: is there room for three checkpoints? An optimiser holds up to two more of each weight.

        Raises:
            ResourceError: there is not.
        """
        size = 4 * sum(tensor.nbytes for tensor in without_prefix("model", tensors).values())
        free = shutil.disk_usage(self.folder).free
        if free < COPIES * size:
            found = f"{free / 1e6:.0f} MB free, {COPIES} checkpoints need {COPIES * size / 1e6:.0f} MB"
            raise ResourceError(self.folder, found, "make room, or see --project")

    def _rotate(self) -> None:
        """The newest becomes the one before; a damaged one takes no good one's place."""
        if self.last_is_good is None:
            self.last_is_good = self.last.is_file() and _reads_well(self.last)
        if self.last_is_good and self.last.is_file():
            self.last.replace(self.previous)
            self.last_is_good = False


def refuse_nonfinite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raises DivergenceError where a tensor holds nan or infinity: such a checkpoint continues nothing."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DivergenceError(where, f"not saved: {', '.join(bad[:3])}{more} not finite", "the older checkpoint stays")


def _write_blocks(file: BinaryIO, data: bytes) -> None:
    """In 16 parts, whatever the size: a failpoint can stop in the middle of the smallest."""
    size = -(-len(data) // BLOCKS)
    for start in range(0, len(data), size):
        failpoint("save.write")
        file.write(data[start : start + size])
        file.flush()


def _verify(part: Path, data: bytes) -> None:
    """Raises OSError where a file does not read back as what was written to it."""
    if part.read_bytes() != data:
        raise OSError(errno.EIO, "it reads back as something else")


def _link_or_copy(part: Path, path: Path) -> None:
    """Give a file that is being written a second name; where the disk has no links, a copy gets it."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        os.link(part, new)
    except OSError:
        with atomic_write(path) as file:
            file.write(part.read_bytes())
    else:
        new.replace(path)


def _reads_well(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except UserError:
        return False
    return True

"""Processes that make batches, and what becomes of a training when one of them dies or hangs.

A batch is a function of its draws, so new processes go on where lost ones stopped, with the batches that those would
have made. Once per epoch; then something is wrong that trying does not cure.
"""

import functools
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from utils.datasets.ring import Ring
from utils.errors import ResourceError, UserError
from utils.failpoints import failpoint
from utils.memory import HostMemory

try:
    import resource
except ImportError:  # Windows, which has no limit of this kind
    resource = None

T, U = TypeVar("T"), TypeVar("U")
PREFETCH = 4  # batches that a process makes ahead
SLOTS = PREFETCH + 4  # batches of a process on their way and in use, before they travel by torch's shared memory
POLL = 5.0  # seconds between two looks at whether the processes live
PATIENCE = 300.0  # seconds without a batch, after which a process is said to hang
DIED, TIMED_OUT, INSIDE = "DataLoader worker (pid", "DataLoader timed out", "Caught "  # how torch's errors begin
HANGS = "no answer"
SHARED_MEMORY = Path("/dev/shm")  # where boxes wait, on Linux; pictures have memory of their own (``Ring``)
BOXES_BYTES = 2**18  # of a batch on its way: some thousand boxes, or some hundred with masks
OPEN_FILES, FILES_PER_BATCH = 128, 8  # of a program; of a batch on its way


class LostWorkerError(Exception):
    """A process that makes batches is dead or hangs."""


class Loader:
    """``make_batch(dataset, draws, allocate)`` for the draws of a batch sampler; ``len`` and iteration as a DataLoader.

    Processes live as long as the loader: an epoch reaches them in its draws. Set the sampler's epoch before iterating.
    They are forked where the system can, so that they share the data set's arrays and cache, and write their batches,
    of up to ``batch_bytes``, into memory that is shared, too (``Ring``). A UserError in one is raised here as itself.
    A batch that is None is left out.

    Raises:
        ResourceError: while iterating: a process died or hung for the second time; names the files that were read.
    """

    def __init__(
        self,
        dataset,
        batch_sampler: Sampler,
        make_batch: Callable,
        *,
        workers: int,
        pin_memory: bool,
        batch_bytes: int = 0,
    ):
        self.dataset, self.batch_sampler, self.make_batch = dataset, batch_sampler, make_batch
        self.workers, self.pin_memory, self.batch_bytes = workers, pin_memory, batch_bytes
        self.context = multiprocessing.get_context("fork" if _can_fork() else None)
        self.loader: DataLoader | None = None
        self.ring: Ring | None = None
        self.doing = self.context.Array("q", workers, lock=False)  # 1 + the record that each is reading, or 0
        self.pids = ()  # of the processes

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator:
        done, lost = 0, False
        while True:
            batches = self._batches(done)
            try:
                for batch in batches:
                    if isinstance(batch, UserError):
                        try:
                            raise batch
                        finally:
                            del batch  # its traceback would hold this frame, and the processes would live with it
                    if batch is not None:
                        yield batch
                        del batch  # else its memory would be in use while the next one is waited for
                    done += 1
                return
            except LostWorkerError as error:
                files = ", ".join(self._files_in_work()) or "between two pictures"
                if lost:
                    raise ResourceError(
                        f"--workers {self.workers}", f"{error}, again; at work: {files}", "--workers 0 shows where"
                    ) from error
                print(f"warning: {error}; at work: {files}; once more with new workers", file=sys.stderr)
                lost = True
            finally:
                batches.close()

    def _batches(self, first: int) -> Iterator:
        """Batches from number ``first`` of the epoch on. Leaves no process in doubt behind."""
        whole = first == 0
        if self.loader is None or not whole:
            draws = self.batch_sampler if whole else list(itertools.islice(self.batch_sampler, first, None))
            loader = self._make(draws)
        else:
            loader = self.loader
        self.loader, pids = None, self.pids
        try:
            batches = _ask(iter, loader)
            _let_children_die_quietly()
            yield from _patiently(batches) if self.workers else batches
            if whole:
                self.loader, self.pids = loader, pids
        finally:
            if self.loader is not loader:  # died, hung, or not wanted any more: what they still make is of no use
                for process in multiprocessing.active_children():
                    if process.pid in set(pids):  # those of this loader: another epoch may have begun with its own
                        process.kill()

    def _make(self, draws: Sampler | Sequence) -> DataLoader:
        options, self.pids = {}, self.context.Array("q", self.workers, lock=False)
        if self.workers:
            options = {"persistent_workers": True, "prefetch_factor": PREFETCH, "multiprocessing_context": self.context}
            options |= {"timeout": POLL, "worker_init_fn": functools.partial(_start_worker, self.pids)}
        self.ring = None  # of lost processes: what they had taken stays taken
        if self.workers and self.batch_bytes and self.context.get_start_method() == "fork":
            self.ring = Ring(self.workers, SLOTS, self.batch_bytes)
        return DataLoader(
            _Carrier(self.dataset, self.make_batch, self.doing, self.ring),
            batch_sampler=draws,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(0),  # else the loader would draw from the run's own stream
            **options,
        )

    def _files_in_work(self) -> list[str]:
        return [self.dataset.path(number - 1) for number in self.doing if number]


def _patiently(batches: Iterator) -> Iterator:
    """The same batches. Raises LostWorkerError where one does not come; torch alone would wait for ever."""
    since = time.monotonic()
    while True:
        try:
            batch = _ask(next, batches)
        except StopIteration:
            return
        except LostWorkerError as error:
            if str(error) != HANGS:
                raise
            if time.monotonic() - since > PATIENCE:
                raise LostWorkerError(f"no batch for {PATIENCE:.0f} s") from error
            continue
        yield batch
        since = time.monotonic()


def _ask(ask: Callable[[T], U], whom: T) -> U:
    """``ask(whom)``; what torch says of a worker that is gone or does not answer becomes a LostWorkerError."""
    try:
        return ask(whom)
    except (RuntimeError, OSError, EOFError) as error:
        text = str(error)
        if text.startswith(TIMED_OUT):
            raise LostWorkerError(HANGS) from error
        if text.startswith(DIED) or (not isinstance(error, RuntimeError) and not text.startswith(INSIDE)):
            raise LostWorkerError(text.partition("\n")[0]) from error
        raise


def _let_children_die_quietly() -> None:
    """Take back torch's SIGCHLD handler, which raises an error wherever the program is: amid a step, too. The
    next batch that is asked for finds out soon enough.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch."):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------- in the processes


def _start_worker(pids, worker: int) -> None:
    """One thread per process (they are the parallelism), no generator left as the parent had it, no Ctrl-C: that is for
    the parent, which still wants its batch.
    """
    pids[worker] = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)
    random.seed(worker)
    np.random.seed(worker)
    torch.manual_seed(worker)


class _Carrier(Dataset):
    """Notes what it reads, and lets a UserError travel as a value: torch rebuilds exceptions from their text alone."""

    def __init__(self, dataset, make_batch: Callable, doing, ring: Ring | None):
        self.dataset, self.make_batch, self.doing, self.ring = dataset, make_batch, doing, ring
        self.channels = getattr(dataset, "channels", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draws: list):
        failpoint("loader")
        try:
            if self.ring is None:
                return self.make_batch(self, draws, np.empty)
            return self.ring.make(get_worker_info().id, functools.partial(self.make_batch, self, draws))
        except UserError as error:
            return error

    def make(self, draw, out: np.ndarray):
        worker = get_worker_info()
        if worker is None:
            return self.dataset.make(draw, out)
        self.doing[worker.id] = 1 + draw.index
        try:
            return self.dataset.make(draw, out)
        finally:
            self.doing[worker.id] = 0


def _as_it_is(batch: object) -> object:
    """What torch does with what was made."""
    return batch


# ---------------------------------------------------------------------------------------------- before they start


def _can_fork() -> bool:
    return "fork" in multiprocessing.get_all_start_methods()


def check_room(workers: int, batch_bytes: int) -> None:
    """Whether batches of two loaders (training and validation) find room on their way: boxes in the system's shared
    memory, pictures, ``batch_bytes`` each, in that of ``Ring``, which no mount limits. Raises the limit of open files
    as far as the system lets it.

    Raises:
        ResourceError: too little memory, shared or not, too few open files.
    """
    if not workers:
        return
    where, batches = f"--workers {workers}", 2 * workers * PREFETCH
    if SHARED_MEMORY.is_dir():
        free, needed = shutil.disk_usage(SHARED_MEMORY).free, batches * BOXES_BYTES
        if free < needed:
            found = f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, boxes on their way need {needed / 1e6:.0f} MB"
            raise ResourceError(where, found, "docker run --shm-size 2g, or --workers 0")
    if _can_fork():
        room, needed = HostMemory().room(), batches * batch_bytes
        if room < needed:
            found = f"{room / 1e6:.0f} MB of memory, pictures on their way need {needed / 1e6:.0f} MB"
            raise ResourceError(where, found, "fewer --workers, or a smaller --batch-size")
    if resource is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = OPEN_FILES + FILES_PER_BATCH * batches
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ResourceError(where, f"{hard} open files are allowed, {needed} needed", "ulimit -n, or --workers 0")
        if soft != resource.RLIM_INFINITY and soft < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

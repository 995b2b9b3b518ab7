"""A contender in a process of its own, which works only when asked: its memory and its allocator are its own, too."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path


class Contender:
    """``build()`` makes, in the child, a function that does one piece of work; calling a contender runs it once.

    Attributes:
        seconds: CPU time of all its work so far. The sum over contenders is a clock for ``paired.take_turns``.
        peak: most memory of the child so far above what it had before ``build``, MB. Linux only.
    """

    def __init__(self, build: Callable[..., Callable[[], object]], *args):
        self.connection, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self.process = spawn.Process(target=_serve, args=(theirs, build, args), daemon=True)
        self.process.start()
        theirs.close()
        self.seconds, self.peak = 0.0, 0.0

    def __call__(self) -> None:
        self.connection.send(True)
        seconds, self.peak = self.connection.recv()
        self.seconds += seconds

    def stop(self) -> None:
        self.connection.send(False)
        self.process.join()


def _serve(connection, build: Callable, args: tuple) -> None:
    import resource

    import torch

    torch.set_num_threads(1)
    page = resource.getpagesize()
    work = None
    while connection.recv():
        if work is None:
            before = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * page
            work = build(*args)
        start = time.process_time()
        work()
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        connection.send((seconds, peak / 1e6))
    os._exit(0)  # half of a second of tidying up for each

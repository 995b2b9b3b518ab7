"""Runs train.py and the others as processes of their own, hundreds per minute.

A program spends seconds importing torch before it trains the smallest network. Here one process imports everything,
takes a step with each optimiser (torch imports more at the first), and forks for each run: 0.1 s to start one.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from harness import ROOT, Finished

PRELOADED = ["pytest", "server_warm_up"]


class Running:
    """A program under way: ``pid`` and ``signal(...)`` to disturb it, ``wait()`` for its end."""

    def __init__(self, process: BaseProcess, folder: Path):
        self.process, self.folder, self.pid = process, folder, process.pid

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8")

    def signal(self, number: int) -> None:
        """Send a signal; nothing where it has ended."""
        if self.process.exitcode is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass

    def wait_for(self, text: str, timeout: float = 20) -> None:
        """Until ``text`` stands in its output."""
        end = time.monotonic() + timeout
        while text not in self.out + self.err:
            assert self.process.exitcode is None and time.monotonic() < end, f"no {text!r} in {self.out}{self.err}"
            time.sleep(0.01)

    def wait(self, timeout: float = 60) -> Finished:
        """How it ended; the code is negative for a signal. Killed, and the test failed, after ``timeout`` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.signal(signal.SIGKILL)
            self.process.join()
            raise AssertionError(f"still running after {timeout} s: {self.out}{self.err}")
        return Finished(self.process.exitcode, self.out, self.err)


class Server:
    """Starts programs of the checkout by name; ``folder`` takes what they print."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.counting = threading.Lock()
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("PYTHONPATH", paths)
            forkserver.ensure_running()

    def start(
        self,
        script: str,
        *args: object,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        pictures: bool = False,
        before: Callable[[], None] | None = None,
    ) -> Running:
        """``python SCRIPT ARGS`` (or ``-m SCRIPT``) under way, one thread, with ``env`` added to the environment.

        Without ``pictures`` a run draws no charts and no TensorBoard graph, half of the time of a tiny one. ``before``
        (a function of a module) is called first in the new process: what a mutant changes.
        """
        with self.counting:
            self.number += 1
            folder = self.folder / str(self.number)
        folder.mkdir()
        for name in ("out", "err"):
            (folder / name).touch()
        first = [undecorate] * (not pictures) + [before] * (before is not None)
        process = self.context.Process(
            target=_execute, args=(script, list(map(str, args)), env or {}, str(cwd or ROOT), str(folder), first)
        )
        process.start()
        return Running(process, folder)

    def run(self, script: str, *args: object, timeout: float = 60, **options) -> Finished:
        """``python SCRIPT ARGS`` to its end; ``options`` as of ``start``."""
        return self.start(script, *args, **options).wait(timeout)


def undecorate() -> None:
    """No charts, no pictures of batches, no graph in TensorBoard: nothing a run's result depends on."""
    from utils import plots
    from utils.gallery import Gallery
    from utils.logger import Logger

    for owner, name in (
        (plots, "save_results_png"),
        (plots, "save_evaluation_plots"),
        (plots, "save_labels_png"),
        (Gallery, "_save"),
        (Logger, "graph"),
    ):
        assert hasattr(owner, name)
        setattr(owner, name, lambda *args, **options: None)


def _execute(
    script: str, args: list[str], env: dict[str, str], cwd: str, folder: str, first: list[Callable[[], None]]
) -> None:
    """The forked process: become the program."""
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(Path(folder) / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (
        open(number, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    os.environ.update(env)
    os.chdir(cwd)
    import importlib

    from utils.errors import run_main

    module = importlib.import_module(script.removesuffix(".py"))
    sys.argv = [script, *args]
    for change in first:
        change()
    run_main(module.main)

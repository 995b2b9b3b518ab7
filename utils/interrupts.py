"""Requests from outside: SIGTERM and SIGINT to stop, SIGUSR1 to save and go on.

A handler only notes what was asked; a training acts between two steps, all processes at the same one. Before the first
step there is nothing to save, and a request to stop is followed at once. So is a second one, always.
"""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from utils.errors import Stopped

T = TypeVar("T")
SAVE = getattr(signal, "SIGUSR1", None)  # Windows has none
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # 75: EX_TEMPFAIL of sysexits.h, "try again later"


class Interrupts:
    """What was asked since the program started. Use it as a context: the handlers are put back after it.

    Args:
        state: what has become of the work if it ends at once.
    """

    def __init__(self, state: str = "nothing to save"):
        self.state = state
        self.stop = 0  # the number of the signal that asked
        self.save = False
        self.patient = False

    def __enter__(self) -> "Interrupts":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [*EXIT_CODES, *([SAVE] if SAVE else [])]
            self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number == SAVE:
            self.save = True
        elif self.stop:
            os._exit(EXIT_CODES[number])
        else:
            self.stop = number
            if not self.patient:
                raise stopped(number, self.state)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """In this block requests are noted, not followed: somebody looks at ``stop`` and ``save`` between two steps."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, until a request to stop comes. Raises Stopped."""
        for item in items:
            if self.stop:
                raise stopped(self.stop, self.state)
            yield item


def stopped(number: int, state: str) -> Stopped:
    """The end of a program by signal ``number``; ``state``: what became of its work."""
    return Stopped(f"{signal.Signals(number).name}: {state}", EXIT_CODES[number])

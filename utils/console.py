"""Output that cannot end a program: whoever reads it may leave, and any terminal can show it."""

import os
import sys
from typing import TextIO


def steady_output() -> None:
    """Make stdout and stderr survive a closed pipe, a full disk and a terminal that knows only ASCII."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the program began
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  it stays open
        if isinstance(stream, Steady) or not hasattr(stream, "reconfigure"):
            continue
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Steady(stream))


class Steady:
    """A text stream that goes on into nothing when it cannot be written any more."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._let_go()

    def _let_go(self) -> None:
        """Point the descriptor itself at nothing: what is still buffered must not fail when the program ends."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.stream.fileno())
        os.close(nothing)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

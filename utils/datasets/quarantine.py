"""What is done when a part of a data set cannot be used: listed, limited, and replaced while a run is under way.

A run's ``quarantine.jsonl`` has a line per bad row or picture: ``path line reason found action``. Nothing in the data
set is moved or changed.
"""

import json
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from utils.datasets.formats.rows import DROPPED, KEPT, QUARANTINED, Problem
from utils.datasets.loader import generator
from utils.datasets.records import DataSet
from utils.errors import QuarantineError, UserError
from utils.files import read_bytes, write_text

FILE = "quarantine.jsonl"


def refuse_bad(data: DataSet, max_bad: float) -> None:
    """Stop where more than ``max_bad`` of a split's pictures were set aside, or of its rows dropped.

    Raises:
        QuarantineError: with the first of them, and the share that would be let through.
    """
    for action, what, num_good in ((QUARANTINED, "pictures", len(data.records)), (DROPPED, "rows", data.num_boxes)):
        bad = [problem for problem in data.problems if problem.action == action]
        total = num_good + len(bad)
        if len(bad) > max_bad * total:
            found = f"{len(bad)} of {total} {what} are bad ({len(bad) / total:.2%}, allowed {max_bad:.2%})"
            hint = f"repair them, or --max-bad {_rounded_up(len(bad) / total)} goes on without them"
            raise QuarantineError(f"{data.source} [{data.split}]", f"{found}, first {bad[0]}", hint)


def _rounded_up(share: float) -> float:
    """``share`` in two digits, not below it."""
    return min(1.0, round(share + 0.005, 2))


def write_quarantine(folder: Path, problems: Iterable[Problem]) -> None:
    """``quarantine.jsonl`` of a run: all that was changed or left out; no file where that is nothing."""
    _write(folder / FILE, _lines(problems))


def extend_quarantine(folder: Path, problems: Iterable[Problem]) -> None:
    """As ``write_quarantine``, of a run that continues: what it has listed stays, and nothing is listed twice."""
    path = folder / FILE
    text = read_bytes(path, "a run's list of bad data").decode(errors="replace") if path.exists() else ""
    before = [f"{line}\n" for line in text.splitlines()]  # the last one may be cut off
    _write(path, list(dict.fromkeys(before + _lines(problems))))


def _write(path: Path, lines: list[str]) -> None:
    if lines:
        write_text(path, "".join(lines))


def _lines(problems: Iterable[Problem]) -> list[str]:
    return [_line(problem) for problem in problems if problem.action != KEPT]


def _line(problem: Problem) -> str:
    return json.dumps(problem._asdict()) + "\n"


class Quarantine:
    """Pictures that could not be read although they could be when the data set was: known to all loading processes.

    Args:
        num: pictures.
        seed: of the pictures that take their place.
        max_bad: share above which the run stops.
    """

    def __init__(self, num: int, *, seed: int, max_bad: float):
        self.seed, self.max_bad = seed, max_bad
        self.bad = np.frombuffer(mmap.mmap(-1, max(num, 1)), bool, num)  # forked processes share it
        self.folder: Path | None = None  # of the run, where it has one

    def add(self, index: int, error: UserError) -> None:
        """Set a picture aside, in words and in the run's list, once.

        Raises:
            QuarantineError: it is one too many.
        """
        if self.bad[index]:
            return
        self.bad[index] = True
        problem = Problem(error.where, None, "picture cannot be used any more", error.message, QUARANTINED)
        print(f"warning: {problem}", file=sys.stderr)
        if self.folder is not None:
            self._list(self.folder / FILE, problem)
        count, total = int(self.bad.sum()), len(self.bad)
        if count > self.max_bad * total or count == total:
            found = f"{count} of {total} pictures became unreadable ({count / total:.2%}, allowed {self.max_bad:.2%})"
            raise QuarantineError(error.where, f"{found}: {error.message}", "is the disk still there? see --max-bad")

    def _list(self, path: Path, problem: Problem) -> None:
        """A line more; that a disk does not take it costs the line, which has just been said, and not the run."""
        try:
            with path.open("a", encoding="utf-8") as file:  # one write: lines of two workers never mix
                file.write(_line(problem))
        except OSError as error:
            print(f"warning: {path}: cannot write: {error.strerror}", file=sys.stderr)

    def substitute(self, index: int) -> int:
        """The picture that takes the place of a bad one: the same one each time, whoever asks."""
        if not self.bad[index]:  # nearly always
            return index
        rng = generator(self.seed, SUBSTITUTE, index)
        while self.bad[index]:
            index = int(rng.integers(len(self.bad)))
        return index


SUBSTITUTE = 3  # a stream of chance beside those of the loader

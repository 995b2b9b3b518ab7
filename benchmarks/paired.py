"""Contenders in turn: every round runs each of them once, so that noise of the machine meets all alike.

Ratios are taken within a round, reported as median, least and greatest: they travel between machines, seconds do not.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from types import ModuleType

from benchmarks.journal import record_row, table


@dataclass(frozen=True)
class Rounds:
    """Seconds per unit of every contender, round by round."""

    seconds: dict[str, list[float]]

    def ratio(self, name: str, base: str) -> list[float]:
        """How many times faster ``name`` is than ``base``, per round."""
        return [theirs / ours for ours, theirs in zip(self.seconds[name], self.seconds[base])]

    def table(self, base: str) -> str:
        """A line per contender: milliseconds (median) and speed relative to ``base``."""
        rows = [
            (name, f"{median(seconds) * 1e3:.2f}", span(self.ratio(name, base)))
            for name, seconds in self.seconds.items()
        ]
        return table(("contender", "ms", f"speed, {base} = 1"), rows)


def span(values: list[float]) -> str:
    """``median [least-greatest]``."""
    return f"{median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    warmup: int = 1,
    units: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> Rounds:
    """Run every contender once per round, ``units`` pieces of work each.

    ``clock``: CPU time of this process by default; ``time.perf_counter`` where threads, children or a GPU do the work
    (a contender on a GPU waits for it before it returns).
    """
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = clock()
            run()
            seconds[name].append((clock() - start) / units)
    return Rounds(seconds)


def peer(module: str, package: str) -> ModuleType | None:
    """A module of a peer, or None and a line that says how to get it: peers are no dependency of ours."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(f"{package}: not installed, {error} (pip install {package})")
        return None


def verdict(benchmark: str, ours: str, base: str, rounds: Rounds, goal: float, device) -> str:
    """One line: the ratio against its goal; also appended, with date, commit and machine, to benchmarks/record.csv."""
    ratio = rounds.ratio(ours, base)
    record_row(benchmark, f"{ours} / {base}", ratio, goal, device)
    mark = "met" if median(ratio) >= goal else "NOT met"
    return f"{benchmark}: {ours} is {span(ratio)} x {base}, goal {goal:g}: {mark}"

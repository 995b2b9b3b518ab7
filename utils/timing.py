"""Where the time goes: named stopwatches."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Timer:
    """Seconds by name: ``with timer("inference"): ...``. On CUDA every measured block waits for the device: it is for
    reports, not for the inside of a training step.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Waiting(Iterable[T]):
    """An iterable that knows how long its user waited for it, for example for the next batch."""

    def __init__(self, items: Iterable[T]):
        self.items, self.seconds = items, 0.0

    def __iter__(self) -> Iterator[T]:
        iterator = iter(self.items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item

    def __len__(self) -> int:
        return len(self.items)

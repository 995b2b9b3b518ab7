"""Work done ahead of its user: reading, the network and writing side by side instead of in turn."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
END = object()


def prefetch(items: Generator[T, None, None], depth: int = 1) -> Generator[T, None, None]:
    """The same items in the same order; the next ``depth`` are made in a thread while the user works on one.

    What ``items`` raises is raised here, at its place in the order. Closing this generator waits for the item under
    way, then closes ``items``. Generators of this kind can be chained: a thread for each step.
    """
    pool = ThreadPoolExecutor(1)
    try:
        ahead = deque(pool.submit(next, items, END) for _ in range(depth))
        while (item := ahead.popleft().result()) is not END:
            ahead.append(pool.submit(next, items, END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()

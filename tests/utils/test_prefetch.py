"""Work ahead: same items, same errors, one step ahead and no further, and a clean end."""

import threading
import time

import pytest

from utils.prefetch import prefetch


def counting(done: list, num: int = 10, error_at: int | None = None):
    """0, 1, ... and a trace of what was made; "closed" when it ends."""
    try:
        for number in range(num):
            if number == error_at:
                raise ValueError(f"at {number}")
            done.append(number)
            yield number
    finally:
        done.append("closed")


def settle(done: list, length: int) -> None:
    """Wait until so many entries are there (they come from another thread)."""
    limit = time.monotonic() + 10
    while len(done) < length and time.monotonic() < limit:
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_same_items_in_order(depth):
    assert list(prefetch(counting([]), depth)) == list(range(10))
    assert list(prefetch(counting([], 0), depth)) == []
    assert list(prefetch(prefetch(counting([]), depth), depth)) == list(range(10))


@pytest.mark.parametrize("depth", [1, 3])
def test_so_far_ahead_and_no_further(depth):
    done = []
    items = prefetch(counting(done), depth)
    assert next(items) == 0
    settle(done, depth + 1)
    time.sleep(0.05)
    assert done == list(range(depth + 1))
    items.close()


def test_an_error_comes_at_its_place():
    done, got = [], []
    with pytest.raises(ValueError, match="at 4"):
        for item in prefetch(counting(done, error_at=4), 3):
            got.append(item)
    assert got == [0, 1, 2, 3] and done == [0, 1, 2, 3, "closed"]


def test_leaving_early_closes_the_whole_chain():
    before, done = threading.active_count(), []
    items = prefetch(prefetch(counting(done)), 2)
    next(items)
    items.close()
    assert done[-1] == "closed" and threading.active_count() == before


def test_it_works_in_another_thread():
    def names():
        yield threading.current_thread()

    assert next(prefetch(names())) is not threading.current_thread()

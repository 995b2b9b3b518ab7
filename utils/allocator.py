"""Memory of the host that is used again instead of being given back and asked for again."""

import ctypes
import sys

# names of mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep what it frees. Returns whether its C library can be told (glibc).

    By default glibc takes every large block from the system and gives it back when it is freed. A training step asks
    for the same blocks each time, and the kernel clears and maps each of their pages anew: a quarter of a step on a
    CPU. Peak memory grows by what does not fit into a freed block, a few per cent (`benchmarks.train_step`).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))

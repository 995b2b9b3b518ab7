"""Freed memory is used again: a large block that comes back costs no page faults."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from utils.allocator import keep_freed_memory

def use():
    return np.ones(2**23) + np.ones(2**23)

if not keep_freed_memory():
    sys.exit("not glibc")
for _ in range(8):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**20)
"""


def test_blocks_that_were_freed_are_not_asked_for_again(request):
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath, check=False)
    if "not glibc" in done.stderr:
        pytest.skip("no glibc here")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 16, "MiB that the system had to hand out for 4 times three blocks of 64 MiB"


def test_other_systems_are_left_alone(monkeypatch):
    from utils import allocator

    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()

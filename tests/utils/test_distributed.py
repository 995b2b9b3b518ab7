"""Alone, everything is the identity; two processes agree. (Two processes that train: tests/test_train.py.)"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import distributed

ROOT = Path(__file__).resolve().parents[2]

TWO = """
import torch
from utils import distributed as d
device = torch.device("cpu")
with d.process_group(device):
    number = d.rank()
    assert d.world_size() == 2 and d.is_main() == (number == 0)
    own = torch.tensor([1.0 + 2 * number, 10.0], requires_grad=True)
    mean = d.all_reduce_mean(own)
    assert mean.tolist() == [2.0, 10.0] and not mean.requires_grad and own.tolist()[0] == 1.0 + 2 * number
    assert d.broadcast(f"rün {number}") == "rün 0"
    assert d.broadcast(number == 1) is False
    assert d.gather(number) == [0, 1] and d.all_reduce_max([number, 5 - number]) == [1, 5]
    d.agree({"answer": 42})
    try:
        d.agree({"answer": number})
        raise SystemExit("they do not agree")
    except d.UserError as error:
        assert str(error).startswith("process 1: answer is not that of process 0: 1 != 0"), error
    with d.main_first():
        pass
assert d.world_size() == 1
"""


LEAVES = """
import torch
from utils import distributed as d
with d.process_group(torch.device("cpu")):
    if d.rank() == LEAVER:
        raise d.Stopped("told to end, alone", 0)
    d.GOODBYE = 0.5
    d.barrier()
"""

LAST_WORDS = """
import torch
from utils import distributed as d
with d.process_group(torch.device("cpu")):
    if d.rank() == 1:
        d.gather("here")
        raise d.Stopped("told to end, as all", 0)
    d._store.set("1/0", "0")
    d._store.wait([d.FAILED])
    assert d._wait_for("1/1") == "here", "what somebody said before he left is heard"
"""


def test_alone():
    tensor = torch.ones(3, requires_grad=True)
    assert torch.equal(distributed.all_reduce_mean(tensor), tensor)
    assert not distributed.all_reduce_mean(tensor).requires_grad
    assert distributed.is_main() and distributed.world_size() == 1
    assert distributed.broadcast("text") == "text" and distributed.gather("text") == ["text"]
    assert distributed.all_reduce_max([1, 2]) == [1, 2]
    distributed.agree({"anything": 1})
    with distributed.process_group(torch.device("cpu")), distributed.main_first():
        distributed.barrier()


def test_each_process_works_on_its_own_gpu_from_the_start(monkeypatch):
    """Else pinned memory and NCCL would make a context on the first one for each of them."""
    used = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *args, **options: iter(()))  # nobody is there
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **options: None)
    with pytest.raises(StopIteration):
        distributed._join(torch.device("cuda", 1))
    assert used == [torch.device("cuda", 1)]


def of_two(code: str) -> list[tuple[int, str]]:
    """Exit codes and standard errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **group, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=40)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    return [(process.returncode, error) for process, error in zip(both, errors)]


def test_two_processes():
    assert [code for code, _ in of_two(TWO)] == [0, 0]


@pytest.mark.parametrize("leaver", [0, 1])
def test_nobody_waits_for_one_that_was_told_to_stop(leaver):
    """Before the first step a request to stop is followed at once, by whoever got it."""
    (left, text), (other, error) = of_two(LEAVES.replace("LEAVER", str(leaver)))[:: 1 if leaver == 0 else -1]
    assert left == other == 1 and "told to end, alone" in text  # 1: python's own for what nobody caught
    assert "ResourceError" in error and ("process 1: told to end, alone" in error or leaver == 0)


def test_an_answer_counts_after_its_sender_has_left():
    (heard, error), (left, _) = of_two(LAST_WORDS)
    assert heard == 0 and left == 1, error

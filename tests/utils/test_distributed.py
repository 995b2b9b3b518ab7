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
    if d.rank() == 1:
        raise d.Stopped("told to end, alone", 0)
    assert d._wait_for("goodbye/1", 20) is True
    assert d._wait_for("1/1", 0.1) is None, "a goodbye is no answer"
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


@pytest.mark.parametrize("code", [TWO, LEAVES], ids=["agree", "one leaves early"])
def test_two_processes(code):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **group, "RANK": str(rank)})
        for rank in range(2)
    ]
    codes = [process.wait(timeout=120) for process in both]
    assert codes == [0, 0 if code == TWO else 1]  # 1: python's own for what nobody caught

"""One process or several: who am I, and what do we agree on."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=30)  # rank 0 evaluates while the others wait
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def local_rank() -> int:
    """Which of this machine's devices is ours (torchrun's LOCAL_RANK)."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes where torchrun started several; nothing otherwise."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group(BACKENDS[device.type], timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, detached; the tensor itself when alone. For normalisers and logged numbers."""
    if not dist.is_initialized():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def broadcast(value: object, device: torch.device) -> object:
    """Rank 0's plain value (text, number, flag) on every process; it travels as JSON, never as pickle."""
    if not dist.is_initialized():
        return value
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    length = torch.tensor(len(data), device=device)
    dist.broadcast(length, src=0)
    if not is_main():
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return json.loads(bytes(data.tolist()).decode())


@contextmanager
def main_first() -> Iterator[None]:
    """Process 0 goes through the block first: what it leaves on disk (a data set, a cache), others find."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()

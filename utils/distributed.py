"""One process or several: who am I, and what do we agree on.

Tensors travel by collectives, plain values through a store: whoever waits for a value waits as long as it takes, with
no collective pending that could time out while process 0 evaluates.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import ResourceError, Stopped, UserError

JOIN = timedelta(seconds=25)  # to reach the store
TIMEOUT = timedelta(minutes=10)  # of a collective: the others may be slow with a step, not with an evaluation
GOODBYE = 5.0  # seconds that the store is kept for those who still read from it
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}

FAILED = "failed"  # key of the error that ended a process

_store: dist.Store | None = None
_calls = 0  # exchanges so far, the same number on all processes


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


def local_world_size() -> int:
    """How many of the processes are on this machine (torchrun's LOCAL_WORLD_SIZE)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes where torchrun started several; nothing otherwise.

    Raises:
        ResourceError: they cannot be reached, or one of them is gone.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    _join(device)
    try:
        yield
        _say_goodbye()
    except Stopped as stopped:
        _say_goodbye()
        _store.set(FAILED, f"process {rank()}: {stopped}")  # to whoever was not told
        raise
    except UserError as error:
        _store.set(FAILED, f"process {rank()}: {error}")
        raise
    except RuntimeError as error:  # what torch raises for all of this; a lost connection is told by its text
        if not isinstance(error, dist.DistError) and not any(name in str(error) for name in ("gloo", "NCCL")):
            raise
        hint = "its own error says why; train.py --resume auto continues"
        raise ResourceError(
            f"process {rank()}", f"another process of this run is gone: {_first(error)}", hint
        ) from error
    finally:
        dist.destroy_process_group()


def _join(device: torch.device) -> None:
    global _store, _calls
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else pinned memory and NCCL would take room on the first GPU for each process
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, own, world = next(dist.rendezvous("env://", timeout=JOIN))
        # torchrun starts all again with the store of those that failed: what they left there is not for us
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(BACKENDS[device.type], store=store, rank=own, world_size=world, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:  # all of it is about connections
        raise ResourceError(
            address, f"cannot join the other processes: {_first(error)}", "see MASTER_ADDR and MASTER_PORT, or torchrun"
        ) from error
    _store, _calls = dist.PrefixStore("matchbox", store), 0


def _say_goodbye() -> None:
    """Process 0 may hold the store: it leaves last."""
    _store.set(f"goodbye/{rank()}", "true")  # not by the number of an exchange, which somebody may still wait for
    for number in range(world_size()) if is_main() else ():
        for _ in _pauses(GOODBYE):  # also for one that failed
            if _store.check([f"goodbye/{number}"]):
                break


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120]


# ---------------------------------------------------------------------------------------------- tensors


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, detached; the tensor itself when alone. For normalisers and logged numbers."""
    if not dist.is_initialized():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def all_reduce_max(values: Sequence[int]) -> list[int]:
    """The largest of each number over all processes; from CPU to CPU, so that no GPU is waited for."""
    if not dist.is_initialized():
        return list(values)
    numbers = torch.tensor(values)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


# ---------------------------------------------------------------------------------------------- plain values


def broadcast(value: object) -> object:
    """Process 0's plain value (text, number, flag) on every process; it travels as JSON, never as pickle."""
    if not dist.is_initialized():
        return value
    key = _next_key()
    if is_main():
        _store.set(key, json.dumps(value))
        return value
    return _wait_for(key)


def gather(value: object) -> list:
    """Every process's plain value, in their order, on every process."""
    if not dist.is_initialized():
        return [value]
    key = _next_key()
    _store.set(f"{key}/{rank()}", json.dumps(value))
    return [_wait_for(f"{key}/{number}") for number in range(world_size())]


def barrier() -> None:
    """Wait until every process is here."""
    gather(None)


@contextmanager
def main_first() -> Iterator[None]:
    """Process 0 goes through the block first: what it leaves on disk (a data set, a cache), others find."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def agree(values: Mapping[str, object]) -> None:
    """Raises UserError where a plain value is not the same on all processes, and names the process that differs."""
    everyone = gather(dict(values))
    for number, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs[name] != value:
                raise UserError(
                    f"process {number}",
                    f"{name} is not that of process 0: {theirs[name]} != {value}",
                    "same files everywhere?",
                )


def _next_key() -> str:
    global _calls
    _calls += 1
    return str(_calls)


def _wait_for(key: str) -> object:
    """The value of a key, as soon as somebody sets it. Raises ResourceError where somebody left who might have."""
    for _ in _pauses():
        failed = _store.check([FAILED])  # first: what was said before it counts
        if _store.check([key]):
            return json.loads(_store.get(key))
        if failed:
            raise ResourceError(f"process {rank()}", f"another process failed: {_store.get(FAILED).decode()}")


def _pauses(patience: float = float("inf")) -> Iterator[None]:
    """Moments to look, ever further apart, for ``patience`` seconds."""
    pause, end = 0.001, time.monotonic() + patience
    while time.monotonic() < end:
        yield
        time.sleep(pause)
        pause = min(2 * pause, 0.05)

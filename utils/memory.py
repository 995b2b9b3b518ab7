"""How much memory work takes, and how much there is: of a GPU, or of this machine."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

from utils.trainer import is_out_of_memory

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


class HostMemory:
    """Of this process. Beyond Linux, which can forget an earlier peak, a peak is that of its whole life so far."""

    def room(self) -> int:
        """Bytes that this process can have, those it has included."""
        rooms = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
        if STATUS.is_file():
            rooms.append(_kilobytes(Path("/proc/meminfo"), "MemAvailable") + _kilobytes(STATUS, "VmRSS"))
        if LIMIT.is_file() and (text := LIMIT.read_text().strip()).isdigit():
            rooms.append(int(text))
        return min(rooms)

    def forget(self) -> None:
        """A peak is measured from here on."""
        gc.collect()
        if FORGET.exists():
            FORGET.write_text("5")

    def peak(self) -> int:
        """The most bytes since ``forget``."""
        if STATUS.is_file():
            return _kilobytes(STATUS, "VmHWM")
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class CudaMemory:
    """Of one GPU, as torch's allocator holds it."""

    def __init__(self, device: torch.device):
        self.device = device

    def room(self) -> int:
        """Bytes that this process can have, those it has included."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)

    def forget(self) -> None:
        """A peak is measured from here on."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The most bytes since ``forget``."""
        return torch.cuda.max_memory_reserved(self.device)


def memory_of(device: torch.device) -> HostMemory | CudaMemory:
    """The memory that a network on ``device`` needs."""
    return CudaMemory(device) if device.type == "cuda" else HostMemory()


def peak_of(memory: HostMemory | CudaMemory, work: Callable[[], None]) -> int | None:
    """The most bytes that are held while ``work`` is done; None where it does not fit."""
    memory.forget()
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return None
        raise
    return memory.peak()


def _kilobytes(file: Path, name: str) -> int:
    """A line ``name:  123 kB`` of a file of Linux, in bytes."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])

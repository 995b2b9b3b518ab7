"""What a run stands on: its own folder, a device, a precision, a seed."""

import errno
import os
import platform
import random
import re
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch

from utils.checkpoint import SUFFIX, read_checkpoint
from utils.distributed import broadcast, is_main, local_rank, local_world_size
from utils.errors import ResourceError, UserError
from utils.files import remove_parts
from utils.store import Found, Store

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WEIGHTS = "weights"  # folder of a run's checkpoints
LOCK = "run.lock"  # says which process writes into a run


def new_run(project: str | Path, name: str, exist_ok: bool = False) -> Path:
    """A new folder ``project/name``, ``project/name2``, ... owned by no other run, even one started at the same time.

    A newer run has a larger number, also where older ones were removed. ``exist_ok`` takes ``project/name`` as it is;
    nothing in it is removed.

    Raises:
        ResourceError: the project folder cannot be written.
    """
    project = Path(project)
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"--name {name}", "expected a plain folder name", "use --project for the folder it goes to")
    try:
        project.mkdir(parents=True, exist_ok=True)
        number = 1 if exist_ok else 1 + max(numbered_runs(project, name), default=0)
        while True:
            folder = project / (name if number == 1 else f"{name}{number}")
            try:
                folder.mkdir(exist_ok=exist_ok)
                return folder
            except FileExistsError:  # mkdir itself is the race-free question
                if exist_ok:
                    raise
                number += 1
    except OSError as error:
        raise ResourceError(project / name, f"cannot make the run folder: {error.strerror}", "see --project") from error


def numbered_runs(project: Path, name: str) -> dict[int, Path]:
    """The folders ``name``, ``name2``, ... of a project by their numbers, the oldest first."""
    pattern = re.compile(rf"{re.escape(name)}([2-9]|[1-9]\d+)?")
    folders = project.iterdir() if project.is_dir() else ()
    found = {int(match[1] or 1): folder for folder in folders if (match := pattern.fullmatch(folder.name))}
    return dict(sorted(found.items()))


def shared_new_run(project: str | Path, name: str, exist_ok: bool) -> Path:
    """One new run for all processes, with its folder of checkpoints; the first process makes it."""
    folder = ""
    if is_main():
        folder = new_run(project, name, exist_ok)
        (folder / WEIGHTS).mkdir(exist_ok=True)
    return Path(broadcast(str(folder)))


def find_run(project: str | Path, text: str) -> Found:
    """The checkpoint to continue from: a file, a run folder, or with ``""`` the newest run of the project.

    Raises:
        UserError: there is none that reads well.
    """
    if Path(text).is_file():
        if Path(text).resolve().parent.name != WEIGHTS:
            raise UserError(text, f"not in the {WEIGHTS} folder of a run", "--weights FILE starts a new run from it")
        path = Path(text).resolve()
        return Found(path, *read_checkpoint(path), [])
    folders = [Path(text)] if text else [file.parents[1] for file in Path(project).glob(f"*/{WEIGHTS}/*{SUFFIX}")]
    if not folders:
        raise UserError("--resume", f"no run with a checkpoint under {project}", "--resume RUN names one")
    newest = max(folders, key=lambda folder: (folder / WEIGHTS).stat().st_mtime_ns if text == "" else 0)
    return Store(newest / WEIGHTS).latest()


def lock_run(folder: Path) -> TextIO:
    """Make this process the only one that writes into a run, and remove what a killed one left half written.

    The lock ends with the process, however it ends, or when the file that is returned is closed. It is a record lock
    (``fcntl``) and not ``flock``: loading processes that outlive a killed run by seconds do not inherit it. Windows and
    file systems without locks have none.

    Raises:
        UserError: another process has it; names it and its machine.
        ResourceError: the folder cannot be written.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(folder / LOCK, flags, 0o644), "r+", encoding="utf-8")
    except OSError as error:
        raise ResourceError(folder, f"cannot write: {error.strerror}", "see --project") from error
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            owner = file.read().strip() or "another process"
            file.close()
            raise UserError(folder, f"{owner} trains in this folder", "wait for its end, or see --name") from error
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        for mine in (folder, folder / WEIGHTS):
            remove_parts(mine)
    except OSError as error:
        file.close()
        raise ResourceError(folder, f"cannot write: {error.strerror}", "see --project") from error
    return file


def select_device(text: str = "") -> torch.device:
    """``""`` the first GPU if there is one, else the CPU; ``cpu``; ``0`` or ``cuda:0``; under torchrun one each.

    Raises:
        UserError: no such device, or several where one process can use one.
    """
    where, text = f"--device {text}", text.strip().lower().removeprefix("cuda:").replace("cuda", "0")
    count = torch.cuda.device_count()
    if text == "cpu" or (not text and not count):
        return torch.device("cpu")
    if "," in text:
        raise UserError(
            where, "one process uses one device", f"torchrun --nproc_per_node {text.count(',') + 1} train.py"
        )
    if text and not text.isdigit():
        raise UserError(where, "expected cpu or a GPU number", "for example --device 0")
    number = int(text) if text else local_rank()
    if number >= count:
        raise UserError(where, f"no such GPU, {count} found", "--device cpu runs without one")
    return torch.device("cuda", number)


class Precision(NamedTuple):
    """How the network computes; weights stay float32."""

    name: str
    dtype: torch.dtype
    scaler: bool  # float16 gradients need scaling

    @property
    def autocast(self) -> torch.dtype | None:
        """What autocast computes in, None for no autocast."""
        return None if self.dtype == torch.float32 else self.dtype


PRECISIONS = {
    "float32": Precision("float32", torch.float32, False),
    "bf16": Precision("bf16", torch.bfloat16, False),
    "fp16": Precision("fp16", torch.float16, True),
}


def select_precision(name: str, device: torch.device) -> Precision:
    """``auto`` is bf16 where the processor multiplies it natively, else float32. fp16 needs CUDA.

    Raises:
        UserError: fp16 on a CPU.
    """
    if name == "auto":
        name = "bf16" if NATIVE_BF16[device.type]() else "float32"
    if name == "fp16" and device.type != "cuda":
        raise UserError(
            "--precision fp16", "needs a CUDA device", "--precision auto picks what this processor is fast at"
        )
    return PRECISIONS[name]


def _cpu_has_bf16() -> bool:
    flags = torch.backends.cpu.get_cpu_capability()
    if "AVX512" not in flags:
        return False
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16"})


def _cuda_has_bf16() -> bool:
    return torch.cuda.get_device_capability()[0] >= 8


NATIVE_BF16 = {"cpu": _cpu_has_bf16, "cuda": _cuda_has_bf16}


def set_seed(seed: int) -> None:
    """Seed what draws outside the loader (weights, dropout, subsampling); the loader's draws have keys of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _count_cores() -> int:
    """Cores that this process may run on: of a machine that a queue shares out, not all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores(device: torch.device, workers: int | None) -> int:
    """How many loading processes to start; None: one per core for a GPU, one per four cores for a CPU, 8 at most.

    A network on the CPU computes with the cores that are left. More threads than cores would wait for each other at
    every convolution: with one loading process too many, a step on two cores takes ten times as long.
    """
    cores = max(1, _count_cores() // local_world_size())
    if workers is None:
        workers = min(8, cores if device.type == "cuda" else cores // 4)
    if device.type == "cpu":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - workers)))
    return workers

"""Processes that load pictures die, hang, find no room; a step finds no memory."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from harness import ROOT, refused
from run_state import differences, state
from tiny import tiny_batch, tiny_step

from utils.datasets import workers as processes
from utils.datasets.loader import Draw
from utils.datasets.ring import Ring
from utils.datasets.workers import Loader, check_room
from utils.errors import ResourceError, UserError
from utils.failpoints import VARIABLE
from utils.memory import HostMemory
from utils.optim import Optim
from utils.run import PRECISIONS
from utils.trainer import Trainer


class Draws(list):
    """A batch sampler: two draws each."""

    def __init__(self, num_batches: int):
        super().__init__([Draw(0, 2 * n + m, 2 * n + m, (4, 4)) for m in range(2)] for n in range(num_batches))


class Disturbed:
    """A data set whose sample is its index; ``fault`` is called in the worker, as often as ``times``, at one index."""

    def __init__(self, folder, fault, times, at=7):
        self.folder, self.fault, self.times, self.at = folder, fault, times, at

    def make(self, draw, out):
        done = len(list(self.folder.iterdir()))
        if draw.index == self.at and done < self.times:
            (self.folder / str(done)).touch()
            self.fault()
        return draw.index

    def path(self, index):
        return f"picture{index}.jpg"


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(600)


def crash_by_signal():
    os.kill(os.getpid(), signal.SIGBUS)  # what a full /dev/shm does


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(processes, "POLL", 0.3)
    monkeypatch.setattr(processes, "PATIENCE", 1.0)


def loader_of(folder, fault, times, num_batches=12, workers=2) -> Loader:
    folder.mkdir(exist_ok=True)
    return Loader(Disturbed(folder, fault, times), Draws(num_batches), in_a_list, workers=workers, pin_memory=False)


def in_a_list(dataset, draws, allocate):
    return [dataset.make(draw, None) for draw in draws]


WHOLE = [[2 * n, 2 * n + 1] for n in range(12)]
LOSSES = [
    pytest.param(die, id="T22-killed"),
    pytest.param(crash_by_signal, id="T22-bus-error"),
    pytest.param(hang, id="T23-hangs"),
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fault", LOSSES)
def test_a_lost_worker_is_replaced_once(fault, workers, impatient, tmp_path, capsys, seen):
    """The batches are the same, in this epoch and in the next, and nothing is left behind."""
    loader = loader_of(tmp_path / "done", fault, times=1, workers=workers)
    assert list(loader) == WHOLE
    warning = capsys.readouterr().err
    assert "once more with new workers" in warning and warning.count("\n") == 1
    seen(warning.strip())
    assert list(loader) == WHOLE and capsys.readouterr().err == ""


@pytest.mark.parametrize("fault", LOSSES)
def test_the_second_loss_ends_the_run(fault, impatient, tmp_path, seen):
    loader = loader_of(tmp_path / "done", fault, times=2)
    line = refused(lambda: list(loader), where="--workers 2", says="again", exit_code=5)
    assert "picture7.jpg" in line
    seen(line)


def test_errors_of_the_data_set_are_no_losses(impatient, tmp_path):
    def raise_user_error():
        raise UserError("picture7.jpg", "is no picture")

    def raise_runtime_error():
        raise RuntimeError("a bug")

    with pytest.raises(UserError, match=r"picture7\.jpg: is no picture"):
        list(loader_of(tmp_path / "one", raise_user_error, times=9))
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker"):
        list(loader_of(tmp_path / "two", raise_runtime_error, times=9))


def test_a_slow_picture_is_no_hang(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(processes, "POLL", 0.2)
    assert list(loader_of(tmp_path / "done", lambda: time.sleep(1), times=1)) == WHOLE
    assert capsys.readouterr().err == ""


def test_an_abandoned_epoch_leaves_no_process(tmp_path):
    loader = loader_of(tmp_path / "done", die, times=0)
    batches = iter(loader)
    assert next(batches) == [0, 1]
    pids = set(loader.pids)
    batches.close()
    end = time.monotonic() + 10
    while any(_lives(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(_lives(pid) for pid in pids)
    assert list(loader) == WHOLE


def test_an_epoch_that_is_given_up_late_ends_its_own_processes(tmp_path):
    """Two iterators at once: the second one has processes of its own, which the end of the first leaves alone."""
    loader = loader_of(tmp_path / "done", die, times=0)
    first, second = iter(loader), iter(loader)
    assert next(first) == [0, 1]
    old = _all_of(loader)
    assert next(second) == [0, 1]
    new = _all_of(loader)
    first.close()
    end = time.monotonic() + 10
    while any(_lives(pid) for pid in old) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(_lives(pid) for pid in old) and all(_lives(pid) for pid in new)
    assert [[0, 1], *second] == WHOLE


def _all_of(loader) -> set[int]:
    """The processes of a loader, once each of them has begun."""
    end = time.monotonic() + 10
    while 0 in (pids := set(loader.pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return pids


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_dead_worker_does_not_interrupt_the_program(tmp_path):
    """torch's SIGCHLD handler would raise here, in the middle of a step."""
    loader = loader_of(tmp_path / "done", die, times=0)
    batches = iter(loader)
    next(batches)
    os.kill(loader.pids[0], signal.SIGKILL)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        sum(range(1000))
    assert [[0, 1], *batches] == WHOLE


def kill_a_worker() -> None:
    """SIGKILL to a loading process of the run, in its fifth step."""
    from utils import trainer
    from utils.datasets.workers import Loader

    loaders, make, step = [], Loader.__init__, trainer.Trainer._take_step

    def made(self, *args, **options):
        make(self, *args, **options)
        loaders.append(self)

    def disturbed(self, *args):
        if self.step == 3:
            os.kill(loaders[0].pids[0], signal.SIGKILL)
        step(self, *args)

    Loader.__init__, trainer.Trainer._take_step = made, disturbed
    processes.POLL = 0.3


@pytest.mark.parametrize("workers", ["1", "2"], ids=["T22-run-1", "T22-run-2"])
def test_a_run_whose_worker_is_killed_ends_equal(workers, runs, seen):
    run = runs.new()
    ended = runs.begin(run, "--workers", workers, before=kill_a_worker)
    assert ended.code == 0 and not differences(state(run), runs.undisturbed())
    seen("the run's result is equal")


Usage = namedtuple("Usage", "total used free")


def test_t24_too_little_shared_memory(monkeypatch, tmp_path, seen):
    """Docker's 64 MB hold what boxes take; pictures go through memory that no mount limits."""
    monkeypatch.setattr(processes, "SHARED_MEMORY", tmp_path)
    free = 64 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
    batch_bytes = 16 * 3 * 416 * 416
    check_room(0, batch_bytes)
    check_room(8, batch_bytes)
    free = 2**20
    line = refused(lambda: check_room(2, batch_bytes), where="--workers 2", says="has 1 MB free", exit_code=5)
    assert "--shm-size" in line and "--workers 0" in line
    seen(line)


def test_pictures_on_their_way_need_memory(monkeypatch):
    monkeypatch.setattr(HostMemory, "room", lambda self: 10**9)
    check_room(2, 10**7)
    line = refused(lambda: check_room(2, 10**8), where="--workers 2", says="1000 MB of memory", exit_code=5)
    assert "--batch-size" in line and "--workers" in line


@pytest.mark.skipif(not processes.SHARED_MEMORY.is_dir(), reason="no /dev/shm on this system")
def test_t24_counts_what_a_ring_takes(tmp_path):
    """The slots of a ring, written all over, take nothing of what is counted there."""
    before = shutil.disk_usage(processes.SHARED_MEMORY).free
    ring = Ring(1, 1, 2**26)
    ring.memory[:] = 1
    assert before - shutil.disk_usage(processes.SHARED_MEMORY).free < 2**25


def full_shared_memory() -> None:
    shutil.disk_usage = lambda path: Usage(1, 0, 1 if str(path) == "/dev/shm" else 10**12)


@pytest.mark.skipif(not processes.SHARED_MEMORY.is_dir(), reason="no /dev/shm on this system")
def test_t24_before_anything_is_written(runs):
    run = runs.new()
    ended = runs.begin(run, "--workers", "1", before=full_shared_memory)
    assert ended.code == 5 and "/dev/shm" in ended.error_line() and not run.parent.exists()


FEW_FILES = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
CHECK = """
sys.path.insert(0, {root!r})
from utils.datasets.workers import check_room
from utils.errors import run_main
run_main(lambda: check_room(2, 1))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def few_files(soft: int, hard: int) -> subprocess.CompletedProcess:
    code = FEW_FILES.format(soft=soft, hard=hard) + CHECK.format(root=str(ROOT))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_t25_few_open_files(seen):
    raised = few_files(64, 1024)
    assert raised.returncode == 0 and int(raised.stdout) >= 200, raised.stderr  # as far as the system lets it
    ended = few_files(64, 64)
    assert ended.returncode == 5 and "64 open files are allowed" in ended.stderr and "ulimit -n" in ended.stderr
    assert "Traceback" not in ended.stderr
    seen(ended.stderr.strip())


@pytest.mark.slow
def test_t26_memory_of_workers_stays(runs, tmp_path, seen):
    """Resident memory of the run and of its loading process, at the 5th and the 25th epoch."""
    run = runs.new()
    running = runs.server.start(
        "train.py", *runs.arguments, "--epochs", "30", "--workers", "1", "--project", run.parent
    )
    sizes = {}
    while running.process.exitcode is None:
        rows = run / "log.jsonl"
        epoch = len(rows.read_text().splitlines()) if rows.exists() else 0
        if epoch in (5, 25):
            sizes.setdefault(epoch, _resident(running.pid))
        running.process.join(0.01)
    assert running.wait().code == 0 and set(sizes) == {5, 25}
    for name, before in sizes[5].items():
        assert sizes[25][name] < 1.05 * before, sizes
    seen(f"MB at epochs 5 and 25: {sizes}")


def _resident(pid: int) -> dict[str, float]:
    """MB of a process and of all its children."""

    def size(number: int) -> float:
        with open(f"/proc/{number}/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * resource.getpagesize() / 1e6

    with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123
        children = sorted(map(int, file.read().split()))
    return {"run": size(pid)} | {f"worker{n}": size(child) for n, child in enumerate(children[:1])}


# ---------------------------------------------------------------------------------------------- memory of a step


def test_t21_out_of_memory_once(runs, seen):
    """Tried again after freeing what can be freed; the result is the same."""
    run = runs.new()
    ended = runs.begin(run, before=no_memory_once)
    assert ended.code == 0 and not differences(state(run), runs.undisturbed())
    seen("once: tried again, the result is equal")


def no_memory_once() -> None:
    from utils import trainer

    forward, failed = trainer.Trainer._forward, []

    def disturbed(self, batch):
        terms = forward(self, batch)  # its batch norms have seen the batch by now
        if self.step == 4 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return terms

    trainer.Trainer._forward = disturbed


def test_t21_out_of_memory_twice(runs, seen):
    run = runs.new()
    ended = runs.begin(run, env={VARIABLE: "step:5:oom"})
    line = ended.error_line()
    assert (
        ended.code == 5 and "step 4" in line and "2 pictures of 64 x 64 do not fit" in line and "--batch-size" in line
    )
    seen(line)
    runs.assert_ends_equal(run)  # from the end of the first epoch


LIMITED = """
import resource, sys
sys.path[:0] = {paths!r}
import torch
from tiny import tiny_batch, tiny_step
from utils.errors import run_main
from utils.optim import Optim
from utils.run import PRECISIONS
from utils.trainer import Trainer
options = dict(optim=Optim(nominal_batch=4), device=torch.device("cpu"), precision=PRECISIONS["float32"])
teacher = Trainer(tiny_step(), num_batches=2, batch_size=4, epochs=1, **options)
def batches():
    yield tiny_batch(range(4))
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
    large = tiny_batch(range(4))
    yield type(large)(images=large.images.repeat(1, 1, 40, 40), targets=large.targets, infos=())
run_main(lambda: teacher.train_epoch(batches()))
"""


def test_t21_the_memory_of_a_cpu(seen):
    """A real refusal by the system: RLIMIT_AS."""
    code = LIMITED.format(paths=[str(ROOT), str(ROOT / "tests" / "utils")])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ended.returncode == 5 and "Traceback" not in ended.stderr, ended.stderr
    assert "4 pictures of 2560 x 2560 do not fit" in ended.stderr and "memory" in ended.stderr
    seen(ended.stderr.strip())


def test_other_errors_of_a_step_are_not_tried_again():
    optim = Optim(nominal_batch=4)
    options = {"optim": optim, "device": torch.device("cpu"), "precision": PRECISIONS["float32"]}
    trainer = Trainer(tiny_step(), num_batches=1, batch_size=4, epochs=1, **options)
    calls = []

    def broken(batch):
        calls.append(batch)
        raise RuntimeError("shapes do not match")

    trainer._forward = broken
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.train_epoch([tiny_batch(range(4))])
    assert len(calls) == 1 and not isinstance(calls[0], ResourceError) and np.isfinite(trainer.step)

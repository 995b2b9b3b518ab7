"""What a training is said to take: the batch that fits, times, memory, disk, and plans that are refused."""

import mmap
import sys
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "utils"))

from tiny import CFG, SIZE, tiny_step, write_pictures  # noqa: E402

import train  # noqa: E402
from utils.datasets.loader import TrainSampler  # noqa: E402
from utils.errors import ResourceError  # noqa: E402
from utils.memory import memory_of, peak_of  # noqa: E402
from utils.plan import Plan, fitting_batch, forward_backward, span, trial_batch  # noqa: E402
from utils.run import PRECISIONS  # noqa: E402
from utils.structures import Record  # noqa: E402

CPU, EXACT = torch.device("cpu"), PRECISIONS["float32"]
PLAN = Plan(
    epochs=10, steps=50, num_steps=20, step_seconds=0.5, wait_share=0.1, evaluation_seconds=10.0, num_evaluations=11,
    batch_size=8, peaks={8: 3_000_000_000, 16: 5_000_000_000, 32: None}, room=8_000_000_000, where="cuda:0",
    disk_needed=1_000_000_000, disk_free=5_000_000_000, folder=Path("runs"),
)  # fmt: skip


def record(num: int) -> Record:
    boxes, nobody = np.tile(np.float32([[0, 0, 100, 50]]), (num, 1)), np.zeros(num, bool)
    return Record(
        path="x", size=(100, 200), boxes=boxes, labels=np.zeros(num, np.int64), ignore=nobody, crowd=nobody,
        area=boxes[:, 2] * boxes[:, 3],
    )  # fmt: skip


def test_a_trial_batch_is_as_full_as_training_may_be():
    records = [record(num) for num in (0, 1, 7, 3, 5)]
    batch = trial_batch(records, 2, (64, 96), 3)
    assert batch.images.shape == (2, 3, 64, 96) and batch.images.dtype == torch.uint8
    assert batch.targets.image.bincount().tolist() == [7, 5]
    assert batch.targets.boxes.unique(dim=0).tolist() == [[0, 0, 48, 32]]
    assert trial_batch(records, 1, (64, 96), 1, mosaic=True).targets.max_per_image == 7 + 5 + 3 + 1
    assert len(trial_batch(records[:1], 3, (64, 96), 3).targets) == 0
    assert trial_batch(records, 9, (64, 96), 3, mosaic=True).targets.image.bincount().sum() == 4 * 9 // 5 * 16 + 7


@pytest.mark.parametrize(
    ("per_picture", "room", "expected"),
    [(1, 1000, 32), (10, 1000, 32), (30, 1000, 16), (100, 1000, 4), (700, 1000, 1)],
)
def test_the_largest_batch_that_fits(monkeypatch, per_picture, room, expected):
    """A network that takes 100 bytes and so many for each picture, on a machine with 1000, of which 80 % count."""
    tried = []
    monkeypatch.setattr("utils.plan.MORE_STATE", 0)
    monkeypatch.setattr("utils.plan.memory_of", lambda device: type("Memory", (), {"room": lambda self: room})())
    monkeypatch.setattr("utils.plan.peak_of", lambda memory, work: 100 + per_picture * (work() or tried[-1]))
    monkeypatch.setattr("utils.plan.forward_backward", lambda step, batch, *rest: tried.append(batch) or None)
    num, line = fitting_batch(tiny_step(), lambda num: num, CPU, EXACT, most=32)
    assert num == expected and line.startswith(f"batches of {expected}: ")
    assert all(100 + per_picture * num <= 0.8 * room for num in tried[:-1])


def test_out_of_memory_ends_the_search_and_one_picture_must_fit(monkeypatch):
    def step_with(limit):
        def step(tried, batch, *rest):
            if batch > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return step

    monkeypatch.setattr("utils.plan.forward_backward", step_with(6))
    assert fitting_batch(tiny_step(), lambda num: num, CPU, EXACT, most=64)[0] == 4
    monkeypatch.setattr("utils.plan.forward_backward", step_with(0))
    with pytest.raises(ResourceError, match="--batch-size auto: no picture fits"):
        fitting_batch(tiny_step(), lambda num: num, CPU, EXACT, most=64)


def test_trying_changes_nothing():
    step = tiny_step()
    before, state = {name: value.clone() for name, value in step.state_dict().items()}, torch.get_rng_state()
    make = lambda num: trial_batch([record(3)], num, (SIZE, SIZE), 3)  # noqa: E731
    assert fitting_batch(step, make, CPU, EXACT, most=5)[0] == 4
    assert all(torch.equal(value, before[name]) for name, value in step.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in step.parameters())
    forward_backward(step, make(2), CPU, EXACT)
    assert all(p.grad is None for p in step.parameters())


def test_memory_of_this_machine_is_measured():
    memory = memory_of(CPU)

    def touch(size):  # pages from the system: what the allocator kept of earlier tests does not count
        np.frombuffer(mmap.mmap(-1, size), np.uint8)[:] = 1

    small, large = (peak_of(memory, partial(touch, size)) for size in (1, 200_000_000))
    assert large - small > 150_000_000 and memory.room() > small
    with pytest.raises(RuntimeError, match="shape"):
        peak_of(memory, lambda: torch.ones(2).view(3))


def test_a_plan_adds_up():
    assert PLAN.seconds == 10 * 50 * 0.5 + 11 * 10
    text = PLAN.table(datetime(2026, 1, 31, 23, 56))
    assert "10 epochs, 11 evaluations: 6 min" in text and "Sunday 01 February 2026, 00:02" in text
    assert "memory at 16      5.00 GB of 8.00 GB" in text and "memory at 32      does not fit" in text
    assert "the network is the bottleneck" in text
    assert "the loading is the bottleneck" in replace(PLAN, wait_share=0.5).table(datetime(2026, 1, 1))
    PLAN.refuse()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peaks": {8: 9_000_000_000}}, "batches of 8 need 9.00 GB of 8.00 GB"),
        ({"peaks": {8: None}}, "--batch-size auto"),
        ({"disk_needed": 6_000_000_000}, "5.00 GB free, checkpoints need up to 6.00 GB"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ResourceError, match=words):
        replace(PLAN, **changes).refuse()


def test_times_in_words():
    assert [span(seconds) for seconds in (0.04, 99, 100, 3599, 5400, 200_000)] == [
        "0.0 s", "99.0 s", "2 min", "1 h 0 min", "1 h 30 min", "2 d 7 h",
    ]  # fmt: skip


@pytest.fixture
def command(tmp_path, monkeypatch):
    """``command(*flags)``: train.py on six pictures."""
    yaml, cfg = write_pictures(tmp_path), tmp_path / "tiny.cfg"
    cfg.write_text(CFG)
    fixed = ["train.py", "--data", str(yaml), "--cfg", str(cfg), "--device", "cpu", "--workers", "0"]

    def run(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", [*fixed, "--project", str(tmp_path / "runs"), *flags])
        train.main()

    return run


def test_a_dry_run_writes_nothing_and_says_everything(command, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    command("--dry-run", "--epochs", "7", "--batch-size", "4")
    said = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    for words in (
        "mean of 20, on cpu",
        "an epoch          1 steps",
        "7 epochs, 8 evaluations",
        "memory at 8 ",
        "disk ",
    ):
        assert words in said, words


def test_a_dry_run_refuses_a_full_disk(command, monkeypatch):
    monkeypatch.setattr("utils.plan.shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match="checkpoints need up to"):
        command("--dry-run", "--save-period", "1")


def test_an_automatic_batch_is_a_step_of_the_recipe(command, tmp_path, monkeypatch, capsys):
    sizes, sampler = [], TrainSampler.__init__

    def noted(self, num: int, batch_size: int, **options) -> None:
        sizes.append(batch_size)
        sampler(self, num, batch_size, **options)

    monkeypatch.setattr(TrainSampler, "__init__", noted)
    command("--batch-size", "auto", "--epochs", "1")
    assert sizes == [4]  # of the six pictures there are, the largest power of two
    assert "batches of 4: " in capsys.readouterr().out
    assert "batch_size: 4" in (tmp_path / "runs" / "exp" / "args.yaml").read_text()
    command("--batch-size", "auto", "--epochs", "2", "--resume", str(tmp_path / "runs" / "exp"))
    assert sizes == [4, 4]

"""Run folders are never shared or emptied; devices and precisions that do not exist are refused."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from utils.errors import ResourceError, UserError
from utils.run import new_run, select_device, select_precision, share_cores


def test_runs_are_numbered_and_nothing_is_removed(tmp_path):
    first = new_run(tmp_path / "runs", "exp")
    (first / "thesis.txt").write_text("mine")
    assert [new_run(tmp_path / "runs", "exp").name for _ in range(2)] == ["exp2", "exp3"]
    assert new_run(tmp_path / "runs", "exp", exist_ok=True) == first
    assert (first / "thesis.txt").read_text() == "mine"


def test_a_newer_run_has_a_larger_number(tmp_path):
    """Else ``--resume auto``, which takes the largest, would continue an older one."""
    for name in ("exp", "exp3", "exp1", "exp02", "expert", "exp3b"):
        (tmp_path / name).mkdir()
    assert new_run(tmp_path, "exp").name == "exp4" and new_run(tmp_path, "exp[3]").name == "exp[3]"


def test_runs_that_start_together_get_different_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_run(tmp_path, "exp"), range(24)))
    assert len(set(folders)) == 24


def test_a_project_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match=r"cannot make the run folder"):
        new_run(tmp_path / "file", "exp")
    (tmp_path / "exp").write_text("x")
    with pytest.raises(ResourceError, match=r"cannot make"):
        new_run(tmp_path, "exp", exist_ok=True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_project(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match=r"Permission denied"):
        new_run(tmp_path, "exp")


@pytest.mark.parametrize("name", ["", "a/b", "..", "/x"])
def test_names_that_are_paths(tmp_path, name):
    with pytest.raises(UserError, match=r"plain folder name"):
        new_run(tmp_path, name)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("") == torch.device("cuda", 0)
    assert select_device("cuda:1") == select_device("1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_device("") == torch.device("cuda", 1)
    for text, message in (("2", "no such GPU, 2 found"), ("0,1", "torchrun"), ("gpu", "expected cpu or a GPU number")):
        with pytest.raises(UserError, match=message):
            select_device(text)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert select_device("") == torch.device("cpu")


@pytest.mark.parametrize(
    ("allowed", "processes", "kind", "workers", "threads"),
    [(4, 1, "cuda", 4, 32), (4, 1, "cpu", 1, 3), (64, 8, "cuda", 8, 32), (1, 1, "cpu", 0, 1), (2, 8, "cuda", 1, 32)],
)
def test_cores_are_those_that_may_be_used_on_this_machine(monkeypatch, allowed, processes, kind, workers, threads):
    """Not all of a machine that a queue shares out, and not divided among the processes of other machines."""
    had = []
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 32)
    monkeypatch.setattr(torch, "set_num_threads", had.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert share_cores(torch.device(kind), None) == workers
    assert (had or [32]) == [threads]


def test_precisions():
    cpu = torch.device("cpu")
    assert select_precision("float32", cpu).dtype == torch.float32
    assert select_precision("auto", cpu).name in ("float32", "bf16")
    assert select_precision("fp16", torch.device("cuda")).scaler
    with pytest.raises(UserError, match=r"needs a CUDA device"):
        select_precision("fp16", cpu)

"""train.py and its folder: a disk that fills, a folder that is read-only or vanishes, runs that meet in one."""

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from harness import ROOT

from utils.checkpoint import read_checkpoint
from utils.failpoints import VARIABLE
from utils.store import Store

ROOM = 20_000  # bytes: less than a checkpoint of the tiny network, more than any other file of its run


def rows(run: Path) -> list[str]:
    with (run / "results.csv").open(encoding="utf-8", newline="") as file:
        return [row["epoch"] for row in csv.DictReader(file)]


def newest_step(run: Path) -> int:
    return Store(run / "weights").latest().meta["step"]


@pytest.fixture
def mounted(tmp_path):
    """``mounted(options)``: a small disk of its own."""
    place = tmp_path / "disk"

    def mount(options: str) -> Path:
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        return place

    yield mount
    if place.is_dir() and os.path.ismount(place):
        subprocess.run(["umount", "-l", place], check=True)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_t7_files_that_may_not_grow(server, tiny_run, tmp_path, seen):
    """No save ever fits: two warnings, then exit code 5; the run's other files are there, no temporary one."""
    done = server.run("train.py", *tiny_run, "--project", tmp_path, before=partial(limit_files, ROOM))
    line = done.error_line()
    assert done.code == 5 and "3 saves in a row failed" in line and "File too large" in line
    assert (done.out + done.err).count("not saved, the next save tries again") == 2
    assert not [file for file in tmp_path.rglob("*") if file.name.endswith((".part", ".safetensors"))]
    assert (tmp_path / "exp" / "results.csv").exists()
    seen(line.replace(str(tmp_path), ""))


def test_t7_a_disk_that_fills_during_a_run(server, tiny_run, mounted, seen):
    """Somebody else fills it after the first epoch: the older checkpoints stay, and the run continues from them."""
    disk = mounted("size=4m")
    running = server.start(
        "train.py", *tiny_run, "--project", disk, "--noval", "--save-interval", "0", env={VARIABLE: "step:5:sleep=1.5"}
    )
    wait_for(lambda: (disk / "exp" / "results.csv").exists() and newest_step(disk / "exp") == 4)
    fill = disk / "somebody's.bin"
    with fill.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    done = running.wait()
    line = done.error_line()
    assert done.code == 5 and "No space left on device" in line
    assert newest_step(disk / "exp") == 4 and not list(disk.rglob("*.part"))
    fill.unlink()
    again = server.run("train.py", *tiny_run, "--noval", "--project", disk, "--resume", disk / "exp")
    assert again.code == 0 and rows(disk / "exp") == ["0", "1", "2"] and newest_step(disk / "exp") == 9
    seen(line.replace(str(disk), ""))


def test_t7_a_row_that_does_not_fit_once(server, tiny_run, tmp_path, seen):
    """The log is complete again with the next epoch."""
    done = server.run("train.py", *tiny_run, "--project", tmp_path, env={VARIABLE: "csv.append:2:enospc"})
    assert done.code == 0 and rows(tmp_path / "exp") == ["0", "1", "2"]
    (warning,) = [line for line in (done.out + done.err).splitlines() if line.startswith("warning")]
    seen(warning.replace(str(tmp_path), ""))


def test_t7_rows_that_never_fit(server, tiny_run, tmp_path, seen):
    """The training ends and is saved; that its log is missing is an error."""
    done = server.run("train.py", *tiny_run, "--project", tmp_path, env={VARIABLE: "csv.append:1+:enospc"})
    assert done.code == 5 and newest_step(tmp_path / "exp") == 9
    seen(done.error_line().replace(str(tmp_path), ""))


def test_t7_the_last_save_must_succeed(server, tiny_run, tmp_path, seen):
    """Also where it is the first one (--nosave): a run that is not saved did not end well."""
    done = server.run("train.py", *tiny_run, "--project", tmp_path, "--nosave", env={VARIABLE: "save.open:1:enospc"})
    assert done.code == 5 and "the last save failed" in done.error_line()
    done = server.run("train.py", *tiny_run, "--project", tmp_path, env={VARIABLE: "save.open:3:enospc"})
    assert done.code == 5 and newest_step(tmp_path / "exp2") == 6 and not (tmp_path / "exp2/summary.json").exists()
    seen(done.error_line().replace(str(tmp_path), ""))


def test_t7_the_best_epoch_is_one_that_was_saved(server, tiny_run, tmp_path):
    """The save of a new best fails: the run's best is the epoch whose weights there are."""
    done = server.run(
        "train.py", *tiny_run, "--project", tmp_path, before=rising, env={VARIABLE: "save.write:20:enospc"}
    )
    assert done.code == 0 and "not saved" in done.out, done.err
    best = read_checkpoint(tmp_path / "exp" / "weights" / "best.safetensors")[1]["best"]
    assert best == {"fitness": 0.3, "epoch": 2}
    done = server.run(
        "train.py", *tiny_run, "--project", tmp_path, before=early, env={VARIABLE: "save.write:20:enospc"}
    )
    assert done.code == 0 and "not saved" in done.out, done.err
    summary = json.loads((tmp_path / "exp2" / "summary.json").read_text())
    best = read_checkpoint(tmp_path / "exp2" / "weights" / "best.safetensors")[1]["best"]
    assert summary["best"] == best == {"fitness": 0.1, "epoch": 0}


def fitness_of_epochs(*values: float) -> None:
    from utils import fitness

    left = list(values)
    fitness.fitness = lambda scalars: left.pop(0)


rising, early = partial(fitness_of_epochs, 0.1, 0.2, 0.3), partial(fitness_of_epochs, 0.1, 0.2, 0.05)


def test_what_another_run_left_is_not_looked_at(server, tiny_run, tmp_path):
    """--exist-ok into a run's folder, with checkpoints after the last epoch only: its best stays there, unused."""
    assert server.run("train.py", *tiny_run, "--project", tmp_path).code == 0
    done = server.run("train.py", *tiny_run, "--project", tmp_path, "--exist-ok", "--nosave", before=early)
    assert done.code == 0 and "weights/last.safetensors" in done.out.rpartition("best epoch")[2], done.out


def test_t7_a_disk_that_is_too_small_to_begin(server, tiny_run, mounted, seen):
    disk = mounted("size=64k")
    done = server.run("train.py", *tiny_run, "--project", disk)
    assert done.code == 5 and "3 checkpoints need" in done.error_line()
    assert not list(disk.rglob("*.safetensors"))
    seen(done.error_line().replace(str(disk), ""))


def test_t8_a_read_only_disk(server, tiny_run, mounted, seen):
    disk = mounted("ro")
    done = server.run("train.py", *tiny_run, "--project", disk / "runs")
    assert done.code == 5 and "Read-only file system" in done.error_line() and "epoch" not in done.out
    seen(done.error_line().replace(str(disk), ""))


def test_t8_a_run_that_became_read_only(server, tiny_run, mounted, seen):
    disk = mounted("size=4m")
    assert server.run("train.py", *tiny_run, "--noval", "--project", disk).code == 0
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = server.run("train.py", *tiny_run, "--epochs", "4", "--project", disk, "--resume", disk / "exp")
    assert done.code == 5 and "Read-only file system" in done.error_line()
    assert newest_step(disk / "exp") == 9
    seen(done.error_line().replace(str(disk), ""))


def test_t8_a_folder_that_vanishes(server, tiny_run, tmp_path, seen):
    running = server.start("train.py", *tiny_run, "--project", tmp_path, env={VARIABLE: "step:5:sleep=1.5"})
    wait_for(lambda: (tmp_path / "exp" / "weights" / "last.safetensors").exists())
    time.sleep(0.3)
    shutil.rmtree(tmp_path / "exp")
    done = running.wait()
    assert done.code == 0, done.err
    assert newest_step(tmp_path / "exp") == 9 and rows(tmp_path / "exp") == ["0", "1", "2"]
    seen("folder made again; the run ends well, all rows and the newest checkpoints are in it")


def test_t9_a_second_run_is_refused(server, tiny_run, tmp_path, seen):
    first = server.start("train.py", *tiny_run, "--project", tmp_path, "--exist-ok", env={VARIABLE: "step:2:sleep=3"})
    wait_for(lambda: (tmp_path / "exp" / "run.lock").exists() and (tmp_path / "exp" / "network.cfg").exists())
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "exp").glob("*.yaml")}
    second = server.run("train.py", *tiny_run, "--project", tmp_path, "--exist-ok")
    line = second.error_line()
    assert second.code == 2 and f"process {first.pid} on {os.uname().nodename}" in line
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "exp").glob("*.yaml")} == before
    assert first.wait().code == 0 and rows(tmp_path / "exp") == ["0", "1", "2"]
    seen(line.replace(str(tmp_path), "").replace(os.uname().nodename, "HOST"))


def test_t9_resume_while_it_runs_is_refused(server, tiny_run, tmp_path):
    first = server.start("train.py", *tiny_run, "--project", tmp_path, env={VARIABLE: "step:5:sleep=3"})
    wait_for(lambda: (tmp_path / "exp" / "weights" / "last.safetensors").exists())
    second = server.run("train.py", *tiny_run, "--project", tmp_path, "--resume", tmp_path / "exp")
    assert second.code == 2 and f"process {first.pid} on" in second.error_line()
    assert first.wait().code == 0


def test_t9_a_killed_run_leaves_no_lock(server, tiny_run, tmp_path):
    killed = server.run("train.py", *tiny_run, "--project", tmp_path, env={VARIABLE: "step:5:SIGKILL"})
    assert killed.code == -9 and (tmp_path / "exp" / "run.lock").exists()
    assert server.run("train.py", *tiny_run, "--project", tmp_path, "--resume", tmp_path / "exp").code == 0


def test_t10_four_runs_of_one_name(server, tiny_run, tmp_path, seen):
    started = [server.start("train.py", *tiny_run, "--noval", "--epochs", "1", "--project", tmp_path) for _ in range(4)]
    assert [running.wait().code for running in started] == [0] * 4
    runs = sorted(folder.name for folder in tmp_path.iterdir())
    assert runs == ["exp", "exp2", "exp3", "exp4"] and all(rows(tmp_path / run) == ["0"] for run in runs)
    seen("4 starts, 4 folders")


def note_writes(list_of_paths: Path) -> None:
    """Every file that this process opens to write, as it does."""
    notes = os.open(list_of_paths, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event, args):
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            os.write(notes, f"{args[0]}\n".encode())

    sys.addaudithook(hook)


def test_s14_a_run_writes_into_its_folder_only(server, tiny_run, tmp_path, seen):
    notes = tmp_path / "notes"
    done = server.run(
        "train.py", *tiny_run, "--project", tmp_path / "runs", pictures=True, before=partial(note_writes, notes)
    )
    assert done.code == 0
    written = {(ROOT / path).resolve() for path in notes.read_text(encoding="utf-8").splitlines()} - {Path(os.devnull)}
    run = tmp_path / "runs" / "exp"
    assert any(path.name.endswith(".part") for path in written)
    outside = [path for path in written if not path.is_relative_to(run)]
    assert [path for path in outside if not str(path).startswith("/dev/shm/pym-")] == []  # nameless shared memory
    seen(f"{len(written)} files written, all in the run's folder")


def wait_for(happened, timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)

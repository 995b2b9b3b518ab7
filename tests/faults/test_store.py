"""Nothing that was saved is lost: damaged files, full disks, links, planted files, two runs, other people's hands."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import store_checks as checks
import torch
from harness import refused

from utils import checkpoint
from utils.checkpoint import read_checkpoint, write_checkpoint
from utils.errors import ResourceError
from utils.run import LOCK, find_run, lock_run, new_run
from utils.store import Store

GOLDEN = sorted((Path(__file__).parent / "checkpoints").iterdir())

CHECKS = {
    "T2-every-call": checks.survives_a_kill_at_every_call,
    "T34-power": checks.survives_a_power_failure,
    "T35-two": checks.keeps_two_at_every_call,
    "T35-verify-first": checks.verifies_before_it_rotates,
    "T7-tries-again": checks.tries_again,
    "W15-bits": checks.notices_every_flipped_bit,
    "W16-newest-damaged": checks.falls_back_to_an_older_one,
    "W18-links": checks.replaces_links,
    "W20-in-place": checks.never_rewrites_in_place,
    "W9-pickle": checks.executes_nothing,
    "T17-T20-finite": checks.commits_finite_numbers_only,
    "W16-T27-order": checks.asks_no_clock,
    "T9-second": checks.refuses_a_second_run,
    "T9-stale": checks.takes_over_a_stale_lock,
    "bits": checks.keeps_every_bit,
    "S14-planted": checks.writes_no_planted_file,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """An empty folder of checkpoints."""
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in CHECKS.items()])
def test_store(check, folder, seen):
    seen(check(folder))


@pytest.mark.parametrize(
    ("point", "action"),
    [
        pytest.param("save.open:1+", "enospc", id="T7-open"),
        pytest.param("save.write:1+", "enospc", id="T7-first-block"),
        pytest.param("save.write:9+", "enospc", id="T7-in-the-middle"),
        pytest.param("save.fsync:1+", "eio", id="T7-fsync"),
        pytest.param("save.prune:1+", "eio", id="T7-prune"),
        pytest.param("save.open:1+", "eacces", id="W19-open"),
        pytest.param("save.open:1+", "erofs", id="T8-read-only-disk"),
    ],
)
def test_a_disk_that_takes_nothing(point, action, folder, seen):
    seen(checks.outlives_a_full_disk(folder, point, action))


def test_w19_a_rename_that_is_denied(folder, monkeypatch, seen):
    store, said = checks.saved(folder, 1, 2), []
    store.say = said.append

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", denied)
    assert not checks.save(store, 3)
    monkeypatch.undo()
    assert checks.valid_steps(folder) == [1, 2] and len(list(folder.iterdir())) == 2
    seen(said[0].replace(str(folder), "weights"))


def test_w16_none_is_good(folder, seen):
    store = checks.saved(folder, 1, 2)
    for file in folder.iterdir():
        file.write_bytes(b"junk")
    text = refused(store.latest, where=str(folder), says="no readable checkpoint among 2")
    assert str(store.last) in text and str(store.previous) in text
    seen(text.replace(str(folder), "weights"))


def test_w16_resume_says_what_it_passed_over(tmp_path):
    run = new_run(tmp_path, "exp")
    (run / "weights").mkdir()
    store = checks.saved(run / "weights", 1, 2)
    store.last.write_bytes(b"")
    found = find_run(tmp_path, "")
    assert found.path == store.previous and str(store.last) in str(found.passed_over[0])


def test_w17_a_newer_version(folder, monkeypatch, seen):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    monkeypatch.setitem(checkpoint.CHECKSUMS, checkpoint.FORMAT, checkpoint.CHECKSUMS[2])
    write_checkpoint(folder / "last.safetensors", checks.tensors(1), {"step": 1})
    monkeypatch.undo()
    found = f"format {checkpoint.FORMAT + 1}, this version reads up to {checkpoint.FORMAT}"
    text = refused(lambda: read_checkpoint(folder / "last.safetensors"), where=str(folder), says=found)
    seen(text.replace(str(folder), "weights"))


@pytest.mark.parametrize("path", [pytest.param(path, id=f"W17-{path.stem}") for path in GOLDEN])
def test_every_format_so_far_is_read(path):
    tensors, meta = read_checkpoint(path)
    assert path.stem == f"format{meta['format']}" and meta["step"] == 12 and meta["names"] == ["a", "b"]
    assert meta["best"] == {"fitness": 0.1 + 0.2, "epoch": 2} and "ü" in meta["cfg"]
    assert torch.equal(tensors["model.weight"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(tensors["ema.weight"] * 4, tensors["model.weight"])


def test_w17_there_is_a_golden_file_of_each_format():
    assert [path.stem for path in GOLDEN] == [f"format{number}" for number in range(1, checkpoint.FORMAT + 1)]


@pytest.mark.parametrize("number", ["0", '"2"', "null", "-1", "true", "[]"])
def test_w17_versions_that_are_none(number, folder):
    path = folder / "last.safetensors"
    write_checkpoint(path, checks.tensors(1), {"step": 1})
    path.write_bytes(path.read_bytes().replace(b'\\"format\\": 2', f'\\"format\\": {number}'.encode().ljust(12)[:40]))
    refused(lambda: read_checkpoint(path), where=str(path), says="damaged")


def test_s15_foreign_hands(folder, capsys, seen):
    said = checks.warns_of_foreign_hands(folder, capsys)
    assert said.startswith("warning: weights/last.safetensors: anybody on this machine may change it")
    seen(said)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_s15_another_owner(folder, capsys, seen):
    store = checks.saved(folder, 1)
    os.chown(store.last, 12345, -1)
    read_checkpoint(store.last)
    said = capsys.readouterr().err.strip().replace(str(folder), "weights")
    assert said == "warning: weights/last.safetensors: belongs to another user (number 12345)"
    seen(said)


def test_t7_room_is_asked_for_before_a_run(folder, monkeypatch, seen):
    store, tensors = Store(folder), checks.tensors(0)
    size = 3 * 4 * tensors["model.weight"].nbytes
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    store.check_space(tensors)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    text = refused(lambda: store.check_space(tensors), where=str(folder), says="3 checkpoints need", exit_code=5)
    seen(text.replace(str(folder), "weights"))


def test_t8_a_folder_that_vanished_is_made_again(folder, seen):
    store = checks.saved(folder, 1, 2)
    shutil.rmtree(folder.parent)
    assert checks.save(store, 3) and checks.latest_step(folder) == 3
    seen("folder made again, the save is in it")


def test_t8_a_folder_that_cannot_be_made_again(folder, seen):
    store = checks.saved(folder, 1)
    shutil.rmtree(folder)
    folder.write_bytes(b"somebody's file")
    store.say = lambda text: None
    assert not checks.save(store, 2) and not checks.save(store, 3)
    with pytest.raises(ResourceError) as caught:
        checks.save(store, 4)
    assert folder.read_bytes() == b"somebody's file"
    seen(str(caught.value).replace(str(folder), "weights"))


def test_t8_a_run_folder_that_takes_no_lock(tmp_path, seen):
    (tmp_path / LOCK).mkdir()
    seen(refused(lambda: lock_run(tmp_path), where=str(tmp_path), exit_code=5).replace(str(tmp_path), "exp"))
    refused(lambda: lock_run(tmp_path / "none"), where=str(tmp_path / "none"), exit_code=5)


def test_s14_a_lock_is_no_link_to_follow(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / LOCK).symlink_to(tmp_path / "precious")
    refused(lambda: lock_run(tmp_path / "exp"), exit_code=5)
    assert (tmp_path / "precious").read_text() == "mine"


def test_t10_runs_that_start_together(tmp_path, seen):
    pids = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                (new_run(tmp_path, "exp") / "mine").touch(exist_ok=False)
            finally:
                os._exit(int(sys.exc_info()[0] is not None))
        pids.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    assert len(list(tmp_path.glob("exp*/mine"))) == 8
    seen("8 starts, 8 folders")


def test_t36_a_folder_does_not_grow(folder, seen):
    store = checks.saved(folder, 0)
    start = time.process_time()
    for step in range(1, 60):
        checks.save(store, step, ["best"])
    each = (time.process_time() - start) / 59
    assert sorted(file.name for file in folder.iterdir()) == [
        f"{name}.safetensors" for name in ("best", "last", "previous")
    ]
    assert checks.valid_steps(folder) == [58, 59, 59]
    seen(f"60 saves, 3 files, {each * 1000:.1f} ms of CPU each: 10^4 a day are {each * 1e4 / 864:.2f} % of it")


def test_best_is_another_name_of_last_or_a_copy(folder, monkeypatch):
    store = checks.saved(folder)
    assert checks.save(store, 1, ["best", "epoch3"])
    assert store.path("best").samefile(store.last) and store.path("epoch3").samefile(store.last)

    def no_links(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    assert checks.save(store, 2, ["best"]) and not store.path("best").samefile(store.last)
    assert store.path("best").read_bytes() == store.last.read_bytes()
    assert sorted(file.stem for file in folder.iterdir()) == ["best", "epoch3", "last", "previous"]


def test_the_checksum_covers_header_and_tensors(folder):
    store = checks.saved(folder, 1)
    header = checks.header_of(store.last)
    assert header["format"] == 2 and header["step"] == 1 and len(header["sha256"]) == 64
    tensors, meta = read_checkpoint(store.last)
    assert meta == header
    data = store.last.read_bytes()
    store.last.write_bytes(data.replace(b'\\"epoch\\": 1', b'\\"epoch\\": 2'))
    refused(lambda: read_checkpoint(store.last), says="do not match their checksum")
    assert json.dumps(header) and tensors

"""What must be true of the checkpoint store, as functions of an empty folder: ``test_store.py`` asks them of the code,
``test_mutants.py`` of the code with a mistake put in, where they must fail."""

import json
import os
import random
import signal
import stat
from pathlib import Path

import pytest
import torch
from disk import Recorder, lay_out

import utils.checkpoint
import utils.run
import utils.store
from utils.errors import DivergenceError, ResourceError, UserError
from utils.failpoints import VARIABLE


def tensors(step: int) -> dict[str, torch.Tensor]:
    weight = torch.arange(24.0).reshape(4, 6) + step
    return {"model.weight": weight, "ema.weight": weight / 3, "optim.weight.momentum_buffer": weight.double() / 7}


def save(store: utils.store.Store, step: int, names=()) -> bool:
    return store.save(tensors(step), {"cfg": "[net]\n", "names": ["a"], "epoch": step}, step, names)


def saved(folder: Path, *steps: int) -> utils.store.Store:
    """A store in ``folder`` with these saves made."""
    store = utils.store.Store(folder, say=lambda text: None)
    for step in steps:
        assert save(store, step)
    return store


def valid_steps(folder: Path) -> list[int]:
    """The steps of all files that read well, and hold what was saved at that step."""
    steps = []
    for file in folder.glob("*.safetensors"):
        try:
            found, meta = utils.checkpoint.read_checkpoint(file)
        except UserError:
            continue
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors(meta["step"]).items()), file
        steps.append(meta["step"])
    return sorted(steps)


def latest_step(folder: Path) -> int:
    found = utils.store.Store(folder).latest()
    expected = tensors(found.meta["step"])
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())
    return found.meta["step"]


# ---- kills and power failures ----------------------------------------------------------------------------------------


def recorded_save(folder: Path) -> tuple[Recorder, int]:
    """A third save, the best one, call by call, and the number of calls after which it counted as done."""
    store = saved(folder, 1)
    save(store, 2, ["best"])
    with Recorder(folder) as recorder:
        assert save(store, 3, ["best"])
    return recorder, len(recorder.calls)


def left(files: dict[str, bytes], folder: Path) -> Path:
    """What of them resume depends on, in a folder; ``best`` is another save than ``last``, and must be whole."""
    place = lay_out(files, folder.with_name(f"{folder.name}-left"))
    assert utils.checkpoint.read_checkpoint(place / "best.safetensors")[1]["step"] in (2, 3)
    (place / "best.safetensors").unlink()
    return place


def survives_a_kill_at_every_call(folder: Path) -> str:
    """T2: what is found is the last save that counted as done, or the one that was under way."""
    recorder, done = recorded_save(folder)
    for count in range(done + 1):
        found = latest_step(left(recorder.after_kill(count), folder))
        assert found >= (3 if count == done else 2), f"lost by a kill after {recorder.calls[:count][-1:]}"
    return f"{done + 1} points, 0 lost"


def keeps_two_at_every_call(folder: Path) -> str:
    """T35: two good checkpoints at any moment but that between two renames."""
    recorder, done = recorded_save(folder)
    for count in range(done + 1):
        between = count > 0 and recorder.calls[count - 1][0] == "rename"
        steps = valid_steps(left(recorder.after_kill(count), folder))
        assert len(steps) >= 2 - between, f"fewer after {recorder.calls[:count][-1:]}"
    assert valid_steps(folder) == [2, 3, 3]
    return "two good ones at every call, one between the two renames"


def survives_a_power_failure(folder: Path) -> str:
    """T34: the same of what is left when bytes and names that were not fsynced are gone."""
    recorder, done = recorded_save(folder)
    states = 0
    for count in range(done + 1):
        for files in recorder.after_power_failure(count):
            found = latest_step(left(files, folder))
            assert found >= (3 if count == done else 2), f"lost by a failure after {recorder.calls[:count][-1:]}"
            states += 1
    return f"{states} states of the disk, 0 lost"


# ---- damage ----------------------------------------------------------------------------------------------------------


def notices_every_flipped_bit(folder: Path) -> str:
    """W15: of 200 files with a bit changed each is passed over for the older one."""
    store = saved(folder, 1, 2)
    data, draw = store.last.read_bytes(), random.Random(0)
    places = [*range(8), *(draw.randrange(len(data) * 8) for _ in range(192))]
    for place in places:
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        store.last.write_bytes(broken)
        found = store.latest()
        assert found.path == store.previous and len(found.passed_over) == 1, place
    return f"{len(places)} flipped bits noticed"


def falls_back_to_an_older_one(folder: Path) -> str:
    """W16, and the older good one stays when the next save rotates."""
    store = saved(folder, 1, 2)
    store.last.write_bytes(store.last.read_bytes()[:-20])
    found = store.latest()
    assert found.path == store.previous and found.meta["step"] == 1
    message = str(found.passed_over[0])
    assert message.startswith(f"{store.last}: ")
    again = utils.store.Store(folder, say=lambda text: None)
    assert save(again, 3) and valid_steps(folder) == [1, 3]
    return message.replace(str(folder), "weights")


def verifies_before_it_rotates(folder: Path) -> str:
    """T35: where the disk keeps something else than was written, both older ones stay, and it is said."""
    said = []
    saved(folder, 1, 2)
    store = utils.store.Store(folder, said.append)
    with pytest.MonkeyPatch.context() as patch:
        real = utils.store._write_blocks
        patch.setattr(utils.store, "_write_blocks", lambda file, data: real(file, data[:-9] + b"#" + data[-8:]))
        assert not save(store, 3)
    assert valid_steps(folder) == [1, 2] and len(said) == 1
    assert save(store, 4) and valid_steps(folder) == [2, 4]
    return said[0].replace(str(folder), "weights")


def executes_nothing(folder: Path) -> str:
    """A pickle under a checkpoint's name is refused, and nothing of it runs."""
    touched = folder / "touched"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(touched),)

    path = folder / "last.safetensors"
    torch.save({"x": Payload()}, path)
    with pytest.raises(UserError) as caught:
        utils.checkpoint.read_checkpoint(path)
    assert not touched.exists()
    return str(caught.value).replace(str(folder), "weights")


def commits_finite_numbers_only(folder: Path) -> str:
    """T17, T20: a value that is not finite, in whichever part, is never committed."""
    store = saved(folder, 1, 2)
    for name in tensors(0):
        for value in (float("nan"), float("inf"), float("-inf")):
            bad = tensors(3)
            bad[name][1, 2] = value
            with pytest.raises(DivergenceError) as caught:
                store.save(bad, {}, 3)
            assert name in str(caught.value)
    assert valid_steps(folder) == [1, 2] and len(list(folder.iterdir())) == 2
    return str(caught.value).replace(str(folder), "weights")


def keeps_every_bit(folder: Path) -> str:
    """What is saved is what is read: each part in its own type."""
    saved(folder, 1)
    found = utils.store.Store(folder).latest()
    for name, tensor in tensors(1).items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor), name
    return "types and bits as saved"


# ---- disks that do not take it ---------------------------------------------------------------------------------------


def outlives_a_full_disk(folder: Path, point: str = "save.write:5+", action: str = "enospc") -> str:
    """T7, W19: two warnings, then an error with exit code 5; the older ones as they were, no temporary file left."""
    said = []
    saved(folder, 1, 2)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    store = utils.store.Store(folder, said.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"{point}:{action}")
        assert not save(store, 3) and not save(store, 4) and len(said) == 2
        with pytest.raises(ResourceError) as caught:
            save(store, 5)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert caught.value.exit_code == 5
    assert save(store, 6) and valid_steps(folder) == [2, 6]
    return str(caught.value).replace(str(folder), "weights")


def tries_again(folder: Path) -> str:
    """T7: failures that are not in a row never add up."""
    said = []
    store = utils.store.Store(folder, said.append)
    for step in range(0, 12, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, f"save.fsync:1+:enospc,none:{step}:nan")  # a plan of its own, counted from 1
            assert not save(store, step) and not save(store, step + 1)
        assert save(store, step + 2)
    assert len(said) == 8 and valid_steps(folder) == [8, 11]
    return said[0].replace(str(folder), "weights")


# ---- files of others -------------------------------------------------------------------------------------------------


def replaces_links(folder: Path) -> str:
    """W18: a link at any name of ours is replaced; what it leads to is not touched."""
    precious = folder.with_name(f"{folder.name}-precious")
    precious.write_bytes(b"mine")
    for name in ("last", "previous", "best"):
        (folder / f"{name}.safetensors").symlink_to(precious)
    store = saved(folder, 1)
    assert save(store, 2, ["best"])
    assert precious.read_bytes() == b"mine"
    assert not any(file.is_symlink() for file in folder.iterdir()) and valid_steps(folder) == [1, 2, 2]
    return "link replaced, its target untouched"


def writes_no_planted_file(folder: Path) -> str:
    """S14: a temporary file is new and ours, in the run's folder; a name somebody took is refused, never followed."""
    precious = folder.with_name(f"{folder.name}-precious")
    precious.write_bytes(b"mine")
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        real = os.open
        patch.setattr("utils.files.secrets.token_hex", lambda count: "0" * 2 * count)
        patch.setattr(
            os, "open", lambda path, flags, *rest: opened.append((Path(path), flags)) or real(path, flags, *rest)
        )
        saved(folder, 1)
        (folder / ".last.safetensors.00000000.part").symlink_to(precious)
        said = []
        assert not save(utils.store.Store(folder, said.append), 2)
    assert precious.read_bytes() == b"mine" and "File exists" in said[0]
    written = [(path, flags) for path, flags in opened if flags & os.O_WRONLY]
    assert written and all(path.parent == folder and flags & os.O_EXCL for path, flags in written)
    return said[0].replace(str(folder), "weights")


def never_rewrites_in_place(folder: Path) -> str:
    """W20: a file that has a name keeps its bytes; another file takes the name."""
    store = saved(folder)
    save(store, 1, ["best"])
    with store.last.open("rb") as old_last, store.path("best").open("rb") as old_best:
        before = store.last.read_bytes()
        assert save(store, 2, ["best"]) and save(store, 3)
        assert old_last.read() == old_best.read() == before
    assert utils.checkpoint.read_checkpoint(store.path("best"))[1]["step"] == 2
    return "the names moved, the files did not change"


def warns_of_foreign_hands(folder: Path, capture) -> str:
    """S15: a checkpoint that anybody may change, or of another owner, is read with a warning."""
    store = saved(folder, 1)
    utils.checkpoint.read_checkpoint(store.last)
    assert capture.readouterr().err == ""
    store.last.chmod(store.last.stat().st_mode | stat.S_IWOTH)
    utils.checkpoint.read_checkpoint(store.last)
    return capture.readouterr().err.replace(str(folder), "weights").strip()


# ---- order, and one run per folder ---------------------------------------------------------------------------------


def asks_no_clock(folder: Path) -> str:
    """W16, T27: what is newest is said by names and steps, also where the files' times say the opposite."""
    store = saved(folder, 1, 2)
    save(store, 3, ["best"])
    save(store, 4, ["epoch10"])
    save(store, 5)
    for age, name in enumerate(("last", "previous", "epoch10", "best")):
        os.utime(store.path(name), (age, age))
    for name, step in (("last", 5), ("previous", 4), ("epoch10", 4), ("best", 3)):
        found = store.latest()
        assert found.path == store.path(name) and found.meta["step"] == step
        store.path(name).unlink()
    return "by name, then by step"


def locked_by_another(folder: Path) -> tuple[int, int]:
    """A process that holds the lock, with a loading process of its own, until ``release`` is closed: (pid, release)."""
    read, release = os.pipe()
    ready, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(release)
        lock = utils.run.lock_run(folder)
        if os.fork():
            os.write(ready_write, b"!")
        os.read(read, 1)
        lock.close()
        os._exit(0)
    os.close(read)
    assert os.read(ready, 1) == b"!"
    os.close(ready)
    os.close(ready_write)
    return pid, release


def refuses_a_second_run(folder: Path) -> str:
    """T9: while one holds the folder, another gets its process and machine named; when it has ended, the folder."""
    pid, release = locked_by_another(folder)
    host = os.uname().nodename
    try:
        with pytest.raises(UserError) as caught:
            utils.run.lock_run(folder)
    finally:
        os.close(release)
        os.waitpid(pid, 0)
    text = str(caught.value)
    assert caught.value.exit_code == 2 and text.startswith(f"{folder}: process {pid} on {host} ")
    with utils.run.lock_run(folder):
        assert (folder / utils.run.LOCK).read_text() == f"process {os.getpid()} on {host}"
    return text.replace(str(folder), "exp").replace(str(pid), "PID").replace(host, "HOST")


def takes_over_a_stale_lock(folder: Path) -> str:
    """T9: a killed run's lock is free, though its loading process lives on; what it left half written is removed."""
    (folder / "weights").mkdir()
    pid, release = locked_by_another(folder)
    left = [folder / ".log.jsonl.0123abcd.part", folder / "weights" / ".last.safetensors.0123abcd.part"]
    others = [folder / "mine.part", folder / ".hidden.part"]
    for file in (*left, *others):
        file.write_bytes(b"half")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        with utils.run.lock_run(folder):
            assert str(os.getpid()) in (folder / utils.run.LOCK).read_text()
    finally:
        os.close(release)
    assert not any(file.exists() for file in left) and all(file.exists() for file in others)
    return "taken over at once, though its loading process lives on"


def header_of(path: Path) -> dict:
    """Of a checkpoint, without our reader."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["matchbox"])

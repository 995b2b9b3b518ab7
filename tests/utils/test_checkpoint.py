"""What was written is read back to the bit, or an error says why; an interrupted write costs nothing."""

import errno
import os
import random
import stat
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from utils import checkpoint
from utils.checkpoint import (
    load_module,
    load_optimizer_tensors,
    optimizer_tensors,
    read_checkpoint,
    write_checkpoint,
)
from utils.errors import ResourceError, UserError
from utils.files import atomic_write
from utils.optim import Optim, build_optimizer

TENSORS = {
    "model.a": torch.arange(6.0).reshape(2, 3),
    "model.half": torch.ones(3, dtype=torch.bfloat16),
    "model.scalar": torch.tensor(3),
    "model.empty": torch.zeros(0, 4),
    "model.channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "rng.cpu": torch.get_rng_state(),
}
META = {"cfg": "[net]\n# ü\n", "names": ["a", "b"], "epoch": 3, "best": {"fitness": 0.1 + 0.2}}


def test_round_trip(tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", TENSORS, META)
    tensors, meta = read_checkpoint(tmp_path / "x.safetensors")
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    assert {key: meta[key] for key in META} == META


def test_any_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, {"model.a": torch.arange(100.0)}, META)
    data, draw = path.read_bytes(), random.Random(0)
    for _ in range(60):
        place = draw.randrange(len(data))
        broken = bytearray(data)
        broken[place] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        try:
            _, meta = read_checkpoint(path)
        except UserError:
            continue
        raise AssertionError(f"byte {place} was changed unnoticed: {meta}")


@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff" * 100, b"PK\x03\x04" + b"\0" * 50])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x.safetensors"):
        read_checkpoint(path)


def test_foreign_and_newer_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"not a checkpoint of ours"):
        read_checkpoint(path)
    with pytest.raises(UserError, match=r"No such file|cannot read"):
        read_checkpoint(tmp_path / "none.safetensors")
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    monkeypatch.setitem(checkpoint.CHECKSUMS, 99, checkpoint.CHECKSUMS[2])
    write_checkpoint(path, TENSORS, META)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"format 99, this version reads up to 2"):
        read_checkpoint(path)


def test_an_exception_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match=r"No space left.*old file is untouched"), atomic_write(path):
        if call == "fsync":
            monkeypatch.setattr(os, "fsync", full)
        else:
            full()
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"mine")
    (tmp_path / "last").symlink_to(tmp_path / "precious")
    with atomic_write(tmp_path / "last") as file:
        file.write(b"new")
    assert (tmp_path / "precious").read_bytes() == b"mine"
    assert (tmp_path / "last").read_bytes() == b"new" and not (tmp_path / "last").is_symlink()


def test_a_missing_folder_is_made_if_it_can_be(tmp_path):
    with atomic_write(tmp_path / "new" / "x") as file:
        file.write(b"data")
    assert (tmp_path / "new" / "x").read_bytes() == b"data"
    with pytest.raises(ResourceError, match=r"cannot write"), atomic_write(tmp_path / "new" / "x" / "y"):
        pass


def test_a_checkpoint_of_another_network_is_refused():
    own = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"missing bias.*unknown other.*weight has shape"):
        load_module(own, {"weight": torch.zeros(3, 2), "other": torch.zeros(1)}, "x")


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_an_optimizer_continues_to_the_bit(kind, tmp_path):
    def step(module, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        module(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()

    def make():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
        return module, build_optimizer(module, Optim(optimizer=kind, lr0=0.1))

    module, optimizer = make()
    for seed in range(3):
        step(module, optimizer, seed)
    write_checkpoint(
        tmp_path / "x.safetensors",
        {**module.state_dict(), **checkpoint.with_prefix("optim", optimizer_tensors(optimizer))},
        {},
    )
    step(module, optimizer, 3)

    other, resumed = make()
    tensors, _ = read_checkpoint(tmp_path / "x.safetensors")
    load_module(other, {name: tensors[name] for name in other.state_dict()}, "x")
    load_optimizer_tensors(resumed, checkpoint.without_prefix("optim", tensors))
    step(other, resumed, 3)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_folders_that_cannot_be_synced(tmp_path, monkeypatch, number, fails):
    """Some network file systems know no such thing; an error of the disk is one, and the file is the new one."""
    sync = os.fsync

    def refused(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    expected = pytest.raises(ResourceError, match="a power failure may undo it") if fails else nullcontext()
    with expected, atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"new"

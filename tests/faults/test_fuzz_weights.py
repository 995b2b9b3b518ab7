"""Damaged weights and checkpoints: refused in words, or exactly as large as they must be, finite and unpickled."""

import json
import os
import pickle
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mutator import mutations, num_inputs

from models.cfg import parse_cfg
from models.darknet import Darknet
from models.darknet_weights import Header, arrays_of, count_floats, read_weights
from models.file_kind import DARKNET, file_kind
from models.pretrained import load_pretrained
from utils.checkpoint import checkpoint_bytes, read_checkpoint, with_prefix
from utils.errors import UserError

CFG = """[net]
width=4
height=4
channels=1
[convolutional]
batch_normalize=1
filters=2
activation=linear
[convolutional]
filters=6
activation=linear
[yolo]
anchors=4,5
mask=0
classes=1
num=1
"""
FLOATS = 4 * 2 + 2 + 6 + 12
VALUES = np.random.default_rng(0).uniform(0.1, 1, FLOATS).astype("<f4").tobytes()
HEADERS = (Header(seen=9), Header(major=0, minor=1, revision=0), Header(major=1001, minor=0, revision=0))
WEIGHTS = [header.to_bytes() + VALUES for header in HEADERS] * 4
WEIGHTS += [
    WEIGHTS[0] + bytes(24),
    WEIGHTS[0][: 20 + 40],
    b"<html>" + VALUES,
    b"\x1f\x8b" + VALUES,
    b"\x80\x02" + VALUES,
]


@pytest.fixture
def model() -> Darknet:
    return Darknet(parse_cfg(CFG, "my.cfg"))


@pytest.fixture
def ram(tmp_path):
    """A folder in memory where there is one: tens of thousands of files are written."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def no_pickles(monkeypatch):
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, lambda *rest, **more: pytest.fail("a pickle was opened"))


def sound(model: Darknet) -> bool:
    return all(
        array.tensor.isfinite().all() and (array.name != "variance" or (array.tensor >= 0).all())
        for array in arrays_of(model)
    )


@pytest.mark.filterwarnings("ignore:.*every weight is zero")
def test_weights(ram, model, no_pickles):
    """Most damage changes the size, which alone refuses it."""
    path, accepted = ram / "my.weights", 0
    assert count_floats(arrays_of(model)) == FLOATS
    for data in mutations(WEIGHTS, (), num_inputs()):
        path.write_bytes(data)
        try:
            header = read_weights(model, path)
        except UserError as error:
            assert error.exit_code == 2
        else:
            assert len(data) == len(header.to_bytes()) + 4 * FLOATS and sound(model)
            accepted += 1
    assert accepted > 100


def checkpoints() -> list[bytes]:
    tensors = with_prefix("model", Darknet(parse_cfg(CFG)).state_dict()) | {"optim.x": torch.ones(2, dtype=torch.int64)}
    good = checkpoint_bytes(tensors, {"cfg": CFG, "names": ["a"], "epoch": 3})
    small = checkpoint_bytes({"a": torch.zeros(2), "b": torch.ones((), dtype=torch.bool)}, {})
    bare = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return [good, small, small, struct.pack("<Q", len(bare)) + bare + bytes(8)]


TOKENS = [
    *(b'"F16"', b'"BF16"', b'"F8_E4M3"', b'"U64"', b'"C64"', b'"F4"', b'"dtype"', b'"shape"', b"[]", b"[0,8]", b"{}"),
    *(b'"__metadata__"', b'"matchbox"', b"\\u0000", b"null", b'\\"format\\": 1', b"9" * 5000, b"[" * 2000),
]


def test_checkpoints(ram, no_pickles):
    """What is accepted was not damaged."""
    path, seeds = ram / "my.safetensors", checkpoints()
    intact = []
    for data in seeds[:2]:
        path.write_bytes(data)
        intact.append(read_checkpoint(path))
    for data in mutations(seeds, TOKENS, num_inputs()):
        path.write_bytes(data)
        try:
            tensors, meta = read_checkpoint(path)
        except UserError as error:
            assert error.exit_code == 2
        else:
            assert any(
                meta == wanted and all(torch.equal(tensors[name], tensor) for name, tensor in whole.items())
                for whole, wanted in intact
            )


@pytest.mark.filterwarnings("ignore")
def test_any_file_as_a_start(ram, model, no_pickles):
    """``--weights`` of train.py, every kind of file: 5,000, for networks are compared."""
    seeds = [*WEIGHTS[:3], *checkpoints()]
    for content in (
        model.state_dict(),
        {"model": {"module." + k: v for k, v in model.state_dict().items()}, "epoch": 3},
    ):
        torch.save(content, ram / "my.pt")
        seeds.append((ram / "my.pt").read_bytes())
    path, kinds = ram / "my.file", set()
    for data in mutations(seeds, TOKENS, num_inputs(5_000)):
        path.write_bytes(data)
        try:
            kinds.add(file_kind(path))
            load_pretrained(model, path)
        except UserError as error:
            assert error.exit_code == 2
        else:
            assert sound(model)
    assert DARKNET in kinds and len(kinds) == 3

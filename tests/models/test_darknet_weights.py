"""The ``.weights`` format: byte for byte, all headers, cut files, and everything that is no weights file."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch

from models.cfg import parse_cfg, read_cfg
from models.darknet import Darknet
from models.darknet_weights import Header, arrays_of, boundaries, count_floats, read_weights, write_weights
from models.file_kind import CHECKPOINT, DARKNET, TORCH, file_kind
from utils.errors import UserError

NET = "[net]\nwidth=8\nheight=8\nchannels=3\n"
BODY = """
[convolutional]
batch_normalize=1
filters=4
size=3
pad=1
activation=leaky
{first}
[maxpool]
size=2
stride=2
[convolutional]
filters=5
size=1
activation=linear
[connected]
output=6
batch_normalize=1
activation=linear
[shortcut]
from=-1
weights_type=per_channel
weights_normalization=relu
"""
FLOATS = (4 * 4 + 4 * 27, 5 + 20, 6 + 6 * 80 + 18, 12)


def network(first: str = "") -> Darknet:
    torch.manual_seed(0)
    model = Darknet(parse_cfg(NET + BODY.format(first=first), "small.cfg"))
    for array in arrays_of(model):
        array.tensor.data.uniform_(0.1, 1)
    return model


def equal(model: Darknet, other: Darknet) -> bool:
    pairs = zip(arrays_of(model), arrays_of(other))
    return all(torch.equal(mine.tensor, theirs.tensor) for mine, theirs in pairs)


def patched(path, at: int, value: float, header: int = 20) -> None:
    data = bytearray(path.read_bytes())
    data[header + 4 * at : header + 4 * at + 4] = struct.pack("<f", value)
    path.write_bytes(data)


@pytest.fixture
def saved(tmp_path):
    model, path = network(), tmp_path / "small.weights"
    write_weights(model, path, Header(seen=123))
    return model, path


@pytest.mark.parametrize("name", ["yolo-fastest-1.1", "yolo-fastest-1.1-xl", "MobileNetV2-YOLOv3-Nano-voc"])
def test_real_files_come_back_byte_for_byte(data_dir, tmp_path, name):
    source = data_dir / "weights" / f"{name}.weights"
    model = Darknet(read_cfg(source.with_suffix(".cfg")))
    write_weights(model, tmp_path / "again.weights", read_weights(model, source))
    assert (tmp_path / "again.weights").read_bytes() == source.read_bytes()


def test_a_real_backbone_comes_back_byte_for_byte(data_dir, tmp_path):
    source = data_dir / "weights" / "MobileNetV2-Nano.57"
    model = Darknet(read_cfg(data_dir / "weights" / "MobileNetV2-YOLOv3-Nano-voc.cfg"))
    with pytest.raises(UserError, match=r"ends with layer 56 .*a backbone"):
        read_weights(model, source)
    write_weights(model, tmp_path / "again.57", read_weights(model, source, cutoff=57), cutoff=57)
    assert (tmp_path / "again.57").read_bytes() == source.read_bytes()


def test_the_order_of_the_file(saved):
    model, path = saved
    values = np.frombuffer(path.read_bytes(), "<f4", offset=20)
    assert len(values) == sum(FLOATS)
    assert path.read_bytes()[:20] == struct.pack("<3iQ", 0, 2, 5, 123)
    norm, conv, connected = model.layers[0].norm, model.layers[0].conv, model.layers[3]
    parts = [norm.bias, norm.weight, norm.running_mean, norm.running_var, conv.weight]
    parts += [model.layers[2].conv.bias, model.layers[2].conv.weight]
    parts += [connected.norm.bias, connected.linear.weight]  # the matrix before the statistics
    parts += [connected.norm.weight, connected.norm.running_mean, connected.norm.running_var, model.layers[4].weights]
    wanted = torch.cat([part.detach().flatten() for part in parts])
    assert torch.equal(torch.from_numpy(values.copy()), wanted)


@pytest.mark.parametrize(
    "header, size",
    [
        (Header(), 20),
        (Header(major=0, minor=1, revision=0, seen=7), 16),
        (Header(major=0, minor=2, revision=0, seen=1 << 40), 20),
        (Header(major=1, minor=0, revision=0), 20),
        (Header(major=0, minor=1001, revision=0), 20),
        (Header(major=1002, minor=0, revision=0), 20),
    ],
)
def test_every_generation_of_headers(tmp_path, header, size):
    model, other, path = network(), network(), tmp_path / "a.weights"
    write_weights(model, path, header)
    assert path.stat().st_size == size + 4 * sum(FLOATS)
    for array in arrays_of(other):
        array.tensor.data.zero_()
    assert read_weights(other, path) == header
    assert equal(model, other)


def test_matrices_are_turned_above_version_1000(tmp_path):
    model = network()
    write_weights(model, tmp_path / "plain.weights")
    write_weights(model, tmp_path / "turned.weights", Header(minor=1001))
    plain, turned = (
        np.frombuffer((tmp_path / f"{name}.weights").read_bytes(), "<f4", offset=20) for name in ("plain", "turned")
    )
    start = sum(FLOATS[:2]) + 6
    assert np.array_equal(plain[start : start + 480].reshape(6, 80).T, turned[start : start + 480].reshape(80, 6))


@pytest.mark.parametrize("cutoff", [1, 2, 3, 4, 5])
def test_cutoff_writes_and_reads_the_first_layers(saved, tmp_path, cutoff):
    model, other, path = saved[0], network(), tmp_path / "cut"
    write_weights(model, path, cutoff=cutoff)
    ends = [FLOATS[0], FLOATS[0], sum(FLOATS[:2]), sum(FLOATS[:3]), sum(FLOATS)]
    assert path.stat().st_size == 20 + 4 * ends[cutoff - 1]
    for array in arrays_of(other):
        array.tensor.data.fill_(-7.0)
    read_weights(other, path, cutoff=cutoff)
    for mine, theirs in zip(arrays_of(model), arrays_of(other)):
        assert torch.equal(mine.tensor, theirs.tensor) == (mine.layer < cutoff)
    assert boundaries(model)[ends[cutoff - 1]] == {2: 1}.get(cutoff, cutoff)
    with pytest.raises(UserError, match=r"expected 1\.\.5"):
        write_weights(model, path, cutoff=6)


def test_dontload_and_dontloadscales_have_no_bytes(tmp_path):
    full = tmp_path / "full.weights"
    write_weights(network(), full)
    data = full.read_bytes()
    for key, start, stop in (("dontload", 0, FLOATS[0]), ("dontloadscales", 4, 16)):
        model = network(f"{key}=1")
        without = tmp_path / f"{key}.weights"
        without.write_bytes(data[: 20 + 4 * start] + data[20 + 4 * stop :])
        for array in arrays_of(model):
            array.tensor.data.fill_(9.0)
        read_weights(model, without)
        untouched = [array.name for array in arrays_of(model) if (array.tensor == 9).all()]
        assert (
            untouched
            == {
                "dontload": ["biases", "scales", "mean", "variance", "weights"],
                "dontloadscales": ["scales", "mean", "variance"],
            }[key]
        )
        read_weights(model, full)  # what was written with such a cfg holds them, and its size says so
        assert equal(model, network())
        write_weights(model, tmp_path / "again.weights")
        assert (tmp_path / "again.weights").read_bytes() == data


def test_shared_arrays_stand_once(tmp_path):
    body = "[convolutional]\nfilters=3\nsize=3\npad=1\n[convolutional]\nfilters=3\nsize=3\npad=1\nshare_index=-1\n"
    assert count_floats(arrays_of(Darknet(parse_cfg(NET + body)))) == 3 + 81


@pytest.mark.parametrize(
    "floats, layer",
    [(0, "layer 0"), (1, "layer 0"), (FLOATS[0] - 1, r"layer 0 \[convolutional\] weights"), (FLOATS[0] + 3, "layer 2")],
)
def test_too_short_names_the_layer_and_both_sizes(saved, floats, layer):
    model, path = saved
    path.write_bytes(path.read_bytes()[: 20 + 4 * floats])
    with pytest.raises(UserError, match=f"{20 + 4 * floats} bytes, small.cfg needs 2680.* runs out in {layer}"):
        read_weights(model, path)


@pytest.mark.parametrize("size", [0, 3, 15, 19, 21, 22])
def test_no_header_or_half_a_float(saved, size):
    model, path = saved
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="bytes"):
        read_weights(model, path)


@pytest.mark.parametrize("more", [4, 2660])
def test_too_long(saved, more):
    model, path = saved
    path.write_bytes(path.read_bytes() + path.read_bytes()[20 : 20 + more])
    with pytest.raises(UserError, match=f"{2680 + more} bytes, small.cfg needs 2680: {more} left over"):
        read_weights(model, path)


@pytest.mark.parametrize(
    "at, value, where",
    [
        (0, float("nan"), r"layer 0 \[convolutional\] biases: 1 of 4 values are not finite"),
        (20, float("inf"), r"layer 0 \[convolutional\] weights"),
        (13, -1.0, r"layer 0 \[convolutional\] variance: 1 of 4 variances are negative"),
        (sum(FLOATS[:3]) - 1, -1.0, r"layer 3 \[connected\] variance"),
    ],
)
def test_values_that_no_training_made_change_nothing(saved, at, value, where):
    path = saved[1]
    patched(path, at, value)
    other = network()
    for array in arrays_of(other):
        array.tensor.data.fill_(3.0)
    with pytest.raises(UserError, match=where):
        read_weights(other, path)
    assert all((array.tensor == 3).all() for array in arrays_of(other))


def test_all_zero_is_said(saved):
    model, path = saved
    path.write_bytes(path.read_bytes()[:20] + bytes(path.stat().st_size - 20))
    with pytest.warns(UserWarning, match="every weight is zero"):
        read_weights(model, path)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"b")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, what",
    [
        (b"<!DOCTYPE html><html>Quota exceeded", "web page"),
        (b"\n\n <html>", "web page"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (b"\x80\x04\x95" + bytes(100), "pickle"),
        (b"[net]\nwidth=416\n" * 9, "Darknet cfg"),
        (struct.pack(">3iQ", 0, 2, 5, 0) + bytes(2660), "not Darknet weights"),
        (np.random.default_rng(0).bytes(2680), "not Darknet weights"),
        (zipped(), "PyTorch archive"),
        (struct.pack("<Q", 2) + b"{}" + bytes(100), "safetensors"),
    ],
)
def test_other_files_are_called_by_their_name(tmp_path, data, what):
    path = tmp_path / "x.weights"
    path.write_bytes(data)
    with pytest.raises(UserError, match=what):
        read_weights(network(), path)


def test_kinds_of_files(saved, tmp_path):
    assert file_kind(saved[1]) == DARKNET
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.weights")
    assert file_kind(tmp_path / "a.weights") == TORCH
    (tmp_path / "b.weights").write_bytes(struct.pack("<Q", 2) + b"{}")
    assert file_kind(tmp_path / "b.weights") == CHECKPOINT
    for missing in (tmp_path, tmp_path / "none.weights"):
        with pytest.raises(UserError, match=r"folder|no such file, expected a weights file"):
            file_kind(missing)


def test_other_types_and_devices_of_the_network(saved):
    path = saved[1]
    double = network().double()
    for array in arrays_of(double):
        array.tensor.data.zero_()
    read_weights(double, path)
    before = path.read_bytes()
    write_weights(double, path, Header(seen=123))
    assert path.read_bytes() == before


def test_random_prefixes_are_never_accepted(saved, tmp_path):
    """Accepted means: exactly the right size."""
    model, path = saved
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for size in rng.integers(0, len(data), 200):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(UserError):
            read_weights(model, tmp_path / "cut")

"""W1-W14: files of weights that are cut, swapped, poisoned or not weights at all, by each way into the program.

``load_network`` is how test.py and detect.py load, ``load_pretrained`` is train.py's ``--weights``.
"""

import ast
import gzip
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from harness import ROOT, refused

from models.cfg import adapt_classes, parse_cfg
from models.darknet import Darknet
from models.darknet_weights import Header, arrays_of, read_weights, write_weights
from models.loading import load_network
from models.pretrained import load_pretrained
from utils.checkpoint import read_checkpoint, with_prefix, write_checkpoint
from utils.errors import UserError

CFG = """[net]
width=32
height=32
channels=3
[convolutional]
batch_normalize=1
filters=8
size=3
stride=4
pad=1
activation=leaky
[convolutional]
filters=16
size=1
activation=linear
[yolo]
mask=0,1
anchors=4,5, 9,8
classes=3
num=2
"""
FLOATS = 4 * 8 + 8 * 27 + 16 + 16 * 8
SIZE = 20 + 4 * FLOATS
CONNECTED = "[net]\nwidth=2\nheight=2\nchannels=3\n[connected]\noutput=5\nactivation=linear\n"
GOOD = Header(seen=123).to_bytes() + np.random.default_rng(0).uniform(0.1, 1, FLOATS).astype("<f4").tobytes()


def network(text: str = CFG, classes: int = 3) -> Darknet:
    """Its weights are threes: whatever a refused file changes is seen."""
    model = Darknet(adapt_classes(parse_cfg(text, "my.cfg"), classes)[0] if text == CFG else parse_cfg(text, "my.cfg"))
    for array in arrays_of(model):
        array.tensor.data.fill_(3)
    return model


@pytest.fixture
def refuses(tmp_path, seen):
    """``refuses(file, says)``: both ways in refuse it with exit code 2 and change no weight."""
    (tmp_path / "my.cfg").write_text(CFG)

    def check(path: str, says: str) -> None:
        model = network()
        for load in (lambda: load_network(path, cfg="my.cfg"), lambda: load_pretrained(model, path)):
            error = refused(load, where=path, says=says)
            assert "\n" not in error and len(error) < 400
            seen(error)
        assert all((array.tensor == 3).all() for array in arrays_of(model))

    return check


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """``weights(bytes)``: a file ``my.weights`` in the folder that commands run in."""
    monkeypatch.chdir(tmp_path)

    def write(data: bytes, name: str = "my.weights") -> str:
        (tmp_path / name).write_bytes(data)
        return name

    return write


# ---- too short, too long, of another network


@pytest.mark.parametrize(
    "size, says",
    [
        pytest.param(0, "0 bytes, too short for the header", id="W1-empty"),
        pytest.param(3, "3 bytes, too short for the header", id="W1-3-bytes"),
        pytest.param(
            20, f"20 bytes, my.cfg needs {SIZE}: it runs out in layer 0 [convolutional] biases", id="W1-header"
        ),
        pytest.param(SIZE // 8 * 4, "it runs out in layer 0 [convolutional] weights", id="W1-half"),
        pytest.param(SIZE - 1, f"{SIZE - 1} bytes: not a header and whole floats", id="W1-byte"),
        pytest.param(
            SIZE - 4, f"{SIZE - 4} bytes, my.cfg needs {SIZE}: it runs out in layer 1 [convolutional]", id="W1-float"
        ),
    ],
)
def test_too_short(weights, refuses, size, says):
    refuses(weights(GOOD[:size]), says)


@pytest.mark.parametrize(
    "more, says",
    [
        pytest.param(GOOD[20:24], f"{SIZE + 4} bytes, my.cfg needs {SIZE}: 4 left over", id="W2-float"),
        pytest.param(GOOD, f"{2 * SIZE} bytes, my.cfg needs {SIZE}: {SIZE} left over", id="W2-doubled"),
    ],
)
def test_too_long(weights, refuses, more, says):
    refuses(weights(GOOD + more), says)


def test_w2_a_part_is_taken_where_it_ends_with_a_layer_and_said(weights, seen):
    path = weights(GOOD[: 20 + 4 * (4 * 8 + 8 * 27)])
    refused(lambda: read_weights(network(), path), says="it ends with layer 0 (a backbone?")
    report = load_pretrained(network(), path)
    assert report.missing == ("layers.1.conv.weight", "layers.1.conv.bias")
    assert "5 of 7 tensors transferred" in report.summary() and "missing" in report.summary()
    seen(" / ".join(report.summary().splitlines()))


def test_w3_a_file_of_80_classes(weights, tmp_path, seen):
    """test.py and detect.py refuse it; train.py takes all but the head and says so."""
    (tmp_path / "my.cfg").write_text(CFG)
    write_weights(network(classes=80), tmp_path / "my.weights")
    size = (tmp_path / "my.weights").stat().st_size
    says = f"{size} bytes, my.cfg needs {SIZE}: {size - SIZE} left over (weights of another cfg or class count?)"
    seen(refused(lambda: load_network("my.weights", cfg="my.cfg"), says=says))
    report = load_pretrained(network(), "my.weights")
    assert report.source == "Darknet weights, 80 classes" and set(report.differs) == {
        "layers.1.conv.weight",
        "layers.1.conv.bias",
    }
    seen(" / ".join(report.summary().splitlines()))


# ---- headers


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(Header(major=0, minor=1, revision=0, seen=7), id="W4-16-bytes"),
        pytest.param(Header(major=0, minor=2, revision=0, seen=1 << 40), id="W4-20-bytes"),
        pytest.param(Header(major=1, minor=0, revision=0), id="W4-major-1"),
    ],
)
def test_both_headers(weights, tmp_path, header, seen):
    path = weights(header.to_bytes() + GOOD[20:])
    model, other = network(), network()
    assert read_weights(model, path) == header
    read_weights(other, weights(GOOD, "usual.weights"))
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(arrays_of(model), arrays_of(other)))
    write_weights(model, tmp_path / "again.weights", header)
    assert (tmp_path / "again.weights").read_bytes() == (tmp_path / "my.weights").read_bytes()
    seen(f"{len(header.to_bytes())} bytes of header read, the file comes back byte for byte")


@pytest.mark.parametrize("version", [(1001, 0), (0, 1001)], ids=["W5-major", "W5-minor"])
def test_turned_matrices(weights, version, seen):
    matrix = np.arange(60, dtype="<f4").reshape(12, 5)  # [in][out], as such files have it
    header = Header(major=version[0], minor=version[1], revision=0)
    path = weights(header.to_bytes() + np.zeros(5, "<f4").tobytes() + matrix.tobytes())
    model = network(CONNECTED)
    read_weights(model, path)
    assert np.array_equal(model.layers[0].linear.weight.detach().numpy(), matrix.T)
    seen("the matrix of [connected] is turned")


# ---- values


@pytest.mark.parametrize(
    "at, value, says",
    [
        pytest.param(0, "nan", "layer 0 [convolutional] biases: 1 of 8 values are not finite", id="W6-nan"),
        pytest.param(40, "inf", "layer 0 [convolutional] weights: 1 of 216 values are not finite", id="W6-inf"),
        pytest.param(24, "-1", "layer 0 [convolutional] variance: 1 of 8 variances are negative", id="W6-variance"),
    ],
)
def test_values(weights, refuses, at, value, says):
    data = bytearray(GOOD)
    data[20 + 4 * at : 24 + 4 * at] = struct.pack("<f", float(value))
    refuses(weights(data), says)


def test_w6_all_zero_is_said(weights, seen):
    with pytest.warns(UserWarning, match="every weight is zero") as caught:
        read_weights(network(), weights(GOOD[:20] + bytes(4 * FLOATS)))
    seen(f"warning: {caught[0].message}")


# ---- other files

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 248007048\n"
OTHER = {
    "W7-jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(SIZE), "a JPEG picture, expected weights"),
    "W7-html": (b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded", "a web page (HTML), expected weights"),
    "W7-html-later": (b"\xef\xbb\xbf\r\n  <html>" + bytes(SIZE), "a web page (HTML), expected weights"),
    "W7-lfs": (LFS, "a Git LFS pointer, expected weights (fetch the file itself with git lfs pull)"),
    "W7-gzip": (gzip.compress(GOOD), "a gzip archive, expected weights (unpack it first)"),
    "W7-random": (np.random.default_rng(0).bytes(SIZE), "not Darknet weights: its version reads"),
    "W7-random-values": (GOOD[:20] + np.random.default_rng(0).bytes(4 * FLOATS), "layer 0 [convolutional]"),
    "W7-big-endian": (np.frombuffer(GOOD, "<i4").astype(">i4").tobytes(), "not Darknet weights: its version reads"),
    "W7-cfg": (CFG.encode(), "a Darknet cfg, expected weights (a cfg belongs to --cfg)"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_files(weights, refuses, name):
    data, says = OTHER[name]
    refuses(weights(data), says)


def archive(content: object) -> bytes:
    """What ``torch.save`` writes."""
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["my.pt", "my.weights"])
@pytest.mark.parametrize("keep", [pytest.param(part, id=f"W8-{part}") for part in (0.1, 0.5, 0.9, 0.999)])
def test_truncated_archives(weights, refuses, keep, name):
    """Read as what it was, whatever it is called; nothing else is tried."""
    data = archive(network().state_dict())
    refuses(weights(data[: int(keep * len(data))], name), "a truncated or damaged PyTorch archive")


@pytest.mark.parametrize("size", [pytest.param(size, id=f"W8-{size}") for size in (1, 3, 8)])
def test_the_first_bytes_of_an_archive(weights, refuses, size):
    refuses(weights(archive({})[:size]), "")


# ---- code


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Old(Payload):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.path)!r})",)


POISONED = {
    **{f"W9-protocol-{number}": lambda mark, number=number: pickle.dumps(Payload(mark), number) for number in range(6)},
    "W9-archive": lambda mark: archive({"model": Payload(mark)}),
    "W9-archive-eval": lambda mark: archive(Old(mark)),
    "W9-legacy": lambda mark: legacy({"model": Payload(mark)}),
    "W9-module": lambda mark: archive(torch.nn.Linear(1, 1)),
}


def legacy(content: object) -> bytes:
    torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["my.pt", "my.weights", "my.safetensors"])
@pytest.mark.parametrize("poison", POISONED)
def test_pickles(weights, refuses, tmp_path, poison, name, request):
    """W10: the name decides nothing."""
    mark = tmp_path / "was-here"
    path = weights(POISONED[poison](mark), name)
    refuses(path, "" if poison[-1] in "01" else "isolated environment")
    assert not mark.exists()


@pytest.mark.parametrize("name", [pytest.param(name, id=f"W10-{name}") for name in ("my.weights", "my.safetensors")])
def test_a_pickle_by_another_name(weights, refuses, tmp_path, name):
    refuses(weights(pickle.dumps(Payload(tmp_path / "mark")), name), "a pickle, expected weights")
    assert not (tmp_path / "mark").exists()


def test_w11_there_is_one_way_to_read_an_archive(seen):
    """``torch.load`` is called once in the whole project, with ``weights_only=True``."""
    calls = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("utils/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                calls.append((path.name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}))
    assert [(name, options["weights_only"]) for name, options in calls] == [("pretrained.py", "True")]
    seen("one torch.load, weights_only=True")


@pytest.mark.parametrize("release", [pytest.param(r, id=f"W11-{r}") for r in ("2.5.1", "2.9.0+cpu")])
def test_a_torch_with_holes(weights, refuses, release, monkeypatch):
    path = weights(archive(network().state_dict()), "my.pt")
    monkeypatch.setattr(torch, "__version__", release)
    refuses(path, f"torch {release} can be made to run code by such a file")


# ---- bombs


def bomb(kind: str) -> bytes:
    """An archive that is larger inside than outside."""
    good = zipfile.ZipFile(io.BytesIO(archive({"a": torch.zeros(1 << 20)})))
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as packed:
        for member in good.namelist():
            packed.writestr(member, good.read(member))
    data = buffer.getvalue()
    if kind == "lies":  # every size in it says that there is little inside
        data = data.replace(struct.pack("<I", 4 << 20), struct.pack("<I", 400))
    return data


@pytest.mark.parametrize("kind", [pytest.param(kind, id=f"W12-{kind}") for kind in ("honest", "lies")])
def test_bombs(weights, refuses, kind, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *rest, **more: pytest.fail("it was opened"))
    path = weights(bomb(kind), "my.pt")
    refuses(path, "compressed, so not written by torch.save")


def test_w12_members_that_overlap(weights, refuses, monkeypatch):
    """The same bytes listed a thousand times."""
    monkeypatch.setattr(torch, "load", lambda *rest, **more: pytest.fail("it was opened"))
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as packed:
        packed.writestr("archive/data.pkl", bytes(10_000))
        packed.filelist *= 1000
        packed.NameToInfo = {str(number): member for number, member in enumerate(packed.filelist)}
    refuses(weights(buffer.getvalue(), "my.pt"), "unpacks to 10000000 bytes from")


# ---- hostile safetensors


def safetensors(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int, end: int, shape: tuple = (1,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


META = {"__metadata__": {"matchbox": json.dumps({"format": 1})}}
HOSTILE = {
    "W13-length": safetensors({"a": tensor(0, 4)}, length=1 << 63),
    "W13-length-beyond": safetensors({"a": tensor(0, 4)}, length=10_000),
    "W13-overlap": safetensors({**META, "a": tensor(0, 8, (2,)), "b": tensor(4, 8)}),
    "W13-hole": safetensors({**META, "a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)),
    "W13-short": safetensors({**META, "a": tensor(0, 8, (2,))}, bytes(4)),
    "W13-left-over": safetensors({**META, "a": tensor(0, 4)}),
    "W13-shape": safetensors({**META, "a": tensor(0, 8, (1 << 40, 1 << 40))}),
    "W13-twice": safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(tensor(0, 8, (2,))).encode(),) * 2)),
    "W13-no-json": safetensors(b"{" + bytes(100)),
    "W13-deep": safetensors(b'{"a":' * 5000),
    "W13-metadata-deep": safetensors({"__metadata__": {"matchbox": "[" * 100_000}, "a": tensor(0, 8, (2,))}),
    "W13-metadata-list": safetensors({"__metadata__": {"matchbox": "[1]"}, "a": tensor(0, 8, (2,))}),
    "W13-metadata-types": safetensors({"__metadata__": {"matchbox": '{"format":"x"}'}, "a": tensor(0, 8, (2,))}),
    "W13-no-checksum": safetensors({**META, "a": tensor(0, 8, (2,))}),
    "W13-empty": safetensors({}, b""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors(weights, refuses, name):
    path = weights(HOSTILE[name], "my.safetensors")
    refuses(path, "")
    refused(lambda: read_checkpoint(path), where=str(path))


# ---- checkpoints of something else


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = with_prefix("model", network().state_dict())
    write_checkpoint(tmp_path / "my.safetensors", tensors, {"cfg": CFG, "names": ["a", "b", "c"]})
    return "my.safetensors"


@pytest.mark.parametrize(
    "old, new, says",
    [
        pytest.param("filters=8", "filters=4", "conv.weight has shape (8, 3, 3, 3), expected (4, 3", id="W14-cfg"),
        pytest.param("[yolo]", "[batchnorm]\n[yolo]", "missing layers.2.norm.bias", id="W14-missing"),
        pytest.param("batch_normalize=1\n", "", "missing layers.0.conv.bias, unknown layers.0.norm", id="W14-extra"),
        pytest.param("classes=3", "classes=1", "layers.1.conv.bias has shape (16,), expected (12,)", id="W14-classes"),
    ],
)  # fmt: skip
def test_checkpoint_of_another_network(checkpoint, tmp_path, old, new, says, seen):
    text = CFG.replace(old, new, 1)
    (tmp_path / "my.cfg").write_text(adapt_classes(parse_cfg(text, strict=False), 1)[0].text if "=1" in new else text)
    error = refused(lambda: load_network(checkpoint, cfg="my.cfg"), where="my.safetensors", says=says)
    assert error.endswith("(to start from its weights use --weights)")
    seen(error)


def test_w14_fine_tuning_says_what_it_took(checkpoint, seen):
    report = load_pretrained(network(classes=5), checkpoint)
    assert set(report.differs) == {"layers.1.conv.weight", "layers.1.conv.bias"} and not report.complete
    assert "5 of 7 tensors transferred" in report.summary()
    seen(" / ".join(report.summary().splitlines()))


def test_w14_nothing_fits(checkpoint):
    other = parse_cfg(
        CFG.replace("filters=8", "filters=4").replace("filters=16", "filters=24\n").replace("classes=3", "classes=7")
    )
    refused(lambda: load_pretrained(Darknet(other), checkpoint), says="none of its 7 tensors fits")


def test_w14_another_optimizer(server, seen):
    """A run that continues has the recipe of its checkpoint."""
    done = server.run("train.py", "--resume", "nowhere", "--set", "optimizer=adamw")
    assert done.code == 2
    seen(done.error_line())


# ---- what comes back is what went in


@pytest.mark.parametrize("seed", range(20))
def test_any_network_comes_back_byte_for_byte(seed, tmp_path):
    """cfg -> model -> weights -> model -> weights, for random networks."""
    rng = np.random.default_rng(seed)
    text = "[net]\nwidth=16\nheight=16\nchannels=3\n"
    for _ in range(rng.integers(1, 6)):
        filters, norm, groups = rng.integers(1, 5) * 2, rng.integers(2), rng.integers(1, 3) if "conv" in text else 1
        text += f"[conv]\nfilters={filters}\nbatch_normalize={norm}\ngroups={groups}\nsize=3\npad=1\nactivation=mish\n"
        if rng.integers(2):
            text += "[shortcut]\nfrom=-1\nweights_type=per_channel\nweights_normalization=relu\nactivation=linear\n"
        if rng.integers(3) == 0:
            text += "[batchnorm]\n"
    text += "[connected]\noutput=4\nbatch_normalize=1\nactivation=linear\n" if rng.integers(2) else ""
    model, again = Darknet(parse_cfg(text)), Darknet(parse_cfg(text))
    write_weights(model, tmp_path / "a.weights", Header(seen=int(rng.integers(1 << 40))))
    header = read_weights(again, tmp_path / "a.weights")
    write_weights(again, tmp_path / "b.weights", header)
    assert (tmp_path / "a.weights").read_bytes() == (tmp_path / "b.weights").read_bytes()


def test_a_file_that_is_still_being_written(weights, monkeypatch):
    whole = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *rest, **more: whole(*rest, **more)[:-1])
    with pytest.raises(UserError, match="is it still being written"):
        read_weights(network(), weights(GOOD))

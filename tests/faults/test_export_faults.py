"""X1 to X7: an export is what it was made from, or there is none."""

import json
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT, refused
from small_export import CFG, export_to, small_network, write_small_checkpoint

from models.cfg import parse_cfg, read_cfg
from models.darknet import Darknet
from models.darknet_weights import Header, read_weights, write_weights
from models.export import main, parse_args
from models.exports.torch_file import ScriptExport
from utils import failpoints
from utils.errors import ResourceError
from utils.failpoints import VARIABLE

NAMES = ["it's", 'a "bar"', "Straße, \\ {x: 1}", "猫"]
FOUR = CFG.replace("filters=14", "filters=18").replace("classes=2", "classes=4")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("export"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where an export goes; empty."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---- X1, X2: Darknet's files ---------------------------------------------------------------------


def random_cfg(seed: int) -> str:
    """A chain of convolutions and pools with shortcuts and routes, and a head; every kind of array."""
    draw = np.random.default_rng(seed)
    lines, filters = ["[net]", "width=32", "height=32", "channels=3"], 0
    for number in range(int(draw.integers(2, 6))):
        before, filters = filters, int(draw.choice([4, 8, 12]))
        norm = int(draw.integers(2))
        lines += ["[convolutional]", f"batch_normalize={norm}", f"filters={filters}", "size=3", "stride=1", "pad=1"]
        lines += [f"activation={draw.choice(['leaky', 'mish', 'swish', 'linear', 'relu'])}"]
        if number and before == filters and draw.random() < 0.6:
            kind = draw.choice(["none", "per_feature", "per_channel"])
            lines += ["[shortcut]", "from=-2", "activation=linear"]
            lines += [] if kind == "none" else [f"weights_type={kind}", "weights_normalization=softmax"]
        elif number and draw.random() < 0.4:
            lines += ["[route]", "layers=-1,-2"]
    lines += ["[maxpool]", "size=2", "stride=2", "[convolutional]", "size=1", "filters=14", "activation=linear"]
    lines += ["[yolo]", "mask=0,1", "anchors=4,4, 9,9", "classes=2", "num=2"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"X1-{seed}") for seed in range(12)])
def test_cfg_and_weights_go_round(seed, tmp_path, folder, seen):
    """Byte for byte, the header too; the cfg but for its first line; and once more from what was written."""
    text = random_cfg(seed)
    (tmp_path / "net.cfg").write_text(text)
    write_small_checkpoint(tmp_path)
    torch.manual_seed(seed)
    write_weights(Darknet(parse_cfg(text)), tmp_path / "net.weights", Header(minor=seed % 3, seen=64 * seed))
    image = tmp_path / "pictures/0.png"
    for source, target in ((tmp_path / "net", folder / "one"), (folder / "one", folder / "two")):
        arguments = [source.with_suffix(".weights"), "--cfg", source.with_suffix(".cfg"), "--format", "darknet"]
        arguments += ["--source", image, "-o", target.with_suffix(".weights")]
        main(parse_args(list(map(str, arguments))))
        assert target.with_suffix(".weights").read_bytes() == source.with_suffix(".weights").read_bytes()
        first, *rest = target.with_suffix(".cfg").read_text().splitlines(keepends=True)
        assert first.startswith("# matchbox {") and "".join(rest).endswith(text)
    seen("byte-identical .weights, headers of both lengths, and cfg; twice")


def test_x2_fused_is_refused(folder, seen):
    fused = small_network().fuse()
    with pytest.raises(AssertionError, match="write the one it was made from"):
        write_weights(fused, folder / "net.weights")
    assert names_in(folder) == []
    seen("a fused network is refused, no file")


def test_x2_train_mode_and_half_change_nothing(folder, seen):
    model = small_network()
    write_weights(model, folder / "eval.weights")
    write_weights(model.train(), folder / "train.weights")
    assert (folder / "train.weights").read_bytes() == (folder / "eval.weights").read_bytes()
    write_weights(small_network().half(), folder / "half.weights")
    again = Darknet(parse_cfg(CFG))
    read_weights(again, folder / "half.weights")
    half, read = small_network().half().float().state_dict(), again.state_dict()
    assert all(torch.equal(read[name], value) for name, value in half.items())
    seen("train mode writes the same bytes; half writes its values as float32; fused is refused")


def test_x2_exporting_leaves_the_network_as_it_was(place, folder):
    before = (place / "small.safetensors").read_bytes()
    export_to(folder / "net.torchscript", place, "--format", "torchscript", "--half")
    assert (place / "small.safetensors").read_bytes() == before


# ---- X3, X5: all of it, or nothing ---------------------------------------------------------------


def off_by(amount: float, output: int):
    """``raw`` of an export whose boxes (output 0) or scores (1) are wrong in one place."""
    right = ScriptExport.raw

    def raw(self, images):
        found = [part.clone() for part in right(self, images)]
        found[output][-1, -1, -1] += amount
        return tuple(found)

    return raw


@pytest.mark.parametrize(
    ("amount", "output", "says"),
    [
        pytest.param(2e-4, 1, "parity failed: scores differ by 0.0002", id="X3-scores"),
        pytest.param(64 * 2e-4, 0, "parity failed: boxes differ by 0.0002", id="X3-boxes"),
        pytest.param(float("nan"), 0, "parity failed: boxes differ by nan", id="X3-nan"),
        pytest.param(float("inf"), 1, "parity failed: scores differ by inf", id="X3-inf"),
    ],
)
def test_a_file_that_says_something_else_is_not_written(amount, output, says, place, folder, monkeypatch, seen):
    monkeypatch.setattr(ScriptExport, "raw", off_by(amount, output))
    line = refused(lambda: export_to(folder / "net.torchscript", place, "--format", "torchscript"), says=says)
    assert names_in(folder) == []
    seen(f"exit 2, no file: {line.partition(': ')[2]}")


def test_x3_onnx_parity(place, folder, seen):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    export_to(folder / "net.onnx", place)
    parity = json.loads((folder / "net.onnx.json").read_text())["parity"]["batches"]
    assert len(parity) == 4
    worst = max(max(batch["boxes"], batch["scores"]) for batch in parity)
    assert worst <= 1e-4
    seen(f"largest difference {worst:.1e}, allowed 1e-4")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("export.open:1+:eacces", id="X5-read-only-folder"),
        pytest.param("export.open:1+:erofs", id="X5-read-only-disk"),
        pytest.param("export.open:2:enospc", id="X5-full-at-the-second"),
        pytest.param("export.fsync:1:enospc", id="X5-full"),
        pytest.param("export.replace:1:eio", id="X5-rename"),
    ],
)
@pytest.mark.parametrize("old", [True, False])
def test_a_disk_that_takes_nothing_leaves_what_was_there(fault, old, place, folder, monkeypatch, seen):
    if old:
        for name in ("net.weights", "net.cfg", "net.names", "net.weights.json"):
            (folder / name).write_text("old")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setenv(VARIABLE, fault)
    monkeypatch.setattr(failpoints, "_passed", Counter())
    call = lambda: export_to(folder / "net.weights", place, "--format", "darknet")  # noqa: E731
    refused(call, says="cannot write", exit_code=ResourceError.exit_code)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    seen("exit 5; old files untouched, no new ones")


def test_x5_a_file_that_is_there_is_replaced_whole(place, folder, seen):
    for name in ("net.weights", "net.cfg"):
        (folder / name).write_text("old")
    link = folder / "net.names"
    (folder / "elsewhere").write_text("kept")
    link.symlink_to(folder / "elsewhere")
    export_to(folder / "net.weights", place, "--format", "darknet")
    assert names_in(folder) == ["elsewhere", "net.cfg", "net.names", "net.weights", "net.weights.json"]
    assert (folder / "elsewhere").read_text() == "kept" and not link.is_symlink()
    read_weights(Darknet(read_cfg(folder / "net.cfg")), folder / "net.weights")
    seen("replaced by rename; a link is replaced, never written through")


def test_x5_an_export_never_replaces_its_source(folder, seen):
    write_weights(small_network(), folder / "net.weights")
    (folder / "net.cfg").write_text(CFG)
    arguments = [str(folder / "net.weights"), "--cfg", str(folder / "net.cfg"), "--format", "darknet"]
    line = refused(lambda: main(parse_args(arguments)), where="-o", says="would replace")
    assert names_in(folder) == ["net.cfg", "net.weights"]
    seen(line)


# ---- X4: packages that are not there -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package", "cure"),
    [
        pytest.param("onnx", "onnx", "pip install onnx onnxscript onnxruntime", id="X4-onnx"),
        pytest.param("onnx", "onnxscript", "pip install onnx onnxscript onnxruntime", id="X4-onnxscript"),
        pytest.param("onnx", "onnxruntime", "pip install onnx onnxscript onnxruntime", id="X4-onnxruntime"),
        pytest.param("openvino", "openvino", "pip install openvino onnx onnxscript", id="X4-openvino"),
    ],
)
def test_a_missing_package_is_named_with_its_pip_line(name, package, cure, place, folder, monkeypatch, seen):
    """Refused at once; nothing is installed or started."""
    monkeypatch.setitem(sys.modules, package, None)
    started = []
    sys.addaudithook(lambda event, args: started.append(event) if event in ("subprocess.Popen", "os.system") else None)
    target = folder / f"net.{'xml' if name == 'openvino' else 'onnx'}"
    line = refused(lambda: export_to(target, place, "--format", name), where=f"--format {name}", says=cure)
    assert package in line and names_in(folder) == [] and started == []
    seen(line)


# ---- X6: any size, any number --------------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic(place) -> Path:
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    return export_to(place / "dynamic.onnx", place, "--dynamic")


@pytest.mark.parametrize("size", [(64, 64), (80, 64), (48, 112), (16, 16)], ids=lambda s: "X6-{}x{}".format(*s))
@pytest.mark.parametrize("num", [1, 3, 7])
def test_dynamic_shapes(num, size, dynamic, seen):
    """Each number alone and each size; stride 16, so all but the first are odd multiples somewhere."""
    import onnxruntime

    images = torch.rand(num, 3, *size, generator=torch.Generator().manual_seed(num))
    with torch.no_grad():
        preds = small_network().predict(images)
    boxes, scores = onnxruntime.InferenceSession(dynamic).run(None, {"images": images.numpy()})
    limit = 1e-4 * max(max(size), float((preds.boxes[..., 2:] - preds.boxes[..., :2]).max()))
    difference = np.abs(boxes - preds.boxes.numpy()).max()
    expected = preds.obj.sigmoid()[..., None] * preds.cls.sigmoid()
    worst = np.abs(scores - expected.numpy()).max()
    assert difference <= limit and worst <= 1e-4
    seen("batches of 1, 3 and 7 in four sizes, each within 1e-4")


# ---- X7: what is inside --------------------------------------------------------------------------


def inside_onnx(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["matchbox"]


def inside_torch(path):
    extra = {"matchbox.json": ""}
    torch.export.load(path, extra_files=extra)
    return extra["matchbox.json"]


def inside_torchscript(path):
    extra = {"matchbox.json": ""}
    torch.jit.load(path, _extra_files=extra)
    return extra["matchbox.json"]


def inside_darknet(path):
    return path.with_suffix(".cfg").read_text(encoding="utf-8").splitlines()[0].removeprefix("# matchbox ")


def unpacked(path: Path) -> bytes:
    """All bytes of a file, and of an archive's members."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(map(archive.read, archive.namelist()))


@pytest.mark.parametrize(
    ("name", "suffix", "inside"),
    [
        pytest.param("onnx", "onnx", inside_onnx, id="X7-onnx"),
        pytest.param("torch", "pt2", inside_torch, id="X7-torch"),
        pytest.param("torchscript", "torchscript", inside_torchscript, id="X7-torchscript"),
        pytest.param("darknet", "weights", inside_darknet, id="X7-darknet"),
    ],
)
def test_names_come_back_as_they_were(name, suffix, inside, place, folder, seen):
    """Quotes, braces, a backslash, other scripts; the same JSON inside and beside the file."""
    if name == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    (folder / "in").mkdir()
    write_small_checkpoint(folder / "in", NAMES, FOUR)
    path = export_to(folder / f"net.{suffix}", folder / "in", "--format", name)
    meta = json.loads(inside(path))
    assert meta["names"] == NAMES
    assert meta == json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
    assert meta["parity"]["batches"][0]["scores"] <= 1e-4
    if name != "torchscript":  # whose own debug records name source files
        assert not [place for place in (ROOT, folder) if str(place).encode() in unpacked(path)]
    seen("JSON inside the file and beside it, names equal")

"""Networks in other formats: what they say, what is inside them, and what the page about them promises."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_export import NAMES, export_to, exported, small_network, write_small_checkpoint

from models.cfg import parse_cfg, read_cfg
from models.darknet import Darknet
from models.darknet_weights import read_weights
from models.export import main, parse_args
from models.exports.portable import Portable
from models.exports.wish import Suppression, Wish, boxes_and_scores
from models.foreign import foreign_to_darknet
from models.predictor import Predictor
from models.section import CfgError
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/export.md").read_text(encoding="utf-8")
EXAMPLES = dict(
    re.findall(r"^## ([^\n]+)\n(?:(?!^## |^```).)*```python\n(.*?)```", PAGE, flags=re.MULTILINE | re.DOTALL)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a checkpoint, small.safetensors, and pictures."""
    return write_small_checkpoint(tmp_path_factory.mktemp("export"))


@torch.no_grad()
def said(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return boxes_and_scores(small_network(), images)


def images_of(num: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_same(found, images: torch.Tensor) -> None:
    for theirs, ours, unit in zip(found, said(images), (max(images.shape[2:]), 1)):
        torch.testing.assert_close(torch.as_tensor(theirs), ours, rtol=1e-4, atol=1e-4 * unit)


# ---- the formats, each read by its own program ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 64, 64), (3, 80, 64), (7, 48, 112)], ids=str)
@pytest.mark.parametrize("name", ["torch", "torchscript"])
def test_torch_reads_its_own_formats_in_any_size(name, size, place):
    path = exported(place, "--format", name, "--dynamic")
    network = torch.export.load(path).module() if name == "torch" else torch.jit.load(path)
    images = images_of(*size)
    with torch.no_grad():
        assert_same(network(images), images)


def test_half_precision_is_inside_only(place):
    path = exported(place, "--format", "torch", "--half")
    images = images_of(1, 64, 64)
    with torch.no_grad():
        boxes, scores = torch.export.load(path).module()(images)
    assert boxes.dtype == scores.dtype == torch.float32
    ours = said(images)
    assert 1e-6 < (scores - ours[1]).abs().max() < 2e-2
    full = exported(place, "--format", "torch").stat().st_size
    assert path.stat().st_size < full


def test_a_fixed_size_may_be_another_than_the_cfgs(place):
    path = exported(place, "--format", "torch", "--img-size", "96", "64", "--batch-size", "2")
    images = images_of(2, 96, 64)
    with torch.no_grad():
        assert_same(torch.export.load(path).module()(images), images)
    assert json.loads(path.with_name(f"{path.name}.json").read_text())["input"]["shape"] == [2, 3, 96, 64]


def test_darknet_files_are_what_opencv_reads(place):
    path = exported(place, "--format", "darknet")
    net = cv2.dnn.readNetFromDarknet(str(path.with_suffix(".cfg")), str(path))
    images = images_of(1, 64, 64) * 2
    net.setInput(images.numpy())
    rows = np.concatenate(net.forward(net.getUnconnectedOutLayersNames()))  # relative center and size, ...
    _, scores = said(images)
    found, ours = rows[:, 5:], scores[0].numpy()  # of which OpenCV clears what is below thresh
    np.testing.assert_allclose(np.sort(found[found > 0.3]), np.sort(ours[ours > 0.3]), atol=1e-3)
    assert (ours > 0.3).sum() > 5
    assert path.with_suffix(".names").read_text().splitlines() == NAMES


def test_darknet_cfg_says_the_size_and_keeps_its_comments(place):
    path = exported(place, "--format", "darknet", "--img-size", "96", "64")
    cfg = read_cfg(path.with_suffix(".cfg"))
    assert (cfg.height, cfg.width) == (96, 64)
    assert "# kept" in cfg.text
    model = Darknet(cfg)
    read_weights(model, path)
    images = images_of(1, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(boxes_and_scores(model.eval(), images), said(images), rtol=0, atol=0)


def test_openvino_says_the_same(place):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    path = exported(place, "--format", "openvino")
    network = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = images_of(1, 64, 64)
    assert_same([value.copy() for value in network(images.numpy()).values()], images)


# ---- the page: its examples, run as they stand ----------------------------------------------------------------------


def run_example(title: str, folder: Path) -> list[str]:
    (folder / "example.py").write_text(EXAMPLES[title])
    done = subprocess.run([sys.executable, "example.py"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def picture(place) -> np.ndarray:
    """``picture.jpg`` where the examples run, as they place it on a canvas of 416 pixels: RGB."""
    image = cv2.imread(str(next((place / "pictures").iterdir())))
    cv2.imwrite(str(place / "picture.jpg"), image)
    return cv2.resize(cv2.imread(str(place / "picture.jpg")), (416, 416))[:, :, ::-1]


def our_detections(picture: np.ndarray, **options):
    images = torch.from_numpy(picture.transpose(2, 0, 1)[None].copy())
    return Predictor(small_network(), conf_thres=0.25, iou_thres=0.45, **options)(images)[0]


def test_the_example_in_onnx_runtime(place, picture):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_to(place / "best.onnx", place, "--nms", "--img-size", "416")
    lines, ours = run_example("In ONNX Runtime", place), our_detections(picture)
    assert len(lines) == len(ours) > 5
    for line, label, score in zip(lines, ours.labels, ours.scores):
        name, found, *_ = line.split()
        assert name == NAMES[label]
        assert abs(float(found) - float(score)) < 2e-3


def test_the_example_in_opencv(place, picture):
    pytest.importorskip("onnxscript")
    export_to(place / "best.onnx", place, "--img-size", "416")
    lines, ours = run_example("In OpenCV", place), our_detections(picture, multi_label=False, max_det=10**5)
    scores = sorted((float(line.split()[1]) for line in lines), reverse=True)
    assert len(scores) == len(ours) > 5
    np.testing.assert_allclose(scores, ours.scores.numpy(), atol=2e-3)


def test_the_example_in_python(place):
    export_to(place / "best.pt2", place, "--format", "torch", "--img-size", "416")
    run_example("From Python", place)


# ---- suppression inside an ONNX file --------------------------------------------------------------------------------


@pytest.mark.parametrize("max_det", [5, 300])
@pytest.mark.parametrize("seed", range(4))
def test_suppression_in_onnx_equals_ours(seed, max_det):
    """Random boxes that overlap much, scores with ties, several pictures, one of them empty."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from models.exports.onnx_file import RAW, with_suppression

    text = """<ir_version: 10, opset_import: ["" : 18]>
    given (float[B, P, 4] a, float[B, P, N] b) => (float[B, P, 4] raw_boxes, float[B, P, N] raw_scores)
    { raw_boxes = Identity (a) raw_scores = Identity (b) }"""
    rule = Suppression(conf_thres=0.25, iou_thres=0.45, max_det=max_det)
    model = with_suppression(onnx.parser.parse_model(text), rule)
    assert {output.name for output in model.graph.output} == {"boxes", "scores", "labels"} and RAW
    rng = torch.Generator().manual_seed(seed)
    corner, sides = torch.rand(3, 60, 2, generator=rng) * 60, torch.rand(3, 60, 2, generator=rng) * 40 + 5
    boxes = torch.cat([corner, corner + sides], dim=-1)
    scores = (torch.rand(3, 60, 3, generator=rng) * 16).round() / 16
    scores[1] = 0
    kept = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"a": boxes.numpy(), "b": scores.numpy()})
    for image in range(3):
        expected = slow_suppression(boxes[image], scores[image], rule)
        found = [(int(n), float(s), b.tolist()) for b, s, n in zip(*(part[image] for part in kept)) if s > 0]
        assert found == expected


def slow_suppression(boxes, scores, rule: Suppression) -> list:
    """One candidate after the other: by score, then slot, then class."""
    order = sorted((-score, slot, label) for slot, row in enumerate(scores.tolist()) for label, score in enumerate(row))
    kept = []
    for score, slot, label in order:
        box = boxes[slot].tolist()
        rivals = [other for number, _, other in kept if number == label]
        if -score > rule.conf_thres and all(iou(box, other) <= rule.iou_thres for other in rivals):
            kept.append((label, -score, box))
    return kept[: rule.max_det]


def iou(box, other) -> float:
    (x1, y1, x2, y2), (a1, b1, a2, b2) = box, other
    inner = max(min(x2, a2) - max(x1, a1), 0) * max(min(y2, b2) - max(y1, b1), 0)
    return inner / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - inner)


# ---- what cannot be exported ----------------------------------------------------------------------------------------


def test_every_head_that_detects_alone_is_portable():
    """The same boxes and scores as decoding, also where the size is not the cfg's."""
    for name in ("yolov2-tiny", "yolox-nano", "autoassign-tiny"):
        cfg = read_cfg(ROOT / "cfg" / f"{name}.cfg")
        cfg = cfg.with_options([(cfg.net, "width", "96"), (cfg.net, "height", "64")])
        model = Darknet(cfg).eval()
        images = images_of(2, 64, 96)
        with torch.no_grad():
            ours = boxes_and_scores(model, images)
            for dynamic in (False, True):
                wish = Wish(model=model, weights=Path("x"), names=[], size=model.size, dynamic=dynamic)
                for found, expected in zip(Portable(wish)(images), ours):
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_darknet_cannot_read():
    foreign = {path.stem for path in (ROOT / "cfg").glob("*.cfg") if foreign_to_darknet(read_cfg(path))}
    kinds = ("yolox", "autoassign", "rcnn")
    assert foreign == {path.stem for path in (ROOT / "cfg").glob("*.cfg") if path.stem.startswith(kinds)}
    cfg = read_cfg(ROOT / "cfg/rcnn-tiny.cfg")
    assert all(problem.path == cfg.path and problem.line for problem in foreign_to_darknet(cfg))
    (problem,) = foreign_to_darknet(parse_cfg("[net]\n[convolutional]\nfilters=4\ngroup_normalize=2\n"))
    assert problem.line == 4 and "group normalisation" in problem.message


def test_two_stages_are_refused_by_line():
    cfg = read_cfg(ROOT / "cfg/rcnn-tiny.cfg")
    wish = Wish(model=Darknet(cfg).eval(), weights=Path("x"), names=[], size=(cfg.height, cfg.width))
    with pytest.raises(CfgError, match=r"rcnn-tiny.cfg:\d+: \[rpn\] looks at regions"):
        Portable(wish)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--format", "darknet", "--nms"], "--nms: not with --format darknet (formats that can: onnx, openvino)"),
        (["--format", "darknet", "--half"], "--half: not with --format darknet"),
        (["--format", "torch", "--nms"], "--nms: not with --format torch"),
        (["--dynamic", "--batch-size", "2"], "--batch-size: with --dynamic any number"),
        (["--iou-thres", "0.5"], "--iou-thres: belongs to --nms (add --nms)"),
        (["-o", "net.pt"], "-o: net.pt does not end in .onnx (-o net.onnx)"),
        (["--img-size", "70"], "--img-size: 70x70 is no multiple of the network's stride 16"),
        (["--source", "nowhere"], "nowhere: no such file, folder or pattern"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_wish_that_cannot_be_is_one_line(options, says, place):
    arguments = [str(place / "small.safetensors"), "--source", str(place / "pictures"), *options]
    with pytest.raises(UserError) as caught:
        main(parse_args(arguments))
    assert str(caught.value).startswith(says)

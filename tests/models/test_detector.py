"""``from models import load``: answers known in advance, the same as detect.py's, and one line for each mistake."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from grid_network import CFG, NAMES, SCORE, grid_boxes, write_grid_network
from PIL import Image

import detect
from models import load
from utils.datasets.images import ImageError, read_image
from utils.datasets.sources import open_source
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PRINTED = ("square 0.9", "", "2 16\n")  # by the programs of docs/python.md, with the network of the grid
SIZES = [(48, 96), (128, 64), (64, 64)]  # h, w


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    write_grid_network(folder / "net.weights")
    for number, size in enumerate(SIZES):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((*size, 3), 100, np.uint8))
    return write_grid_network(folder / "net.safetensors")


@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
def test_boxes_are_in_the_pixels_of_each_picture(weights, resize):
    detector = load(weights, device="cpu", precision="float32", resize=resize)
    paths = [weights.with_name(f"{number}.png") for number in range(len(SIZES))]
    found = detector(paths)
    for one, size in zip(found, SIZES, strict=True):
        torch.testing.assert_close(one.boxes.double(), grid_boxes(size, stretch=resize == "stretch"), rtol=0, atol=1e-4)
        assert [detector.names[label] for label in one.labels] == ["square"] * len(one)
        torch.testing.assert_close(one.scores, torch.full((len(one),), SCORE))
    images = [read_image(path) for path in paths]
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    for form in (images, tensors, [Image.fromarray(image) for image in images], iter(images)):
        for one, other in zip(detector(form), found, strict=True):
            assert torch.equal(one.boxes, other.boxes)
    assert torch.equal(detector(str(paths[0])).boxes, found[0].boxes), "one picture in, its Detections out"
    assert torch.equal(detector(images[1]).boxes, found[1].boxes)
    assert [len(one) for one in detector(np.stack([images[2]] * 10))] == [16] * 10, "more than one batch"
    assert detector([]) == []


def test_what_can_be_asked_for(weights):
    picture = np.full((64, 64, 3), 100, np.uint8)
    assert len(load(weights, device="cpu", max_det=3)(picture)) == 3
    assert len(load(weights, device="cpu", conf_thres=0.99)(picture)) == 0
    for classes, num in ((["square"], 16), ([0], 16), (["bar"], 0), ([1, "square"], 16)):
        assert len(load(weights, device="cpu", classes=classes)(picture)) == num
    assert load(weights, device="cpu", img_size=32).size == (32, 32)
    assert load(weights, device="cpu", img_size=(32, 96)).size == (32, 96)
    darknet = {"cfg": weights.with_name("net.cfg"), "device": "cpu"}
    assert load(weights.with_name("net.weights"), names=["a", "b"], **darknet).names == ["a", "b"]
    weights.with_name("my.names").write_text("cube\nbar\n")
    assert load(weights.with_name("net.weights"), names=weights.with_name("my.names"), **darknet).names[0] == "cube"


def test_a_grey_network_takes_colour_and_grey(tmp_path):
    grey = write_grid_network(tmp_path / "grey.safetensors", text=CFG.replace("channels=3", "channels=1"))
    detector = load(grey, device="cpu")
    assert [len(detector(np.zeros(shape, np.uint8))) for shape in ((64, 64), (64, 64, 1), (64, 64, 3))] == [16] * 3


MISTAKES = {
    "no file": ({"weights": "none.safetensors"}, r"^none\.safetensors: no such weights file"),
    "no cfg": ({"weights": "NET.weights"}, r"add --cfg NETWORK\.cfg"),
    "names": ({"names": ["a", "b"]}, r"trained on the classes square, bar; asked for are a, b"),
    "precision": ({"precision": "fp8"}, r"^precision: no such precision: 'fp8' \(.*fp16"),
    "half": ({"precision": "fp16"}, r"fp16: needs a CUDA device"),
    "resize": ({"resize": "crop"}, r"^resize: found 'crop' \(expected letterbox or stretch\)"),
    "threshold": ({"conf_thres": 25}, r"^conf_thres: expected a number from 0 to 1, found 25"),
    "number": ({"max_det": 0}, r"^max_det: expected a whole number from 1, found 0"),
    "size": ({"img_size": 60}, r"no multiple of the network's stride 16 \(try 64 64\)"),
    "class": ({"classes": ["sqare"]}, r"no class 'sqare' \(did you mean 'square'\?\)"),
    "device": ({"device": "gpu"}, r"^--device gpu: expected cpu or a GPU number"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(weights, mistake):
    changes, pattern = MISTAKES[mistake]
    arguments = {"weights": weights, "device": "cpu", **changes}
    arguments["weights"] = str(arguments["weights"]).replace("NET", str(weights.with_suffix("")))
    with pytest.raises(UserError, match=pattern) as caught:
        load(**arguments)
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_none_is_named(weights, tmp_path):
    detector = load(weights, device="cpu")
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=r"^image 9: pixels of type float64"):
        detector([picture] * 9 + [picture / 255])
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=r"x\.jpg: an empty file"):
        detector([picture, tmp_path / "x.jpg"])


def test_as_detect_on_real_weights(data_dir):
    """detect.py's walk and the boxes that the README of the data lists for dog.jpg, measured with OpenCV."""
    file, path = data_dir / "weights" / "yolo-fastest-1.1-xl.weights", data_dir / "images" / "dog.jpg"
    detector = load(file, cfg=file.with_suffix(".cfg"), names="coco.names", device="cpu", precision="float32")
    found = detector(path)
    frames = open_source(str(path))
    ((_, same),) = detect.look(detector.predict, detect.place(frames, 1, detector.size, detector.stretch))
    assert torch.equal(found.boxes, same.boxes) and torch.equal(found.scores, same.scores)
    known = {"dog": [113, 188, 271, 347], "bicycle": [113, 126, 460, 370], "car": [449, 78, 234, 84]}
    for name, (x, y, width, height), box in zip(known, known.values(), found.boxes):
        assert detector.names[found.labels[list(known).index(name)]] == name
        np.testing.assert_allclose(box, [x, y, x + width, y + height], atol=16)


def programs() -> list[str]:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(programs())))
def test_programs_of_the_page_run(tmp_path, number):
    """Each in an interpreter and a folder of its own, in the words of the page."""
    write_grid_network(tmp_path / "best.safetensors")
    cv2.imwrite(str(tmp_path / "dog.jpg"), np.full((64, 64, 3), 100, np.uint8))
    writer = cv2.VideoWriter(str(tmp_path / "video.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 20.0, (64, 64))
    for _ in range(3):
        writer.write(np.full((64, 64, 3), 100, np.uint8))
    writer.release()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", programs()[number]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert PRINTED[number] in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_precisions_on_the_gpu(weights, precision):
    picture = torch.full((3, 64, 64), 100, dtype=torch.uint8, device="cuda")
    found = load(weights, device="0", precision=precision)(picture)
    torch.testing.assert_close(found.boxes.double(), grid_boxes((64, 64), stretch=True), rtol=0, atol=0.1)


assert NAMES == ["square", "bar"]  # the texts above spell them out

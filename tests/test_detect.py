"""detect.py as a person uses it, on a network whose answers are known, and everything that can be typed wrong."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from grid_network import CFG, NAMES, SCORE, grid_boxes, write_grid_network

import detect
from utils import results
from utils.datasets import streams
from utils.datasets.images import read_image
from utils.errors import QuarantineError, ResourceError, UserError

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"wide.jpg": (48, 96), "tall.png": (128, 64), "straße 1.png": (64, 64)}  # h, w


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a network in both formats, three pictures and a video."""
    folder = tmp_path_factory.mktemp("detect")
    write_grid_network(folder / "net.safetensors")
    write_grid_network(folder / "net.weights")
    (folder / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for name, size in SIZES.items():
        _, data = cv2.imencode(Path(name).suffix, draw.integers(90, 110, (*size, 3), dtype=np.uint8))
        (folder / "pictures" / name).write_bytes(data.tobytes())
    write_video(folder / "video.avi", 12)
    return folder


def write_video(path: Path, num_frames: int, noise: int = 1) -> None:
    draw = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20.0, (96, 64))
    for number in range(num_frames):
        writer.write(10 * number + draw.integers(0, noise, (64, 96, 3), dtype=np.uint8))
    writer.release()


def run(place: Path, folder: Path, *more: object, source="pictures", weights="net.safetensors") -> Path:
    """Call detect.py in this process; returns the run's folder."""
    arguments = [
        "--weights",
        place / weights,
        "--source",
        source if "://" in str(source) else place / source,
        "--project",
        folder,
        "--device",
        "cpu",
        *more,
    ]
    detect.main(detect.parse_args(list(map(str, arguments))))
    return folder / "exp"


def found_in(folder: Path) -> dict[str, dict]:
    entries = json.loads((folder / "detections.json").read_text())
    return {Path(entry["path"]).name: entry for entry in entries}


@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
def test_every_file_holds_the_known_boxes(place, tmp_path, resize):
    flags = ("--save-txt", "--save-conf", "--save-json", "--save-crop", "--resize", resize, "--batch-size", 2)
    folder = run(place, tmp_path, *flags)
    entries = found_in(folder)
    assert set(entries) == set(SIZES)
    for name, size in SIZES.items():
        expected = grid_boxes(size, stretch=resize == "stretch")
        entry, stem = entries[name], Path(name).stem
        assert (entry["height"], entry["width"], entry["frame"]) == (*size, 0)
        assert {one["name"] for one in entry["detections"]} == {"square"}
        boxes = torch.tensor([one["box"] for one in entry["detections"]], dtype=torch.float64)
        torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-3)  # json has three decimals
        np.testing.assert_allclose([one["score"] for one in entry["detections"]], SCORE, atol=1e-6)

        rows = np.loadtxt(folder / "labels" / f"{stem}.txt")
        assert rows.shape == (len(expected), 6) and not rows[:, 0].any()
        centers, sides = (expected[:, :2] + expected[:, 2:]) / 2, expected[:, 2:] - expected[:, :2]
        relative = torch.cat([centers, sides], dim=1) / torch.tensor([size[1], size[0]] * 2)
        np.testing.assert_allclose(rows[:, 1:5], relative, atol=2e-6)

        drawn, plain = read_image(folder / name), read_image(place / "pictures" / name)
        assert drawn.shape == plain.shape
        assert np.abs(drawn.astype(int) - plain).max() > 50, "nothing is drawn"
        crops = sorted((folder / "crops" / "square").glob(f"{stem}_*.jpg"))
        assert len(crops) == len(expected)
        outer = expected[0, 2:].ceil() - expected[0, :2].floor()
        height, width = read_image(folder / "crops" / "square" / f"{stem}_0.jpg").shape[:2]
        assert abs(width - outer[0]) <= 1 and abs(height - outer[1]) <= 1
    assert not list(folder.rglob("*.part*"))


def test_the_batch_size_changes_nothing(place, tmp_path):
    one = run(place, tmp_path / "a", "--save-json", "--batch-size", 1, "--nosave")
    all_at_once = run(place, tmp_path / "b", "--save-json", "--batch-size", 8, "--nosave")
    assert (one / "detections.json").read_bytes() == (all_at_once / "detections.json").read_bytes()
    assert [file.name for file in one.iterdir()] == ["detections.json"]


def test_darknet_files_need_cfg_and_take_names_from_any_file(place, tmp_path, capsys):
    (tmp_path / "my.names").write_text("quader\nleiste\n")
    (tmp_path / "my.yaml").write_text("names: [cube, bar]\n")
    (tmp_path / "my.data").write_text("classes = 2\nnames = my.names\n")
    for file, name in {"my.names": "quader", "my.yaml": "cube", "my.data": "quader"}.items():
        cfg = ("--cfg", place / "net.cfg", "--nosave")
        run(place, tmp_path / "o", *cfg, "--names", tmp_path / file, weights="net.weights")
        assert f"48 {name}" in capsys.readouterr().out
    run(place, tmp_path / "o", *cfg, weights="net.weights")
    assert "48 class0" in capsys.readouterr().out


@pytest.mark.parametrize("classes, num", [(["square"], 48), (["0"], 48), (["bar"], 0), (["1", "square"], 48)])
def test_classes_by_name_or_number(place, tmp_path, classes, num, capsys):
    run(place, tmp_path, "--nosave", "--classes", *classes)
    assert ("48 square" if num else "found: nothing") in capsys.readouterr().out


def test_max_det_is_per_picture(place, tmp_path):
    entries = found_in(run(place, tmp_path, "--nosave", "--save-json", "--max-det", 3))
    assert [len(entry["detections"]) for entry in entries.values()] == [3, 3, 3]


@pytest.mark.parametrize("stride", [1, 5])
def test_a_video_becomes_a_video(place, tmp_path, stride, capsys):
    folder = run(place, tmp_path, "--vid-stride", stride, "--save-txt", "--save-json", source="video.avi")
    numbers = list(range(0, 12, stride))
    entries = json.loads((folder / "detections.json").read_text())
    assert [entry["frame"] for entry in entries] == numbers
    assert sorted(file.stem for file in (folder / "labels").iterdir()) == [f"video_{n:06d}" for n in numbers]
    capture = cv2.VideoCapture(str(folder / "video.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(20 / stride)
    frames = []
    while capture.grab():
        frames.append(capture.retrieve()[1])
    assert len(frames) == len(numbers) and frames[0].shape == (64, 96, 3)
    corner = [frame[-3:, -3:].mean() for frame in frames]  # between boxes: the brightness written
    np.testing.assert_allclose(corner, [10 * n for n in numbers], atol=6)
    assert "warning" not in capsys.readouterr().out


def test_bad_pictures_among_good_ones_are_counted(place, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    whole = (place / "pictures" / "wide.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "b.jpg").write_bytes(whole)
    (folder / "c.png").write_bytes(b"")
    (folder / "d.mp4").write_text("<html>")
    (folder / "e.jpg").write_bytes(whole)
    out = run(place, tmp_path / "o", source=folder)
    assert sorted(file.name for file in out.iterdir()) == ["b.jpg", "e.jpg"]
    text = capsys.readouterr().out
    assert "2 frames" in text and text.count("warning: ") == 3
    for name in ("a.jpg: cut off", "c.png: an empty file", "d.mp4: the video does not open"):
        assert f"warning: {folder}/{name}" in text
    with pytest.raises(QuarantineError) as caught:
        run(place, tmp_path / "strict", "--strict", source=folder)
    assert caught.value.exit_code == 3
    assert sorted(file.name for file in (tmp_path / "strict" / "exp").iterdir()) == ["b.jpg", "e.jpg"]


def test_a_video_that_ends_early_is_said(place, tmp_path, capsys):
    cut = tmp_path / "cut.avi"
    write_video(cut, 20, noise=50)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    run(place, tmp_path / "o", source=cut)
    assert f"warning: {cut}: ends early: " in capsys.readouterr().out
    with pytest.raises(QuarantineError):
        run(place, tmp_path / "o", "--strict", source=cut)


def test_nothing_of_the_user_is_touched(place, tmp_path):
    thesis = tmp_path / "exp" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("three years")
    run(place, tmp_path)
    assert (tmp_path / "exp2" / "wide.jpg").is_file() and list(thesis.parent.iterdir()) == [thesis]
    run(place, tmp_path, "--exist-ok")
    assert thesis.read_text() == "three years" and (tmp_path / "exp" / "wide.jpg").is_file()


def test_class_names_cannot_leave_the_folder(place, tmp_path):
    write_grid_network(tmp_path / "evil.safetensors", names=["../../a/b", ".."])
    folder = run(place, tmp_path / "deep" / "o", "--save-crop", weights=tmp_path / "evil.safetensors")
    assert len(list(folder.rglob("*_*.jpg"))) > 10
    assert {file.name for file in tmp_path.iterdir()} == {"evil.safetensors", "deep"}
    assert {file.name for file in folder.iterdir()} == {*SIZES, "crops"}


def test_ctrl_c_keeps_what_was_done(place, tmp_path, monkeypatch):
    written = []

    def write(path, image, real=results.write_image):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        real(path, image)

    monkeypatch.setattr(results, "write_image", write)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path, "--save-json")
    assert len(found_in(tmp_path / "exp")) == 2 and written[0].is_file()


@pytest.mark.parametrize("flags, source", [((), "pictures"), (("--nosave",), "video.avi")])
def test_a_codec_matters_where_a_video_is_written(place, tmp_path, flags, source):
    run(place, tmp_path, "--fourcc", "WHAT", "--save-txt", *flags, source=source)
    assert list((tmp_path / "exp" / "labels").iterdir())


MISTAKES = {
    "no weights": (["--weights", "none.weights"], r"^none\.weights: no such weights file"),
    "no cfg": (["--weights", "PLACE/net.weights"], r"net\.weights: .*\(add --cfg"),
    "no such cfg": (["--weights", "PLACE/net.weights", "--cfg", "none.cfg"], r"^none\.cfg: no such cfg"),
    "another network": (
        ["--weights", "PLACE/net.weights", "--cfg", "yolov3-tiny.cfg"],
        r"net\.weights: .*it runs out in layer 2",
    ),
    "no names": (["--names", "none.names"], r"^none\.names: no such names file"),
    "other names": (["--names", "data/coco.names"], r"trained on the classes square, bar"),
    "too many names": (
        ["--weights", "PLACE/net.weights", "--cfg", "PLACE/net.cfg", "--names", "voc.names"],
        r"not for the 20 classes that are named",
    ),
    "class name": (["--classes", "sqare"], r"^--classes: no class 'sqare' \(did you mean 'square'\?\)"),
    "class number": (["--classes", "2"], r"^--classes: no class '2' \(numbers go to 1\)"),
    "size": (["--img-size", "60"], r"60x60 is no multiple of the network's stride 16 \(try 64 64\)"),
    "sizes": (["--img-size", "64", "64", "64"], r"found 3 numbers"),
    "device": (["--device", "99"], r"^--device 99: no such GPU"),
    "half": (["--half", "--device", "cpu"], r"fp16: needs a CUDA device"),
    "name": (["--name", "../x"], r"expected a plain folder name"),
    "codec": (["--fourcc", "WHAT", "--source", "PLACE/video.avi"], r"^--fourcc WHAT: this OpenCV cannot write"),
    "source": (["--source", "nothing.jpg"], r"^nothing\.jpg: no such file, folder or pattern"),
    "empty folder": (["--source", "PLACE/empty"], r"empty: no picture or video in this folder"),
    "pattern": (["--source", "PLACE/net.*"], r"none of the 3 files of this pattern"),
    "empty video": (["--source", "PLACE/empty.mp4"], r"empty\.mp4: the video does not open"),
    "empty picture": (["--source", "PLACE/empty.jpg"], r"empty\.jpg: an empty file"),
    "all bad": (["--source", "PLACE/bad"], r"none of 2 files can be read \(first: .*a\.jpg: an empty file"),
    "refused stream": (
        ["--source", "rtsp://me:secret@127.0.0.1:1/x"],
        r"^rtsp://\*\*\*@127.0.0.1:1/x: the stream does",
    ),
    "address": (["--source", "rtsp://[x"], r"^--source: not an address"),
    "camera": (["--source", "77"], r"^camera 77: the camera does not open"),
    "no screen": (["--view-img"], r"^--view-img: there is no screen"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_folder(place, tmp_path, monkeypatch, mistake):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if mistake == "no screen" and not sys.platform.startswith("linux"):
        pytest.skip("only Linux says where its screen is")
    (place / "empty").mkdir(exist_ok=True)
    (place / "bad").mkdir(exist_ok=True)
    for name in ("empty.mp4", "empty.jpg", "bad/a.jpg", "bad/b.png"):
        (place / name).write_bytes(b"")
    flags, pattern = MISTAKES[mistake]
    with pytest.raises(UserError, match=pattern) as caught:
        run(place, tmp_path / "o", *(flag.replace("PLACE", str(place)) for flag in ["--retries", "0", *flags]))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags", [["--conf-thres", "1.5"], ["--max-det", "0"], ["--batch-size", "x"], ["--fourcc", "x"]]
)
def test_a_wrong_value_is_a_usage_error(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        detect.parse_args(["--weights", "x", "--source", "y", *flags])
    assert caught.value.code == 2 and f"argument {flags[0]}: expected " in capsys.readouterr().err


def test_a_stream_is_read_until_it_is_gone(place, tmp_path, monkeypatch, capsys):
    """A camera that sends twelve frames; what was found is written, then the exit code says that it is gone."""
    real = streams.open_capture
    monkeypatch.setattr(streams, "open_capture", lambda address, name: real(str(place / "video.avi"), name))
    with pytest.raises(ResourceError, match=r"^rtsp://\*\*\*@host/yard: no frame comes any more"):
        run(place, tmp_path, "--save-json", "--retries", 0, source="rtsp://me:secret@host/yard")
    folder, text = tmp_path / "exp", capsys.readouterr().out
    assert "batch size 1" in text and "rtsp://***@host/yard: 12 frames came, " in text and "secret" not in text
    entries = json.loads((folder / "detections.json").read_text())
    assert 1 <= len(entries) <= 12 and entries[-1]["frame"] == 11 and entries[0]["path"] == "rtsp://***@host/yard"
    capture = cv2.VideoCapture(str(folder / "yard.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 12, "a second of the stream lasts a second"


def test_a_grey_network_looks_at_colour_pictures(place, tmp_path):
    write_grid_network(tmp_path / "grey.safetensors", text=CFG.replace("channels=3", "channels=1"))
    folder = run(place, tmp_path, "--save-json", weights=tmp_path / "grey.safetensors")
    assert len(found_in(folder)) == 3 and read_image(folder / "wide.jpg").shape == (48, 96, 3)
    assert (
        run(place, tmp_path / "v", source="video.avi", weights=tmp_path / "grey.safetensors") / "video.mp4"
    ).is_file()


def test_known_objects_in_a_known_picture(data_dir, tmp_path):
    """The boxes the README of the data lists for dog.jpg, measured with OpenCV."""
    known = {"dog": [113, 188, 271, 347], "bicycle": [113, 126, 460, 370], "car": [449, 78, 234, 84]}
    weights = data_dir / "weights" / "yolo-fastest-1.1-xl.weights"
    flags = ("--cfg", weights.with_suffix(".cfg"), "--names", "coco.names", "--save-json", "--classes", *known)
    folder = run(data_dir, tmp_path, *flags, source="images/dog.jpg", weights=weights)
    found = found_in(folder)["dog.jpg"]["detections"]
    assert [one["name"] for one in found] == ["dog", "bicycle", "car"]
    for one in found:
        x, y, width, height = known[one["name"]]
        np.testing.assert_allclose(one["box"], [x, y, x + width, y + height], atol=16)  # other resizing of the picture


@pytest.mark.parametrize("script", ["detect.py", "test.py"])
def test_help_imports_nothing_heavy(script):
    command = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "numpy", "cv2", "yaml", "tqdm"}
    assert "--weights FILE" in done.stdout


def test_the_shell_sees_one_line_and_a_code(tmp_path):
    command = [sys.executable, "detect.py", "--weights", "none.pt", "--source", "x", "--project", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: none.pt: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


assert NAMES == ["square", "bar"]  # the texts above spell them out

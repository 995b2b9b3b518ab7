"""Rows V1 to V13: what detect looks at and where it writes. Streams are scripted; waits are noted, not waited."""

import json
import re
import resource
import signal
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from harness import refused

import detect
from models import predictor
from tests.grid_network import CFG, NAMES, grid_network, write_grid_network
from tests.utils.datasets.scripted import Scripted, frames_of, opened_by
from utils import results
from utils.checkpoint import with_prefix, write_checkpoint
from utils.datasets import sources
from utils.datasets.capture import DEFAULT_FPS, Frame, without_password
from utils.datasets.sources import open_source
from utils.datasets.streams import Streams
from utils.draw import draw_detections
from utils.errors import QuarantineError, ResourceError, UserError
from utils.files import write_text
from utils.results import ResultWriter, VideoFile, writable_rate
from utils.structures import Detections

YARD, GATE = "rtsp://me:secret@host/yard", "rtsp://me:secret@host/gate"
SHOWN = YARD.replace("me:secret", "***")


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    return write_grid_network(tmp_path_factory.mktemp("network") / "net.safetensors")


@pytest.fixture
def look(network, tmp_path, capsys):
    """``look(source, *flags) -> (folder, printed)``: detect.py in this process."""

    def call(source: object, *flags: object, weights: Path = network) -> tuple[Path, str]:
        args = ["--weights", weights, "--source", source, "--project", tmp_path / "runs", "--device", "cpu", *flags]
        detect.main(detect.parse_args(list(map(str, args))))
        return tmp_path / "runs" / "exp", capsys.readouterr().out

    return call


def write_video(path: Path, num_frames: int, size: tuple[int, int] = (64, 96), codec: str = "MJPG") -> Path:
    """Grey noise, 20 frames per second; ``size`` is (h, w)."""
    draw = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 20.0, size[::-1])
    for _ in range(num_frames):
        writer.write(np.repeat(draw.integers(0, 255, (*size, 1), dtype=np.uint8), 3, axis=2))
    writer.release()
    return path


def write_pictures(folder: Path, num: int = 3) -> Path:
    folder.mkdir()
    for number in range(num):
        _, data = cv2.imencode(".png", np.full((64, 64, 3), 60 * number, np.uint8))
        (folder / f"{number}.png").write_bytes(data.tobytes())
    return folder


def video_of(path: Path) -> tuple[float, list[np.ndarray]]:
    """Frames per second and frames (BGR) of a file."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while capture.grab():
        frames.append(capture.retrieve()[1])
    return capture.get(cv2.CAP_PROP_FPS), frames


def untimed(line: str) -> str:
    """Without the time of day: the table is to be the same each time."""
    return re.sub(r"\d\d:\d\d:\d\d", "TIME", line)


class Patience(threading.Event):
    """Stands in for what a stream waits with: notes the seconds and does not wait."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        return self.is_set()


def patient(addresses: list[str], **options) -> tuple[Streams, Patience, list[str]]:
    """Streams that do not wait, their waits, and what they say."""
    said, patience = [], Patience()
    streams = Streams(addresses, say=said.append, **options)
    streams._closed = patience
    return streams, patience, said


# ---------------------------------------------------------------------------------------------------- what is read


def test_v1_files_of_a_user_stay(look, tmp_path, seen):
    pictures = write_pictures(tmp_path / "pictures")
    thesis = tmp_path / "runs" / "exp" / "thesis.txt"
    write_text(thesis, "three years")
    look(pictures)
    assert list(thesis.parent.iterdir()) == [thesis] and (tmp_path / "runs" / "exp2" / "0.png").is_file()
    look(pictures, "--exist-ok")
    assert thesis.read_text() == "three years"
    before = {file.name: file.read_bytes() for file in pictures.iterdir()}
    where = ("--project", tmp_path, "--name", "pictures", "--exist-ok")
    line = refused(lambda: look(pictures, *where), says="would be replaced by its own result")
    seen(f"a new folder; with --exist-ok nothing is removed; a picture that was read: {line.split(': ', 1)[1]}")
    assert {file.name: file.read_bytes() for file in pictures.iterdir()} == before


@pytest.mark.parametrize("bad", [b"", b"<html>", b"\x89PNG\r\n\x1a\n"], ids=["V2-empty", "V2-html", "V2-cut"])
def test_the_other_pictures_are_done(look, tmp_path, seen, bad):
    pictures = write_pictures(tmp_path / "pictures")
    (pictures / "1.png").write_bytes(bad)
    folder, out = look(pictures)
    assert {file.name for file in folder.iterdir()} == {"0.png", "2.png"}
    assert f"warning: {pictures}/1.png: " in out and "1 of 3 files could not be read" in out
    with pytest.raises(QuarantineError) as caught:
        look(pictures, "--strict")
    assert caught.value.exit_code == 3
    seen("the rest done; '1 of 3 files could not be read'; exit 0, under --strict 3")


def test_v3_a_video_that_is_cut_off(look, tmp_path, seen):
    whole = write_video(tmp_path / "whole.avi", 30).read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole[: len(whole) // 6])
    num = len(video_of(cut)[1])
    assert 1 <= num <= 8, "the container still promises 30"
    folder, out = look(cut)
    assert f"warning: {cut}: ends early: {num} of 30 frames can be read" in out
    assert len(video_of(folder / "cut.mp4")[1]) == num
    with pytest.raises(QuarantineError):
        look(cut, "--strict")
    seen(f"warning: ends early: {num} of 30 frames can be read; exit 3 under --strict")


@pytest.mark.parametrize(
    "content, says",
    {
        "V4-empty": (b"", "the video does not open"),
        "V4-html": (b"<html><body>404</body></html>" * 99, "the video does not open"),
        "V4-playlist": (b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:1/x.ts\n", "the video does not open"),
        "V4-missing": (None, "no such file, folder or pattern"),
    }.values(),
    ids=["V4-empty", "V4-html", "V4-playlist", "V4-missing"],
)
def test_what_is_no_video(look, tmp_path, seen, content, says):
    video = tmp_path / "x.mp4"
    if content is not None:
        video.write_bytes(content)
    refused(lambda: look(video), where=str(video), says=says)
    seen(f"x.mp4: {says}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("fps", [0.0, float("nan"), float("inf"), -5.0, 90000.0], ids=lambda fps: f"V5-{fps}")
def test_senseless_frame_rates(look, tmp_path, monkeypatch, fps):
    capture = Scripted(range(4), promised=4, fps=fps)
    monkeypatch.setattr(sources, "open_capture", lambda *_: capture)
    (tmp_path / "x.mp4").touch()
    folder, _ = look(tmp_path / "x.mp4")
    assert video_of(folder / "x.mp4")[0] == DEFAULT_FPS and capture.released


@pytest.mark.parametrize(
    "fps, written", [(30000 / 1001, 29.97), (1000 / 7, 142.86), (999.97, 1000), (23.976, 23.976), (1 / 9000, 0.01)]
)
def test_v5_a_frame_rate_that_the_format_cannot_state(tmp_path, fps, written):
    assert writable_rate(fps) == written
    video = VideoFile(tmp_path / "v.mp4", fps, (48, 32), "mp4v")
    for _ in range(3):
        video.append(np.zeros((32, 48, 3), np.uint8))
    video.close()
    assert video_of(tmp_path / "v.mp4")[0] == pytest.approx(written)


def test_v5_sizes_that_change(look, tmp_path, monkeypatch, seen):
    shapes = [(48, 64), (64, 48), (100, 30), (1, 1), (48, 64)]
    frames = [np.full((*shape, 3), 99, np.uint8) for shape in shapes]
    monkeypatch.setattr(sources, "open_capture", lambda *_: Scripted(frames, promised=5))
    (tmp_path / "x.mp4").touch()
    folder, _ = look(tmp_path / "x.mp4", "--save-json")
    entries = json.loads((folder / "detections.json").read_text())
    assert [(entry["height"], entry["width"]) for entry in entries] == shapes
    assert [frame.shape[:2] for frame in video_of(folder / "x.mp4")[1]] == [shapes[0]] * 5
    seen("30 frames per second; each frame at its own size, written at the first one's; rotation applied")


def test_v5_a_rotation_flag_is_followed(look, tmp_path):
    upright = write_video(tmp_path / "a.mp4", 3, codec="mp4v")
    data = bytearray(upright.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the track's matrix: version, times, id, duration, layer, volume come before
    assert struct.unpack_from(">9i", data, at)[0] == 1 << 16
    struct.pack_into(">9i", data, at, 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    (frame, *_), (plain, *_) = open_source(str(tmp_path / "turned.mp4")), open_source(str(upright))
    np.testing.assert_array_equal(frame.image, np.rot90(plain.image, -1))
    assert video_of(look(tmp_path / "turned.mp4")[0] / "turned.mp4")[1][0].shape == (96, 64, 3)


# ------------------------------------------------------------------------------------------------------- streams


def test_v6_a_stream_that_is_refused(server, network, tmp_path, seen):
    args = ("--weights", network, "--project", tmp_path / "runs", "--source", "rtsp://me:secret@127.0.0.1:1/x")
    done = server.run("detect.py", *args, "--retries", 1)
    assert done.code == 2 and not (tmp_path / "runs").exists()
    assert "rtsp://***@127.0.0.1:1/x: the stream does not open; try 1 of 1 in 1 s" in done.err
    assert "secret" not in done.err + done.out
    assert done.error_line().startswith("error: rtsp://***@127.0.0.1:1/x: the stream does not open; given up at ")
    seen(untimed(done.error_line()))


@pytest.mark.parametrize("retries", [0, 1, 7])
def test_v6_so_many_tries_and_no_more(monkeypatch, retries):
    asked = opened_by(monkeypatch, {})
    streams, patience, _ = patient([YARD], retries=retries)
    assert list(streams) == [] and asked == [YARD] * (retries + 1)
    assert patience.waits == [1, 2, 4, 8, 16, 30, 30][:retries]
    refused(lambda: streams.refuse_lost(SHOWN), where=SHOWN, says="the stream does not open", exit_code=2)


def test_v7_a_stream_that_drops(monkeypatch, seen):
    """Lost, closed for three tries, back for a frame, lost for good; no frame is there that was not sent."""
    script = [Scripted([1, 2, 3], slow=0.002), Scripted([]), None, Scripted([]), Scripted([4])]
    asked = opened_by(monkeypatch, {YARD: script.copy()})
    streams, patience, said = patient([YARD], retries=8)
    shown = frames_of(streams)
    assert shown == sorted(set(shown)) and set(shown) <= {1, 2, 3, 4} and shown[-1] == 4
    assert patience.waits == [1, 2, 4, 8, 1, 2, 4, 8, 16, 30, 30, 30], "a frame starts the count anew"
    assert len(asked) == 1 + 4 + 8 and all(capture.released for capture in script if capture)
    assert (
        "no frame comes any more; try 1 of 8 in 1 s" in said[0] and "opens, but sends no frame; try 2 of 8" in said[1]
    )
    assert "the stream does not open; try 3 of 8 in 4 s" in said[2] and " back after " in said[4]
    (stream,) = streams.streams
    assert stream.num_gaps == 1 and "lost 1 times, " in stream.summary()
    line = refused(lambda: streams.refuse_lost(SHOWN), where=SHOWN, says="after 4 frames, 8 retries", exit_code=5)
    seen(f"tries after 1, 2, 4, ... 30 s; gaps logged; exit 5: {untimed(line)}")


def test_v7_results_are_written_before_the_exit_code(look, tmp_path, monkeypatch, capsys):
    opened_by(monkeypatch, {YARD: [Scripted([50, 60], slow=0.01)]})
    with pytest.raises(ResourceError):
        look(YARD, "--retries", 0, "--save-json")
    folder, out = tmp_path / "runs" / "exp", capsys.readouterr().out
    assert json.loads((folder / "detections.json").read_text()) and (folder / "yard.mp4").is_file()
    assert f"Results: {folder}" in out and f"warning: {SHOWN}: no frame comes any more" in out


def test_v8_who_is_slow_gets_the_newest(monkeypatch, seen):
    capture = Scripted(range(200), by_hand=True)
    opened_by(monkeypatch, {YARD: [capture]})
    streams = Streams([YARD], retries=0, say=lambda text: None)
    (stream,), shown = streams.streams, []
    for frame in streams:
        shown.append(frame)
        capture.more.release(50)  # while one is looked at, fifty come
        while stream.num_frames < min(200, 50 * len(shown) + 1) and not stream.lost:
            time.sleep(0.001)
    assert [frame.number for frame in shown] == [0, 50, 100, 150, 199]
    assert [frame.num_dropped for frame in shown] == [0, 49, 49, 49, 48] and stream.num_dropped == 195
    assert stream.num_frames == 200
    seen(stream.summary().split(": ", 1)[1])


def test_v9_the_others_go_on(look, tmp_path, monkeypatch, capsys, seen):
    opened_by(monkeypatch, {YARD: [Scripted([1, 2])], GATE: [Scripted(range(40), slow=0.005)], 7: [None]})
    (tmp_path / "all.streams").write_text(f"{YARD}\n{GATE}\n7\n")
    with pytest.raises(ResourceError, match="all 3 streams are lost"):
        look(tmp_path / "all.streams", "--retries", 0, "--save-json")
    folder, printed = tmp_path / "runs" / "exp", capsys.readouterr()
    entries = json.loads((folder / "detections.json").read_text())
    frames = [entry["frame"] for entry in entries if entry["path"].endswith("gate")]
    assert (
        frames[-1] == 39 and frames == sorted(set(frames)) and {file.name for file in folder.iterdir()} >= {"gate.mp4"}
    )
    for name in (SHOWN, SHOWN.replace("yard", "gate"), "camera 7"):
        assert f"warning: {name}: " in printed.out and f"{name}: " in printed.err
    seen("lost ones are told at once and at the end; exit 5 when none is left")


def test_v9_one_that_dies_counts_as_not_read(monkeypatch):
    gate = Scripted([2, 3], by_hand=True)
    opened_by(monkeypatch, {YARD: [Scripted([1])], GATE: [gate]})
    lost = threading.Event()
    streams = Streams([YARD, GATE], retries=0, say=lambda text: lost.set())
    for _ in streams:
        if lost.wait(20):
            break
    assert [problem.split(": ")[0] for problem in streams.problems] == [SHOWN]
    streams.refuse_lost("all.streams")  # one is left: nothing to say
    gate.more.release()
    streams.close()


@pytest.mark.parametrize(
    "address",
    [
        "rtsp://me:secret@host:554/yard",
        "rtsp://me:s/e#c@secret@host/yard",
        "http://host/video.cgi?user=me&password=secret",
        "http://secret@host/x",
        "rtsp://host/yard?channel=1&auth_token=secret#x",
    ],
    ids=lambda address: f"V10-{address.replace('secret', '')}",
)
def test_credentials_are_masked(look, tmp_path, monkeypatch, capsys, seen, address):
    opened_by(monkeypatch, {address: [Scripted([1, 2])]})
    with pytest.raises(UserError) as caught:
        look(address, "--retries", 0, "--save-json", "--save-txt", "--save-crop", "--strict")
    printed = capsys.readouterr()
    text = str(caught.value) + printed.out + printed.err
    for file in (tmp_path / "runs").rglob("*"):
        text += file.name + (file.read_text() if file.suffix in {".json", ".txt"} else "")
    assert without_password(address) in text and "secret" not in text
    seen(without_password(address))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_video_well(server, network, tmp_path, number, code):
    """The usual end of a stream: the video plays, the json is whole, the last lines are there."""
    args = ("--weights", network, "--source", write_video(tmp_path / "v.avi", 2000), "--project", tmp_path / "runs")
    running = server.start("detect.py", *args, "--device", "cpu", "--save-json", "--save-txt")
    labels, end = tmp_path / "runs" / "exp" / "labels", time.monotonic() + 30
    while not (labels.is_dir() and len(list(labels.iterdir())) > 5) and time.monotonic() < end:
        time.sleep(0.01)
    running.signal(number)
    done = running.wait()
    assert done.code == code and f"stopped by {number.name}: what was found is written" in done.err
    entries = json.loads((labels.parent / "detections.json").read_text())
    assert 1 <= len(video_of(labels.parent / "v.mp4")[1]) <= len(entries) < 2000
    assert f"{labels.parent}" in done.out and " frames in " in done.out


# -------------------------------------------------------------------------------------------------- what is written


def small_files() -> None:
    """No file of this process may grow beyond 40 kB: what a full disk does to a video."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_v11_a_video_that_does_not_fit(server, network, tmp_path, seen):
    video = write_video(tmp_path / "v.avi", 20, size=(192, 256))
    args = ("--weights", network, "--source", video, "--project", tmp_path / "runs", "--device", "cpu", "--save-txt")
    done = server.run("detect.py", *args, before=small_files)
    assert done.code == 5, done.err
    assert "frames could be written (is there room on the disk?)" in done.error_line()
    assert sorted(file.name for file in (tmp_path / "runs" / "exp").iterdir()) == ["labels", "v.part.mp4"]
    seen(done.error_line().rpartition("/")[2])


def test_v11_a_disk_that_is_nearly_full(look, tmp_path, monkeypatch):
    """It is noticed at the next frame, not after hours; what was written plays, and is called a part."""
    room = iter([1 << 30] * 5 + [1000] * 99)
    usage = type("Usage", (), {"free": property(lambda self: next(room))})()
    monkeypatch.setattr(results.shutil, "disk_usage", lambda folder: usage)
    video = write_video(tmp_path / "v.avi", 20)
    line = refused(lambda: look(video, "--save-json"), says="the disk is full; 5 frames are written", exit_code=5)
    folder = tmp_path / "runs" / "exp"
    assert line.startswith(f"{folder}/v.part.mp4: ") and len(video_of(folder / "v.part.mp4")[1]) == 5
    assert {file.name for file in folder.iterdir()} == {"v.part.mp4", "detections.json"}


@pytest.mark.parametrize(
    "flag", ["--save-txt", "--save-json", "--save-crop", "--exist-ok"], ids=lambda flag: f"V11{flag}"
)
def test_a_result_that_cannot_be_written(look, tmp_path, monkeypatch, flag):
    """Pictures, labels, crops and json are written beside their names: nothing of a failed one is left."""
    monkeypatch.setenv("MATCHBOX_FAULT", "file.fsync:1+:enospc")
    drawn = [] if flag == "--exist-ok" else ["--nosave"]
    refused(lambda: look(write_pictures(tmp_path / "pictures"), flag, *drawn), says="No space left", exit_code=5)
    assert not [file for file in (tmp_path / "runs").rglob("*") if file.is_file() and ".part" in file.name]


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/passwd", "..", ".", "", "a\nb", "a\\b", "x\0y", "\x1b[2J", "a" * 400, "C:\\x", ".hidden"],
    ids=lambda name: f"V12-{name[:8]!r}",
)
def test_class_names_are_no_paths(tmp_path, name):
    writer = ResultWriter(folder=tmp_path / "run", names=[name, "cat"], save_crop=True)
    found = detections([[1, 1, 9, 9], [2, 2, 12, 9]], labels=[0, 1])
    writer.write(Frame(image=np.zeros((20, 30, 3), np.uint8), path="x.png"), found)
    writer.close()
    crops = list(tmp_path.rglob("*.jpg"))
    assert len(crops) == 2 and list(tmp_path.iterdir()) == [tmp_path / "run"]
    assert {crop.parent.parent for crop in crops} == {tmp_path / "run" / "crops"}
    assert all(crop.parent.name.isprintable() and not crop.parent.name.startswith(".") for crop in crops)


def detections(boxes: list, labels: list[int] | None = None) -> Detections:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor(labels or [0] * len(boxes))
    return Detections(boxes=boxes, scores=torch.full((len(boxes),), 0.9), labels=labels)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "box, is_drawn",
    [
        ([NAN, 1, 9, 9], False),
        ([1, 1, INF, 9], False),
        ([-INF, -INF, INF, INF], False),
        ([-1e30, -1e30, 1e30, 1e30], True),
        ([5, 5, 3e38, 3e38], True),
        ([1e30, 1e30, 2e30, 2e30], False),
        ([9, 9, 1, 1], True),
    ],
    ids=lambda value: f"V13-{value}" if isinstance(value, list) else "",
)
def test_odd_boxes_are_drawn_or_not(box, is_drawn):
    image = np.zeros((20, 30, 3), np.uint8)
    drawn = draw_detections(image, detections([box, [2, 2, 9, 9]]), ["x"], hide_labels=True)
    alone = draw_detections(image, detections([[2, 2, 9, 9]]), ["x"], hide_labels=True)
    assert drawn.shape == image.shape and (not np.array_equal(drawn, alone)) == is_drawn


def test_v13_huge_boxes_of_a_network_are_clipped(look, tmp_path):
    """A width of e^80 anchors."""
    model, weights = grid_network(), tmp_path / "odd.safetensors"
    *_, bias = model.parameters()
    with torch.no_grad():
        bias[2] = 80.0
    write_checkpoint(weights, with_prefix("model", model.state_dict()), {"cfg": CFG, "names": NAMES})
    folder, _ = look(write_pictures(tmp_path / "p"), "--save-json", "--save-crop", "--save-txt", weights=weights)
    entries = json.loads((folder / "detections.json").read_text())
    boxes = np.array([one["box"] for entry in entries for one in entry["detections"]])
    assert len(boxes) >= 3 and (boxes[:, 0] == 0).all() and (boxes[:, 2] == 64).all()


@pytest.mark.parametrize("value", [NAN, INF], ids=lambda value: f"V13-{value}")
def test_boxes_that_are_no_numbers_are_counted(look, tmp_path, monkeypatch, seen, value):
    """Every second slot; the others are found, drawn and written before the exit code says it."""

    def poisoned(preds, real=predictor.postprocess, **options):
        boxes = preds.boxes.clone()
        boxes[:, ::2, ..., 0] = value
        return real(replace(preds, boxes=boxes), **options)

    monkeypatch.setattr(predictor, "postprocess", poisoned)
    line = refused(lambda: look(write_pictures(tmp_path / "p"), "--save-json"), says=" detections had", exit_code=4)
    folder = tmp_path / "runs" / "exp"
    entries = json.loads((folder / "detections.json").read_text())
    assert sum(len(entry["detections"]) for entry in entries) == 3 * 8 and len(list(folder.glob("*.png"))) == 3
    seen("clipped to the picture; " + line.split(": ", 1)[1])

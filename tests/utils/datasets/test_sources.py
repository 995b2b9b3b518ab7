"""What detect looks at: every kind of source, in order, and what is wrong with some."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from scripted import Scripted

from utils.datasets import sources
from utils.datasets.capture import DEFAULT_FPS, without_password
from utils.datasets.sources import open_source
from utils.errors import UserError


def write_picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(".png", np.full((8, 12, 3), (0, 0, value), np.uint8))  # BGR: red
    path.write_bytes(data.tobytes())


def write_video(path: Path, num_frames: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (32, 16))
    for number in range(num_frames):
        writer.write(np.full((16, 32, 3), 20 * number, np.uint8))
    writer.release()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """b.png, a.jpg (a PNG by content), deep/c.png, notes.txt and a video of 5 frames."""
    for number, name in enumerate(("b.png", "a.jpg", "deep/c.png")):
        write_picture(tmp_path / name, 50 * number + 50)
    (tmp_path / "notes.txt").write_text("\ufeff# a list\nb.png\r\n\ndeep/c.png\n", encoding="utf-8")
    write_video(tmp_path / "v.avi", 5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(text: str, **options) -> list[str]:
    return [Path(frame.path).name for frame in open_source(text, **options)]


@pytest.mark.parametrize(
    "text, expected",
    {
        "b.png": ["b.png"],
        ".": ["a.jpg", "b.png", *["v.avi"] * 5],
        "*.png": ["b.png"],
        "**/*.png": ["b.png", "c.png"],
        "*": ["a.jpg", "b.png", *["v.avi"] * 5],
        "notes.txt": ["b.png", "c.png"],
        "v.avi": ["v.avi"] * 5,
    }.items(),
)
def test_every_kind_of_files(folder, text, expected):
    assert names(text) == expected
    assert names(str(folder / text)) == expected


def test_pictures_are_rgb_and_stills(folder):
    (frame,) = open_source("a.jpg")
    assert frame.image.shape == (8, 12, 3) and frame.image[0, 0].tolist() == [100, 0, 0]
    assert frame.fps is None and frame.number == 0
    (frame,) = open_source("a.jpg", channels=1)
    assert frame.image.shape == (8, 12, 1)


@pytest.mark.parametrize("stride", [1, 2, 3, 9])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_video_by_strides(folder, stride, channels):
    source = open_source("v.avi", stride=stride, channels=channels)
    numbers = list(range(0, 5, stride))
    assert source.total == len(numbers) and source.streams is None
    frames = list(source)
    assert [frame.number for frame in frames] == numbers and source.problems == []
    for frame in frames:
        assert frame.fps == pytest.approx(10 / stride) and frame.image.shape == (16, 32, channels)
        assert abs(float(frame.image.mean()) - 20 * frame.number) < 6


def test_totals(folder):
    assert open_source("**/*.png").total == 2
    assert open_source(".").total is None, "nobody knows before the video is opened"


def test_unreadable_files_among_others_are_counted(folder):
    (folder / "a.jpg").write_bytes(b"")
    (folder / "w.mp4").write_text("<html>")
    source = open_source(".")
    assert [Path(frame.path).name for frame in source] == ["b.png", *["v.avi"] * 5]
    assert len(source.problems) == 2 and "a.jpg" in source.problems[0] and "w.mp4" in source.problems[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("none.jpg", "no such file, folder or pattern"),
        ("none/*.jpg", "no such file, folder or pattern"),
        ("no*es.txt", "none of the 1 files of this pattern is a picture or video"),
        ("empty", "no picture or video in this folder"),
        ("empty.txt", "the list names no file"),
        ("binary.txt", "not UTF-8 text"),
        ("gone.txt", r"none of 2 files can be read \(first: .*x\.jpg: No such file"),
        ("zero.mp4", "the video does not open"),
        ("zero.png", "an empty file"),
        ("none.streams", "no such file, folder or pattern"),
        ("~nobody at all/x.jpg", "no such file, folder or pattern"),
        ("x" * 300 + ".jpg", "no such file, folder or pattern"),
        ("long.txt", r"none of 2 files can be read \(first: .*too long"),
        ("98", "^camera 98: the camera does not open"),
        ("http://127.0.0.1:1/x.mjpg", "^http://127.0.0.1:1/x.mjpg: the stream does not open"),
        ("http://127.0.0.1:1/x.mp4", "^http://127.0.0.1:1/x.mp4: the stream does not open"),
    ],
)
def test_what_cannot_be_opened_is_said_at_once(folder, text, message):
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("# nothing\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00a")
    (folder / "gone.txt").write_text("x.jpg\ny.mp4\n")
    (folder / "long.txt").write_text(f"{'x' * 300}.jpg\n{'x' * 300}.mp4\n")
    (folder / "zero.mp4").touch()
    (folder / "zero.png").touch()
    with pytest.raises(UserError, match=message):
        open_source(text, retries=0)


def test_a_folder_that_may_not_be_read(folder, monkeypatch):
    def iterdir(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match="the folder cannot be read: Permission denied"):
        open_source(".")


@pytest.mark.parametrize(
    "address, shown",
    [
        ("rtsp://me:secret@host:554/yard", "rtsp://***@host:554/yard"),
        ("rtsp://me:se@cret@host/yard", "rtsp://***@host/yard"),
        ("http://host/x?y=1", "http://host/x?y=1"),
        ("http://host:80/x@2x", "http://host:80/x@2x"),
        ("rtsp://me:s/e#c?r@t@host/yard", "rtsp://***@host/yard"),
        ("http://host/a.cgi?user=me&pwd=secret&camera=2", "http://host/a.cgi?user=***&pwd=***&camera=2"),
        ("rtsp://[::1]:554/a@b", "rtsp://[::1]:554/a@b"),
    ],
)
def test_passwords_are_never_shown(address, shown):
    assert without_password(address) == shown


@pytest.fixture
def capture(monkeypatch, tmp_path):
    """Make every file open as the stand-in that the test asks for."""

    def opens(promised: float, sent: int, **options) -> Scripted:
        made = Scripted(range(sent), promised=promised, **options)
        monkeypatch.setattr(sources, "open_capture", lambda address, name: made)
        return made

    (tmp_path / "x.mp4").touch()
    return opens


@pytest.mark.parametrize(
    "promised, sent, is_early",
    [
        (30, 4, True),
        (30, 30, False),
        (30, 29, False),
        (1000, 991, False),
        (1000, 980, True),
        (0, 3, False),
        (-1, 3, False),
    ],
)
def test_a_video_that_ends_early(capture, tmp_path, promised, sent, is_early):
    made = capture(promised, sent)
    source = open_source(str(tmp_path / "x.mp4"))
    assert len(list(source)) == sent and made.released
    assert len(source.problems) == is_early
    if is_early:
        assert f"ends early: {sent} of {promised} frames" in source.problems[0]


def test_a_video_without_a_frame(capture, tmp_path):
    made = capture(30, 0)
    with pytest.raises(UserError, match="opens, but not one frame of it can be decoded"):
        open_source(str(tmp_path / "x.mp4"))
    assert made.released


@pytest.mark.parametrize("fps", [0.0, float("nan"), 90000.0])
def test_senseless_frame_rates(capture, tmp_path, fps):
    capture(3, 3, fps=fps)
    assert {frame.fps for frame in open_source(str(tmp_path / "x.mp4"))} == {DEFAULT_FPS}


def test_opencv_keeps_its_log_level(folder):
    log = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # it moved within OpenCV 4
    before = log.getLogLevel()
    with pytest.raises(UserError):
        open_source("98", retries=0)
    assert log.getLogLevel() == before


def test_file_addresses_are_paths(folder):
    write_picture(folder / "ü 1.png", 10)
    (folder / "addresses.txt").write_text(f"{(folder / 'b.png').as_uri()}\ndeep/c.png\n")
    assert names((folder / "ü 1.png").as_uri()) == ["ü 1.png"]
    assert names((folder / "v.avi").as_uri(), stride=5) == ["v.avi"]
    assert names("addresses.txt") == ["b.png", "c.png"]
    for nothing in ((folder / "x.jpg").as_uri(), "file:///a%00b.png"):
        with pytest.raises(UserError, match="no such file, folder or pattern"):
            open_source(nothing)

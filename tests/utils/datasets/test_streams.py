"""Cameras and streams: newest frame wins, nobody waits for a dead one, and every thread ends."""

import threading
import time
from itertools import cycle

import cv2
import pytest
from scripted import Scripted, frames_of, opened_by

from utils.datasets.sources import open_source
from utils.datasets.streams import LATENCIES, Streams
from utils.errors import ResourceError, UserError

YARD, GATE = "rtsp://me:secret@host/yard", "rtsp://me:secret@host/gate"


@pytest.fixture
def plays(monkeypatch):
    """``plays({address: [capture or None, ...]})``: what opening an address gives, one after the other."""
    return lambda scripts: opened_by(monkeypatch, scripts)


def one_by_one(source, capture: Scripted) -> list:
    """All frames of a capture that sends the next one when the last one was taken."""
    frames = []
    for frame in source:
        frames.append(frame)
        capture.more.release()
    return frames


def test_frames_until_the_stream_is_gone(plays):
    capture = Scripted([10, 20, 30], by_hand=True)
    plays({0: [capture]})
    source = open_source("0", retries=0)
    assert source.total is None and source.streams is not None and source.name == "camera 0"
    frames = one_by_one(source, capture)
    assert [(frame.path, frame.image.mean()) for frame in frames] == [
        ("camera 0", 10),
        ("camera 0", 20),
        ("camera 0", 30),
    ]
    assert [frame.number for frame in frames] == [0, 1, 2] and frames[0].fps == 25
    assert len(source.problems) == 1 and source.problems[0].startswith(
        "camera 0: no frame comes any more; given up at "
    )
    with pytest.raises(ResourceError, match=r"^camera 0: no frame comes any more"):
        source.streams.refuse_lost(source.name)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours(plays, channels):
    plays({YARD: [Scripted([40])]})
    (frame,) = open_source(YARD, retries=0, channels=channels)
    assert frame.image.shape == (4, 6, channels) and frame.path == "rtsp://***@host/yard"


def test_strides(plays):
    capture = Scripted(range(7), by_hand=True)
    plays({YARD: [capture]})
    capture.more.release(2)
    frames = []
    for frame in open_source(YARD, retries=0, stride=3):
        frames.append(frame)
        capture.more.release(3)
    assert [frame.number for frame in frames] == [0, 3, 6] and frames[0].fps == pytest.approx(25 / 3)
    assert [frame.num_dropped for frame in frames] == [0, 0, 0], "not looked at is not dropped"


def test_streams_take_turns(plays):
    """A fast stream does not starve a slow one."""
    plays({YARD: [Scripted(cycle([1]), slow=0.0005)], GATE: [Scripted(cycle([2]), slow=0.002)]})
    streams, seen = Streams([YARD, GATE], retries=0, say=lambda text: None), []
    for frame in streams:
        seen.append(int(frame.image.mean()))
        if len(seen) == 7:
            break
        end = time.monotonic() + 20
        while not all(stream.newest for stream in streams.streams) and time.monotonic() < end:
            time.sleep(0.001)
    streams.close()
    assert seen[1:] in ([1, 2] * 3, [2, 1] * 3)


def test_two_cameras_behind_one_name_stay_two(plays):
    plays({YARD: [Scripted([1])], YARD.replace("secret", "other"): [Scripted([2])]})
    streams = Streams([YARD, YARD.replace("secret", "other")], retries=0, say=lambda text: None)
    assert {frame.path for frame in streams} == {"rtsp://***@host/yard", "rtsp://***@host/yard #2"}


def test_lists_of_streams(plays, tmp_path):
    plays({0: [Scripted([1])], YARD: [Scripted([2])]})
    file = tmp_path / "cameras.streams"
    file.write_text(f"# gate and yard\n0\n{YARD}\n")
    assert {frame.path for frame in open_source(str(file), retries=0, say=lambda text: None)} == {
        "camera 0",
        "rtsp://***@host/yard",
    }
    file.write_text(f"{YARD}\nx.jpg\n")
    with pytest.raises(UserError, match=r"cameras.streams: names streams and files \('x.jpg'\)"):
        open_source(str(file))


def test_an_address_of_a_video_file_is_read_whole(monkeypatch):
    from utils.datasets import sources

    address = "http://me:secret@host/clips/a.mp4?token=1"
    monkeypatch.setattr(sources, "open_capture", lambda *_: Scripted(range(50), promised=50))
    source = open_source(address)
    assert source.streams is None and source.total == 50 and frames_of(source) == list(range(50))
    assert source.name == "http://***@host/clips/a.mp4?token=***"


def test_closing_ends_a_wait_and_the_threads(plays, monkeypatch):
    before = threading.active_count()
    plays({YARD: [Scripted([1])]})  # then it waits to open the stream again
    monkeypatch.setattr("utils.datasets.streams.FIRST_WAIT", 600)
    said = threading.Event()
    source = open_source(YARD, say=lambda text: said.set())
    closing = threading.Thread(target=lambda: (said.wait(20), source.close()))
    closing.start()
    assert len(list(source)) == 1, "no more frames once it is closed"
    closing.join()
    assert threading.active_count() == before


def test_a_mistake_in_a_thread_is_raised_where_frames_are_read(plays):
    plays({YARD: [Scripted(["not a picture"])]})
    with pytest.raises(cv2.error):
        list(Streams([YARD]))


def test_latency_is_that_of_the_last_frames(plays):
    capture = Scripted(range(3), by_hand=True)
    plays({YARD: [capture]})
    streams = Streams([YARD], retries=0)
    for frame in streams:
        assert streams.finished(frame).startswith("latency ")
        capture.more.release()
    (stream,) = streams.streams
    assert stream.latencies.maxlen == LATENCIES and len(stream.latencies) == 3 and min(stream.latencies) >= 0
    assert stream.summary().startswith("rtsp://***@host/yard: 3 frames came, 0 dropped for newer ones, latency ")

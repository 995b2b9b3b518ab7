"""Numbers of objects over frames: with the library where it is installed, and with a stand-in for the way there."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from utils import tracking
from utils.datasets.capture import Frame
from utils.draw import draw_detections
from utils.errors import UserError
from utils.results import ResultWriter
from utils.structures import Detections
from utils.tracking import Tracker


def frame(number: int = 0, path: str = "v.mp4", fps: float | None = 25.0, **more) -> Frame:
    return Frame(image=np.zeros((90, 300, 3), np.uint8), path=path, number=number, fps=fps, **more)


def found(*lefts: float, labels: list[int] | None = None, score: float = 0.9) -> Detections:
    boxes = torch.tensor([[x, 20.0, x + 40, 80] for x in lefts]).reshape(-1, 4)
    labels = torch.tensor(labels or [0] * len(lefts), dtype=torch.int64)
    return Detections(boxes=boxes, scores=torch.full((len(lefts),), score), labels=labels)


@pytest.fixture
def scripted(monkeypatch) -> list:
    """A tracker that numbers objects by their left edge // 100; returns how it was called."""
    calls = []

    def sequence(fps: float):
        def update(detections, seconds):
            calls.append((fps, seconds))
            return (detections.boxes[:, 0] // 100).long()

        return update

    monkeypatch.setattr(tracking, "_byte_track", lambda: sequence)
    return calls


def test_the_library_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"^--track: needs the package trackers: .*\(pip install trackers\)$"):
        Tracker()


def test_each_video_counts_for_itself(scripted):
    track = Tracker()
    for path in ("a.mp4", "b.mp4"):
        for number in range(3):
            assert track(frame(number, path), found(120, 230, 10, labels=[1, 0, 1])).ids.tolist() == [1, 2, 0]
    assert track.totals == {1: 2, 0: 2}


def test_time_is_that_of_the_frames(scripted):
    track = Tracker()
    track(frame(fps=12.5), found())
    track(frame(path="rtsp://host/x", arrived=7.5), found())
    track(frame(path="a.png", fps=None), found(120))
    track(frame(path="b.png", fps=None), found(220))
    assert scripted == [(12.5, None), (25.0, 7.5), (30.0, None), (30.0, None)]
    assert track.totals == {0: 2}, "pictures of a folder are one film"


def test_numbers_in_every_file(scripted, tmp_path):
    detections = Tracker()(frame(), found(120, 10, labels=[1, 0]))
    writer = ResultWriter(folder=tmp_path, names=["cat", "dog"], save_txt=True, save_conf=True, save_json=True)
    writer.write(frame(), detections)
    writer.close()
    (entry,) = json.loads((tmp_path / "detections.json").read_text())
    assert [(one["name"], one["track"]) for one in entry["detections"]] == [("dog", 1), ("cat", 0)]
    lines = (tmp_path / "labels" / "v_000000.txt").read_text().splitlines()
    assert [line.split()[0] + " " + " ".join(line.split()[5:]) for line in lines] == ["1 0.900000 1", "0 0.900000 0"]


def test_numbers_are_drawn(scripted):
    image, detections = frame().image, Tracker()(frame(), found(120))
    plain = draw_detections(image, found(120), ["dog"])
    numbered = draw_detections(image, detections, ["dog"])
    assert numbered[:, :].any(axis=(0, 2)).sum() > plain.any(axis=(0, 2)).sum(), "the caption is wider"
    none_yet = draw_detections(image, Tracker()(frame(), found(20)), ["dog"])
    np.testing.assert_array_equal(none_yet, draw_detections(image, found(20), ["dog"]))


def test_rows_come_back_in_their_order(monkeypatch):
    """The library returns rows in an order of its own, from 0, -1 where there is no number."""

    class Rows(dict):
        def __init__(self, **columns):
            super().__init__(**columns)
            self.__dict__ = self

        def __len__(self) -> int:
            return len(self.get("tracker_id", []))

    class Backwards:
        def __init__(self, **options):
            assert options["frame_rate"] == 25

        def update(self, rows, timestamp):
            order = rows.data["row"][::-1]
            return Rows(data={"row": order.copy()}, tracker_id=np.where(order == 1, -1, order))

    for name, part, value in (("supervision", "Detections", Rows), ("trackers", "ByteTrackTracker", Backwards)):
        module = ModuleType(name)
        setattr(module, part, value)
        monkeypatch.setitem(sys.modules, name, module)
    track = Tracker()
    assert track(frame(), found(10, 90, 170)).ids.tolist() == [1, 0, 3]
    assert track(frame(), found()).ids.shape == (0,)


def test_with_the_library():
    """Two objects cross a gap of three frames and keep their numbers; a weak one never begins."""
    pytest.importorskip("trackers", reason="the package trackers is not installed")
    track, ids = Tracker(), []
    for number in range(12):
        at = found(10 + 4.0 * number, 200 - 3.0 * number) if not 5 <= number < 8 else found()
        weak = found(120, score=0.4)
        both = [torch.cat([getattr(at, name), getattr(weak, name)]) for name in ("boxes", "scores", "labels")]
        both = Detections(boxes=both[0], scores=both[1], labels=both[2])
        ids.append(track(frame(number), both).ids.tolist())
    assert ids[0] == [0, 0, 0] and ids[1] == [1, 2, 0] and ids[11] == [1, 2, 0] and track.totals == {0: 2}

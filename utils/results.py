"""Where detections go: drawn pictures and videos, label files, one json, crops. Everything lands in one run folder.

Every file appears whole or not at all: it is written beside its name and renamed when it is complete.
"""

import json
import math
import re
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np

from utils.datasets.capture import Frame, quiet_opencv
from utils.errors import ResourceError, UserError
from utils.evaluate import coco_results, segmentations, with_segmentations
from utils.files import atomic_write, write_text
from utils.json_list import JsonList
from utils.structures import Batch, Detections, Record

WRITABLE = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
LONGEST = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383}  # side in pixels that a format can hold, where that is few
ROOM = 1 << 24  # bytes of a disk that a video leaves, so that what was written of it can be ended
MAX_TICKS = 65535  # MPEG-4 counts time in at most so many parts of a second


def safe_name(text: str) -> str:
    """A class name or address as one harmless path component: no separators, no leading dots."""
    return re.sub(r"[^\w.()+ -]+", "_", text).strip(". ")[:100] or "_"


def write_image(path: Path, image: np.ndarray) -> None:
    """RGB or grey uint8 [H, W, C] to a file in the format its suffix names.

    Raises:
        UserError: the format cannot hold it.
        ResourceError: the disk is full.
    """
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.shape[2] == 3 else image
    encoded, data = cv2.imencode(path.suffix, bgr)
    if not encoded:
        height, width = image.shape[:2]
        raise UserError(path, f"a picture of {width} x {height} pixels cannot be written as {path.suffix}")
    with atomic_write(path) as file:
        file.write(data.tobytes())


def written_suffix(suffix: str, image: np.ndarray) -> str:
    """Of the file a picture goes to: as asked for, ``.jpg`` for what is no format, ``.png`` where it is too long."""
    suffix = suffix.lower() if suffix.lower() in WRITABLE else ".jpg"
    return suffix if max(image.shape[:2]) <= LONGEST.get(suffix, math.inf) else ".png"


def _without_query(path: str) -> str:
    """The part of an address that is like a path: ``http://host/cam?x=1`` -> ``cam``; files stay as they are."""
    if "://" not in path:
        return path
    address = urlsplit(path)
    return address.path.strip("/") or address.netloc


class Stems:
    """A file stem of its own for every path: ``a/x.jpg`` and ``b/x.png`` must not overwrite each other."""

    def __init__(self):
        self._of: dict[str, str] = {}
        self._taken: set[str] = set()

    def __call__(self, path: str) -> str:
        if path not in self._of:
            stem = safe_name(Path(_without_query(path)).stem)
            spellings = chain([stem], (f"{stem}_{number}" for number in count(2)))
            self._of[path] = next(spelling for spelling in spellings if spelling not in self._taken)
            self._taken.add(self._of[path])
        return self._of[path]


def write_labels(folder: Path, stem: str, detections: Detections, size: tuple[int, int], *, with_score: bool) -> None:
    """``folder/labels/stem.txt``: ``class cx cy w h [score] [number]``, relative to ``size`` (h, w).

    The number is that of a tracked object, 0 while it has none. The file is empty where nothing was found.
    """
    height, width = size
    lines = []
    for ((x1, y1, x2, y2), score, label), track in zip(_rows(detections), _tracks(detections)):
        numbers = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
        numbers += [score] if with_score else []
        lines.append(" ".join([str(label), *(f"{number:.6f}" for number in numbers), *map(str, track)]) + "\n")
    path = folder / "labels" / f"{stem}.txt"
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(lines))


class Predictions:
    """What ``test.py`` keeps of an evaluation, batch by batch: label files and one file of COCO results."""

    def __init__(self, folder: Path, records: list[Record], *, save_txt: bool, save_conf: bool, save_json: bool = True):
        self.folder, self.records = folder, records
        self.save_txt, self.save_conf, self.save_json = save_txt, save_conf, save_json
        self._stems, self._found, self._shapes = Stems(), {}, {}

    def observe(self, batch: Batch, detections: list[Detections]) -> None:
        """For ``evaluate(observe=...)``: detections in pixels of the original pictures."""
        for info, found in zip(batch.infos, detections):
            if self.save_json:  # run lengths are a tenth of the masks
                self._found[info.id] = replace(found, masks=None)
                self._shapes[info.id] = segmentations(found, info.size)
            if self.save_txt:
                write_labels(self.folder, self._stems(info.path), found, info.size, with_score=self.save_conf)

    def write_json(self, category_ids: list[int]) -> Path:
        """``predictions.json``, as the COCO tools read it."""
        order = sorted(self._found)
        # a picture that could not be read any more is missing here; those after it keep their numbers
        known = [
            record if (record := self.records[i]).image_id is not None else replace(record, image_id=i) for i in order
        ]
        results = coco_results([self._found[i] for i in order], known, category_ids)
        shapes = [self._shapes[i] for i in order]
        if None not in shapes:
            results = with_segmentations(results, [shape for mine in shapes for shape in mine])
        write_text(self.folder / "predictions.json", json.dumps(results))
        return self.folder / "predictions.json"


@dataclass(kw_only=True)
class ResultWriter:
    """Writes what was found, frame by frame, into ``folder``; ``close()`` finishes videos and the json."""

    folder: Path
    names: list[str]
    save_txt: bool = False  # labels/*.txt: class cx cy w h [conf], relative; an empty file where nothing was found
    save_conf: bool = False
    save_json: bool = False  # detections.json
    save_crop: bool = False  # crops/CLASS/*.jpg
    fourcc: str = "mp4v"
    side_by_side: bool = False  # frames of several videos alternate, as those of streams do

    _stems: Stems = field(default_factory=Stems)
    _json: JsonList | None = None
    _videos: dict[str, "VideoFile"] = field(default_factory=dict)

    def __post_init__(self):
        if self.save_json:
            self._json = JsonList(self.folder / "detections.json")

    def write(self, frame: Frame, detections: Detections, drawn: np.ndarray | None = None) -> None:
        """Write everything asked for about one frame (boxes in its own pixels).

        Args:
            drawn: the picture with its boxes; None: no pictures or videos.

        Raises:
            ResourceError: the disk is full.
            UserError: the drawn picture would replace the one that was read.
        """
        stem = self._stems(frame.path)
        numbered = stem if frame.fps is None else f"{stem}_{frame.number:06d}"
        if self.save_txt:
            write_labels(self.folder, numbered, detections, frame.image.shape[:2], with_score=self.save_conf)
        if self._json:
            self._json.append(self._entry(frame, detections))
        if self.save_crop:
            self._write_crops(numbered, frame, detections)
        if drawn is not None and frame.fps is None:
            suffix = written_suffix(Path(frame.path).suffix, drawn)
            write_image(self._new(f"{stem}{suffix}", frame), drawn)
        elif drawn is not None:
            # a frame stands for those dropped before it: a second of a stream lasts a second
            self._video_for(frame, stem).append(drawn, times=1 + frame.num_dropped)

    def close(self) -> None:
        """Whatever goes wrong with one file, the others are finished."""
        with ExitStack() as stack:
            if self._json:
                stack.callback(self._json.close)
            for video in self._videos.values():
                stack.callback(video.close)
            self._videos = {}

    def _new(self, name: str, frame: Frame) -> Path:
        """Where a result goes: never onto the picture or video that was read."""
        path = self.folder / name
        if _is_file(frame) and path.exists() and path.samefile(frame.path):
            raise UserError(path, "would be replaced by its own result", "another --name or --project")
        return path

    def _entry(self, frame: Frame, detections: Detections) -> dict:
        height, width = frame.image.shape[:2]
        found = [
            {
                "label": label,
                "name": self.names[label],
                "score": round(score, 6),
                "box": [round(edge, 3) for edge in box],
            }
            | dict(zip(["track"], track))
            for (box, score, label), track in zip(_rows(detections), _tracks(detections))
        ]
        found = with_segmentations(found, segmentations(detections, (height, width)))
        return {"path": frame.path, "frame": frame.number, "width": width, "height": height, "detections": found}

    def _write_crops(self, stem: str, frame: Frame, detections: Detections) -> None:
        height, width = frame.image.shape[:2]
        for number, (box, _, label) in enumerate(_rows(detections)):
            x1, y1 = (max(0, int(edge)) for edge in box[:2])
            x2, y2 = min(width, int(box[2]) + 1), min(height, int(box[3]) + 1)
            if x2 > x1 and y2 > y1:
                folder = self.folder / "crops" / safe_name(self.names[label])
                folder.mkdir(parents=True, exist_ok=True)
                crop = frame.image[y1:y2, x1:x2]
                write_image(folder / f"{stem}_{number}{written_suffix('.jpg', crop)}", crop)

    def _video_for(self, frame: Frame, stem: str) -> "VideoFile":
        """The open output of this frame's video; the previous one is finished when another begins."""
        if stem not in self._videos:
            while self._videos and not self.side_by_side:
                self._videos.popitem()[1].close()
            height, width = frame.image.shape[:2]
            self._videos[stem] = VideoFile(self._new(f"{stem}.mp4", frame), frame.fps, (width, height), self.fourcc)
        return self._videos[stem]


def check_codec(fourcc: str) -> None:
    """Raises UserError if OpenCV cannot write mp4 files with a codec."""
    with tempfile.TemporaryDirectory() as folder:
        writer = cv2.VideoWriter(f"{folder}/codec.mp4", cv2.VideoWriter.fourcc(*fourcc), 30.0, (64, 64))
        opened = writer.isOpened()
        writer.release()
    if not opened:
        raise UserError(f"--fourcc {fourcc}", "this OpenCV cannot write mp4 with that codec", "mp4v works anywhere")


def writable_rate(fps: float) -> float:
    """The frame rate nearest to ``fps`` that MPEG-4 can state: 29.97003 -> 29.97, 142.8571 -> 142.86."""
    rates = ((round(fps, digits), 10**digits) for digits in (3, 2, 1, 0))
    return max(0.01, next(rate for rate, parts in rates if rate * parts <= MAX_TICKS))


class VideoFile:
    """An mp4 under way: written as ``.part.mp4``, renamed when closed. Frames of another size are resized.

    OpenCV does not say when a disk is full. So the room is looked at while frames are written, and they are counted
    when the file is closed; what is not whole keeps its ``.part`` name.

    Raises:
        ResourceError: it cannot be written, or not whole.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int], fourcc: str):
        self.path, self.size, self.num_frames, self.whole = path, size, 0, True
        self.part = path.with_suffix(f".part{path.suffix}")
        self.writer = cv2.VideoWriter(str(self.part), cv2.VideoWriter.fourcc(*fourcc), writable_rate(fps), size)
        if not self.writer.isOpened():
            self.part.unlink(missing_ok=True)
            raise ResourceError(path, f"no video of {size[0]}x{size[1]} can be begun", "is there room on the disk?")

    def append(self, image: np.ndarray, times: int = 1) -> None:
        """Add a picture, RGB or grey uint8 [H, W, C], as so many frames."""
        colour = cv2.COLOR_RGB2BGR if image.shape[2] == 3 else cv2.COLOR_GRAY2BGR
        image = cv2.cvtColor(image, colour)
        if (image.shape[1], image.shape[0]) != self.size:
            image = cv2.resize(image, self.size, interpolation=cv2.INTER_LINEAR)
        self.whole = self.whole and shutil.disk_usage(self.part.parent).free > ROOM
        if not self.whole:
            raise ResourceError(self.part, f"the disk is full; {self.num_frames} frames are written", "make room")
        for _ in range(times):
            self.writer.write(image)
        self.num_frames += times

    def close(self) -> None:
        self.writer.release()
        with quiet_opencv():
            capture = cv2.VideoCapture(str(self.part))
            found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
            capture.release()
        if found < self.num_frames:
            self.whole = False
            message = f"{found} of {self.num_frames} frames could be written"
            raise ResourceError(self.part, message, "is there room on the disk?")
        if self.whole:
            self.part.replace(self.path)


def _is_file(frame: Frame) -> bool:
    return frame.arrived is None and "://" not in frame.path


def _rows(detections: Detections) -> list[tuple[list[float], float, int]]:
    """Plain numbers: (box, score, label), best first."""
    return list(zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist()))


def _tracks(detections: Detections) -> list[list[int]]:
    """Of each row its number in a list, which is empty where nothing is tracked."""
    return [[]] * len(detections) if detections.ids is None else [[number] for number in detections.ids.tolist()]

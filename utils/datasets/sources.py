"""What detect looks at: a picture, a folder, a glob, a list, a video, a camera, a stream. One iterator of frames each.

A picture that cannot be read never stops the others: it is counted in ``Source.problems``.
"""

import glob
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import cv2
import numpy as np

from utils.datasets.images import read_image
from utils.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pbm", ".pgm", ".ppm"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".m4v", ".mpg", ".mpeg", ".wmv", ".webm", ".gif", ".ts"}
DEFAULT_FPS = 30.0  # for cameras and containers that state none


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture to look at."""

    image: np.ndarray  # uint8 [H, W, C], RGB or grey
    path: str  # file, camera number or stream address without its password
    number: int = 0  # frame of a video, from 0
    fps: float | None = None  # None: a still picture
    total: int | None = None  # frames the container promises


@dataclass
class Source:
    """An iterable of frames and what went wrong on the way."""

    text: str
    frames: Iterator[Frame]
    total: int | None  # frames to come, if known
    problems: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Frame]:
        return self.frames


def open_source(text: str, *, channels: int = 3, stride: int = 1) -> Source:
    """The frames behind what a user typed.

    Args:
        text: picture, video, folder, glob pattern, ``.txt`` list of paths (relative ones: to the list), camera number,
            or an ``rtsp://`` / ``http(s)://`` stream.
        channels: 3 (RGB) or 1 (grey).
        stride: keep every stride-th frame of a video.

    Raises:
        UserError: nothing found, or the camera, video or stream does not open.
    """
    if text.isdigit():
        return _video(int(text), f"camera {text}", channels, stride)
    if "://" in text:
        return _video(text, without_password(text), channels, stride)
    return _files(text, _paths(text), channels, stride)


def without_password(address: str) -> str:
    """``rtsp://user:secret@host/x`` -> ``rtsp://***@host/x``: for logs and file names."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"***@{host}" if host != parts.netloc else host))


def _paths(text: str) -> list[Path]:
    """Files named by a path, a folder, a glob or a list, in sorted order (a list: in its own order)."""
    path = Path(text).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
        if not files:
            raise UserError(
                path, "no picture or video in this folder", f"looked for {', '.join(sorted(IMAGE_SUFFIXES))}, ..."
            )
        return files
    if path.is_file() and path.suffix.lower() == ".txt":
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        files = [path.parent / line for line in lines if line and not line.startswith("#")]
        if not files:
            raise UserError(path, "the list names no file", "one path a line")
        return files
    if path.exists():
        return [path]
    # pathlib has no glob for absolute patterns
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not found:
        raise UserError(text, "no such file, folder or pattern", f"looked under {Path.cwd()}")
    return found


def _files(text: str, paths: list[Path], channels: int, stride: int) -> Source:
    """Still pictures and videos, one after the other."""
    stills = all(path.suffix.lower() not in VIDEO_SUFFIXES for path in paths)
    source = Source(text, iter(()), len(paths) if stills else None)

    def frames() -> Iterator[Frame]:
        for path in paths:
            try:
                if path.suffix.lower() in VIDEO_SUFFIXES:
                    yield from _read_video(str(path), str(path), channels, stride, source.problems)
                else:
                    yield Frame(image=read_image(path, channels), path=str(path))
            except UserError as error:
                if len(paths) == 1:
                    raise
                source.problems.append(str(error))

    source.frames = frames()
    if len(paths) == 1 and not stills:
        source.total = _frame_count(paths[0], stride)
    return source


def _video(address: str | int, name: str, channels: int, stride: int) -> Source:
    """A camera or stream; opened at once, so that a refusal is an error and not an empty result."""
    source = Source(name, iter(()), None)
    capture = _open(address, name)
    source.frames = _read_video(address, name, channels, stride, source.problems, capture)
    return source


def _open(address: str | int, name: str) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(address)
    if not capture.isOpened():
        kind = "the camera" if isinstance(address, int) else "the stream" if "://" in address else "the video"
        raise UserError(name, f"{kind} does not open", "is it there, readable, and in a format OpenCV decodes?")
    return capture


def _frame_count(path: Path, stride: int) -> int | None:
    capture = cv2.VideoCapture(str(path))
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    capture.release()
    return math.ceil(count / stride) if count > 0 else None


def _read_video(address, name, channels, stride, problems, capture=None) -> Iterator[Frame]:
    """Frames until the end; says so when there are fewer than the container promised."""
    capture = capture or _open(address, name)
    try:
        fps = capture.get(cv2.CAP_PROP_FPS)
        fps = fps if 1 <= fps <= 1000 else DEFAULT_FPS  # NaN, 0 and 90000 occur
        promised = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        total = promised if promised > 0 else None
        number, colour = 0, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGR2GRAY
        while capture.grab():
            if number % stride == 0:
                read, image = capture.retrieve()
                if not read:
                    break
                image = cv2.cvtColor(image, colour)
                yield Frame(
                    image=image if channels == 3 else image[..., None],
                    path=name,
                    number=number,
                    fps=fps / stride,
                    total=total,
                )
            number += 1
        if total is not None and number < total:
            problems.append(f"{name}: ends early: {number} of the {total} frames its header promises could be read")
        if total is None and isinstance(address, str) and "://" in address:
            problems.append(f"{name}: the stream ended at {time.strftime('%H:%M:%S')} after {number} frames")
    finally:
        capture.release()

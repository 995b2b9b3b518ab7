"""What detect looks at: a picture, a folder, a glob, a list, a video, a camera, a stream. One iterator of frames each.

A picture that cannot be read never stops the others: it is counted in ``Source.problems``.
"""

import glob
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import cv2
import numpy as np

from utils.datasets.formats.pictures import read_lines
from utils.datasets.images import IMAGE_SUFFIXES, read_image
from utils.datasets.limits import LIMITS, Limits
from utils.errors import UserError

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".m4v", ".mpg", ".mpeg", ".wmv", ".webm", ".ts"}
SILENT = 0  # OpenCV's log level
DEFAULT_FPS = 30.0  # for cameras and containers that state none
TIMEOUT = 10_000  # milliseconds without an answer after which a stream counts as gone
SLACK = 0.01  # of the frames a container promises: their number is often an estimate from the duration


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture to look at."""

    image: np.ndarray  # uint8 [H, W, C], RGB or grey
    path: str  # file, camera number or stream address without its password
    number: int = 0  # frame of a video, from 0
    fps: float | None = None  # None: a still picture


@dataclass
class Source:
    """An iterable of frames and what went wrong on the way."""

    frames: Iterator[Frame]
    num_files: int = 1
    total: int | None = None  # frames to come, if known
    live: bool = False  # a camera or stream: frames come when they come
    problems: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Frame]:
        return self.frames


def open_source(text: str, *, channels: int = 3, stride: int = 1, limits: Limits = LIMITS) -> Source:
    """The frames behind what a user typed; the first one is read at once.

    Args:
        text: picture, video, folder, glob pattern, ``.txt`` list of paths (relative ones: to the list), camera number,
            or an ``rtsp://`` / ``http(s)://`` stream.
        channels: 3 (RGB) or 1 (grey).
        stride: keep every stride-th frame of a video.
        limits: which pictures are taken.

    Raises:
        UserError: nothing found, nothing of it can be read, or the camera, video or stream does not open.
    """
    if text.isdecimal():
        source = Source(iter(()), live=True)
        source.frames = _read_video(int(text), f"camera {text}", channels, stride, source)
    elif "://" in text:
        source = Source(iter(()), live=True)
        source.frames = _read_video(text, without_password(text), channels, stride, source)
    else:
        source = _open_files(_paths(text), channels, stride, limits)
    first = next(source.frames, None)
    if first is None:
        raise UserError(text, f"none of {source.num_files} files can be read", f"first: {source.problems[0]}")
    source.frames = chain([first], source.frames)
    return source


def without_password(address: str) -> str:
    """``rtsp://user:secret@host/x`` -> ``rtsp://***@host/x``: for logs and file names."""
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise UserError("--source", f"not an address: {error}") from error
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"***@{host}" if host != parts.netloc else host))


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _paths(text: str) -> list[Path]:
    """Files named by a path, a folder, a glob or a list, in sorted order (a list: in its own order)."""
    path = Path(text).expanduser()
    if path.is_dir():
        return _usable(path.iterdir(), path, f"no picture or video in this folder; '{path}/**/*' looks below it, too")
    if path.suffix.lower() == ".txt" and path.is_file():
        files = [path.parent / line for line, _ in read_lines(path) if not line.startswith("#")]
        if not files:
            raise UserError(path, "the list names no file", "write one path a line")
        return files
    if path.exists():
        return [path]
    # pathlib has no glob for absolute patterns
    found = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    if not found:
        raise UserError(text, "no such file, folder or pattern", f"looked under {Path.cwd()}")
    return _usable(found, text, f"none of the {len(found)} files of this pattern is a picture or video")


def _usable(files, where: object, message: str) -> list[Path]:
    """Those of ``files`` that are pictures or videos by their names, sorted."""
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    usable = sorted(file for file in files if file.suffix.lower() in known and file.is_file())
    if not usable:
        raise UserError(where, message, f"looked for {' '.join(sorted(known))}")
    return usable


def _open_files(paths: list[Path], channels: int, stride: int, limits: Limits) -> Source:
    """Still pictures and videos, one after the other. A file that is alone must be readable."""
    source = Source(iter(()), num_files=len(paths))
    if not any(map(_is_video, paths)):
        source.total = len(paths)

    def frames() -> Iterator[Frame]:
        for path in paths:
            try:
                if _is_video(path):
                    yield from _read_video(str(path), str(path), channels, stride, source)
                else:
                    yield Frame(image=read_image(path, channels, limits=limits), path=str(path))
            except UserError as error:
                if len(paths) == 1:
                    raise
                source.problems.append(str(error))

    source.frames = frames()
    return source


def _read_video(address: str | int, name: str, channels: int, stride: int, source: Source) -> Iterator[Frame]:
    """Frames until the end; notes it in ``source`` when there are fewer than the container promised."""
    capture = _open(address, name)
    try:
        fps = capture.get(cv2.CAP_PROP_FPS)
        fps = fps if 1 <= fps <= 1000 else DEFAULT_FPS  # NaN, 0 and 90000 occur
        promised = 0 if source.live else int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if source.num_files == 1 and promised > 0:
            source.total = math.ceil(promised / stride)
        number, colour = 0, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGR2GRAY
        while capture.grab():
            if number % stride == 0:
                read, image = capture.retrieve()
                if not read:
                    break
                image = cv2.cvtColor(image, colour).reshape(*image.shape[:2], channels)
                yield Frame(image=image, path=name, number=number, fps=fps / stride)
            number += 1
    finally:
        capture.release()
    if number == 0:
        raise UserError(name, "opens, but not one frame of it can be decoded")
    if promised - number > max(1, SLACK * promised):
        source.problems.append(f"{name}: ends early: {number} of the {promised} frames its header promises can be read")
    if source.live:
        source.problems.append(f"{name}: ended at {time.strftime('%H:%M:%S')} after {number} frames")


def _open(address: str | int, name: str) -> cv2.VideoCapture:
    if isinstance(address, str) and "://" not in address and not Path(address).is_file():
        raise UserError(name, "no such file")
    log = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # it moved within OpenCV 4
    level = log.getLogLevel()
    log.setLogLevel(SILENT)  # a page about every backend; FFmpeg's one line still comes
    try:
        if isinstance(address, str) and "://" in address:
            timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, TIMEOUT, cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT]
            capture, kind = cv2.VideoCapture(address, cv2.CAP_FFMPEG, timeouts), "stream"
        else:
            capture, kind = cv2.VideoCapture(address), "camera" if isinstance(address, int) else "video"
    finally:
        log.setLogLevel(level)
    if not capture.isOpened():
        raise UserError(name, f"the {kind} does not open", "is it there, readable, and in a format OpenCV decodes?")
    return capture

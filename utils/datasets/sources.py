"""What detect looks at: a picture, a folder, a glob, a list, a video, a camera, a stream. One iterator of frames each.

A picture that cannot be read never stops the others: it is counted in ``Source.problems``.
"""

import glob
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from urllib.parse import unquote, urlsplit

import cv2

from utils.datasets.capture import Frame, frame_rate, open_capture, quiet_opencv, to_channels, without_password
from utils.datasets.formats.pictures import kind, read_lines
from utils.datasets.images import IMAGE_SUFFIXES, read_image
from utils.datasets.limits import LIMITS, Limits
from utils.datasets.streams import RETRIES, Streams, is_live
from utils.errors import UserError

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".m4v", ".mpg", ".mpeg", ".wmv", ".webm", ".ts"}
LIST_SUFFIXES = {".txt", ".streams"}
SLACK = 0.01  # of the frames a container promises: their number is often an estimate from the duration


@dataclass
class Source:
    """An iterable of frames and what went wrong on the way."""

    name: str  # as typed, without passwords
    frames: Iterator[Frame]
    num_files: int = 1
    has_videos: bool = False  # or streams: frames that make a video
    total: int | None = None  # frames to come, if known
    streams: Streams | None = None  # cameras and streams: frames come when they come
    unread: list[str] = field(default_factory=list)  # files, with the reasons

    def __iter__(self) -> Iterator[Frame]:
        return self.frames

    @property
    def problems(self) -> list[str]:
        """What could not be read, or not to its end."""
        return self.unread + (self.streams.problems if self.streams else [])

    def report(self) -> list[str]:
        """Lines for the end: each stream, each problem, and how many of how many."""
        lines = [stream.summary() for stream in self.streams.streams] if self.streams else []
        lines += [f"warning: {problem}" for problem in self.problems]
        if self.unread and self.num_files > 1:
            lines.append(f"{len(self.unread)} of {self.num_files} files could not be read, or not to their end")
        return lines

    def close(self) -> None:
        """End the threads of cameras and streams."""
        if self.streams:
            self.streams.close()


def open_source(
    text: str,
    *,
    channels: int = 3,
    stride: int = 1,
    limits: Limits = LIMITS,
    retries: int = RETRIES,
    say: Callable[[str], object] = print,
) -> Source:
    """The frames behind what a user typed; the first one is read at once.

    Args:
        text: picture, video, folder, glob pattern, camera number, ``rtsp://`` / ``http(s)://`` stream, or a list
            (``.txt``, ``.streams``): paths, relative ones to the list, or cameras and streams, which are read side by
            side. ``http://host/clip.mp4`` is a video like one on disk.
        channels: 3 (RGB) or 1 (grey).
        stride: keep every stride-th frame of a video or stream.
        limits: which pictures are taken.
        retries, say: of streams, see `Streams`.

    Raises:
        UserError: nothing found, nothing of it can be read, or the camera, video or stream does not open.
    """
    addresses = [text] if is_live(text) else _listed_addresses(text)
    if _is_recording(text):
        source = Source(without_password(text), iter(()), has_videos=True)
        source.frames = _read_video(text, source.name, channels, stride, source)
    elif addresses:
        streams = Streams(addresses, channels=channels, stride=stride, retries=retries, say=say)
        name = streams.streams[0].name if addresses == [text] else text
        source = Source(name, iter(streams), has_videos=True, streams=streams)
    else:
        source = _open_files(text, channels, stride, limits)
    first = next(source.frames, None)
    if first is None and source.streams:
        source.close()
        source.streams.refuse_lost(source.name)
    if first is None:
        raise UserError(text, f"none of {source.num_files} files can be read", f"first: {source.problems[0]}")
    source.frames = chain([first], source.frames)
    return source


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _is_recording(text: str) -> bool:
    """Whether an address is that of a video file. (``.ts`` is what television streams are called, too.)"""
    return text.startswith(("http://", "https://")) and (
        Path(urlsplit(without_password(text)).path).suffix.lower() in VIDEO_SUFFIXES - {".ts"}
    )


def _as_path(text: str) -> Path:
    """A path as typed, ``~`` looked up (pathlib's own raises where there is no such user), or of a ``file://``."""
    if text.startswith("file://"):
        return Path(unquote(text.removeprefix("file://")))
    return Path(os.path.expanduser(text))  # noqa: PTH111


def _listed(path: Path) -> list[str]:
    """The lines of a list; none for what is no list."""
    if path.suffix.lower() not in LIST_SUFFIXES or kind(path) != "file":
        return []
    lines = [line for line, _ in read_lines(path) if not line.startswith("#")]
    if not lines:
        raise UserError(path, "the list names no file", "write one path, camera or address a line")
    return lines


def _listed_addresses(text: str) -> list[str]:
    """The cameras and streams of a list; none for anything else."""
    lines = _listed(_as_path(text))
    files = [line for line in lines if not is_live(line)]
    if files and len(files) < len(lines):
        raise UserError(text, f"names streams and files ('{files[0]}')", "a list for each")
    return [] if files else lines


def _paths(text: str) -> list[Path]:
    """Files named by a path, a folder, a glob or a list, in sorted order (a list: in its own order)."""
    path = _as_path(text)
    if kind(path) == "folder":
        try:
            files = list(path.iterdir())
        except OSError as error:
            raise UserError(path, f"the folder cannot be read: {error.strerror}", "may you read it?") from error
        return _usable(files, path, f"no picture or video in this folder; '{path}/**/*' looks below it, too")
    if listed := _listed(path):
        return [path.parent / _as_path(line) for line in listed]
    if kind(path):
        return [path]
    # pathlib has no glob for absolute patterns
    found = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    if not found:
        raise UserError(text, "no such file, folder or pattern", f"looked under {Path.cwd()}")
    return _usable(found, text, f"none of the {len(found)} files of this pattern is a picture or video")


def _usable(files, where: object, message: str) -> list[Path]:
    """Those of ``files`` that are pictures or videos by their names, sorted."""
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    usable = sorted(file for file in files if file.suffix.lower() in known and kind(file) == "file")
    if not usable:
        raise UserError(where, message, f"looked for {' '.join(sorted(known))}")
    return usable


def _open_files(text: str, channels: int, stride: int, limits: Limits) -> Source:
    """Still pictures and videos, one after the other. A file that is alone must be readable."""
    paths = _paths(text)
    source = Source(text, iter(()), num_files=len(paths), has_videos=any(map(_is_video, paths)))
    if not source.has_videos:
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
                source.unread.append(str(error))

    source.frames = frames()
    return source


def _read_video(address: str, name: str, channels: int, stride: int, source: Source) -> Iterator[Frame]:
    """Frames until the end; notes it in ``source`` when there are fewer than the container promised."""
    with quiet_opencv():
        capture = open_capture(address, name)
    number = 0
    try:
        fps, promised = frame_rate(capture), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if source.num_files == 1 and promised > 0:
            source.total = math.ceil(promised / stride)
        while capture.grab():
            if number % stride == 0:
                read, image = capture.retrieve()
                if not read:
                    break
                yield Frame(image=to_channels(image, channels), path=name, number=number, fps=fps / stride)
            number += 1
    finally:
        capture.release()
    if number == 0:
        raise UserError(name, "opens, but not one frame of it can be decoded")
    if promised - number > max(1, SLACK * promised):
        source.unread.append(f"{name}: ends early: {number} of {promised} frames can be read")

"""One video, camera or stream, opened: what OpenCV needs to be told, and what it says that must not be believed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np

from utils.datasets.formats.pictures import kind
from utils.errors import UserError

SILENT = 0  # OpenCV's log level
DEFAULT_FPS = 30.0  # for cameras and containers that state none
TIMEOUT = 10_000  # milliseconds without an answer after which a stream counts as gone
SECRETS = re.compile(r"([?&;][^=&;]*(?:user|pass|pwd|login|key|token|auth|secret|sig)[^=&;]*=)[^&;#]*", re.IGNORECASE)
PLAIN_HOST = re.compile(r"(\[[^\]]*\]|[^:@\[\]]*)(:\d*)?")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture to look at."""

    image: np.ndarray  # uint8 [H, W, C], RGB or grey
    path: str  # file, camera number or stream address without its password
    number: int = 0  # frame of a video, from 0; of a stream, of all that came
    fps: float | None = None  # None: a still picture
    num_dropped: int = 0  # frames of a stream that came since the one before and were replaced by newer ones
    arrived: float | None = None  # time.monotonic() when a frame of a stream was there


def without_password(address: str) -> str:
    """``rtsp://user:secret@host/x?token=1`` -> ``rtsp://***@host/x?token=***``: for logs and file names.

    A password with ``/``, ``?`` or ``#`` is masked, too, though no program would understand such an address.
    """
    try:
        urlsplit(address)
    except ValueError as error:
        raise UserError("--source", f"not an address: {error}") from error
    scheme, _, rest = address.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        rest = "***@" + authority.rpartition("@")[2] + rest[len(authority) :]
    elif "@" in rest and not PLAIN_HOST.fullmatch(authority):
        rest = "***@" + rest.rpartition("@")[2]
    return f"{scheme}://" + SECRETS.sub(r"\1***", rest)


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """No page about every backend where something does not open. FFmpeg's own line still comes."""
    log = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # it moved within OpenCV 4
    level = log.getLogLevel()
    log.setLogLevel(SILENT)
    try:
        yield
    finally:
        log.setLogLevel(level)


def open_capture(address: str | int, name: str) -> cv2.VideoCapture:
    """A file, camera number or stream address, ready to be read.

    Raises:
        UserError: it does not open; it is called ``name`` there.
    """
    if isinstance(address, str) and "://" in address:
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, TIMEOUT, cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT]
        capture, what = cv2.VideoCapture(address, cv2.CAP_FFMPEG, timeouts), "stream"
    elif isinstance(address, str) and kind(Path(address)) != "file":
        raise UserError(name, "no such file")
    else:
        capture, what = cv2.VideoCapture(address), "camera" if isinstance(address, int) else "video"
    if not capture.isOpened():
        raise UserError(name, f"the {what} does not open", "is it there, readable, and in a format OpenCV decodes?")
    return capture


def frame_rate(capture: cv2.VideoCapture) -> float:
    """Frames per second as the container says, where that can be: NaN, 0 and 90000 occur."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if 1 <= fps <= 1000 else DEFAULT_FPS


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """OpenCV's BGR [H, W, 3] -> RGB [H, W, 3] or grey [H, W, 1]."""
    colour = cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGR2GRAY
    return cv2.cvtColor(image, colour).reshape(*image.shape[:2], channels)

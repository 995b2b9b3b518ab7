"""The only reader of image files: what a file is comes from its bytes, never from its name.

Rules, the same for training, evaluation and detection (H height, W width, C channels):

* EXIF orientation is applied in every format that carries it; sizes and labels are those of the upright picture.
* Grey is repeated to three channels, a palette is looked up, alpha is dropped (not blended), OpenCV converts CMYK.
* 16 bits become 8 by ``>> 8``; float and 32-bit pictures are refused: their range is not defined.
* Of an animation or a multi-page file the first picture counts.
* More pixels than ``Limits.max_pixels`` are refused from the header, before any memory is taken for them.
* A JPEG without its end marker is refused: a decoder would fill the missing part with grey and say nothing
  (``Limits.allow_truncated`` takes it so). Bytes flipped inside the picture cannot be noticed.
* A read error that may pass (a disk or a network file system in trouble) is tried again, three times.
"""

import errno
import io
import os
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import cv2
import numpy as np
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import DecompressionBombError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from utils.datasets.limits import LIMITS, Limits
from utils.errors import UserError

T = TypeVar("T")

BYTES_PER_PIXEL = 8  # of the largest pixel type that is read, RGBA of 16 bits; a larger file is not a picture alone
FREE_BYTES = 1 << 24  # what a file may hold beside its pixels
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}  # read errors that may be over in a moment
PAUSES = (0.1, 0.4, 1.6)  # seconds before each further try
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".pbm", ".pgm", ".ppm")
)
READERS = {  # Pillow's header readers; Image.open would add formats that run a helper, and a size limit of its own
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "WEBP": WebPImageFile,
    "TIFF": TiffImageFile,
    "PPM": PpmImageFile,
}
MAGIC = (  # first bytes -> format
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"RIFF", "WEBP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    *((f"P{number}".encode(), "PPM") for number in range(1, 7)),
)
HEADER_ERRORS = (OSError, SyntaxError, ValueError, OverflowError, struct.error, DecompressionBombError)  # Pillow's
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # last bytes of a complete file
JPEG_COLOUR = getattr(cv2, "IMREAD_COLOR_RGB", cv2.IMREAD_COLOR)  # red first; before OpenCV 4.11 blue first, as all
IMAGE_WIDTH, IMAGE_LENGTH, ORIENTATION = 0x0100, 0x0101, 0x0112  # TIFF tags; EXIF has the last one
UNDEFINED_MODES = {"F": "32-bit float", "I": "32-bit integer"}  # Pillow's mode -> in words
# one row per EXIF orientation: swap the axes first?, then flip rows?, then columns?
TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class ImageError(UserError):
    """A picture that cannot be used. Its text names the file."""


class Header(NamedTuple):
    """What the first bytes of an image file say."""

    format: str  # a name of READERS
    mode: str  # Pillow's word for the pixel type
    size: tuple[int, int]  # height, width as stored
    orientation: int  # EXIF 1..8; anything else counts as 1

    @property
    def turned(self) -> bool:
        """Whether the orientation changes anything."""
        return self.orientation in TURNS

    @property
    def upright(self) -> tuple[int, int]:
        """Height, width after the orientation is applied."""
        return self.size[::-1] if TURNS.get(self.orientation, (False,))[0] else self.size


def inspect(path: str | Path, limits: Limits = LIMITS) -> tuple[Header, bool]:
    """A picture's header, and whether more pictures follow the first; nothing is decoded.

    Raises:
        ImageError: no regular file, no picture, too large, of an undefined pixel type, or cut off.
    """

    def look(file: BinaryIO) -> tuple[Header, bool]:
        header, image = _read_header(file, path, limits)
        animated = _is_animated(image)
        mark = END_MARKS.get(header.format)
        if mark is not None:
            file.seek(-len(mark), os.SEEK_END)
            if file.read() != mark:  # cut off, or with bytes after the end: only the whole file tells
                file.seek(0)
                _completed(file.read(), header.format, path, limits)
        return header, animated

    return _with_file(path, look, limits)


def probe(path: str | Path, limits: Limits = LIMITS) -> tuple[str, tuple[int, int]]:
    """Format and upright (H, W) of a picture. Raises as ``inspect``."""
    header, _ = inspect(path, limits)
    return header.format, header.upright


def read_image(path: str | Path, channels: int = 3, *, limits: Limits = LIMITS) -> np.ndarray:
    """The upright picture in a file.

    Args:
        path: any path the operating system takes, non-ASCII ones included.
        channels: 3 for RGB, 1 for grey.
        limits: what is refused before decoding.

    Returns:
        uint8 [H, W, C], C-contiguous.

    Raises:
        ImageError: as ``inspect``, or the decoder gives up.
    """
    return decode_image(_with_file(path, lambda file: file.read(), limits), channels, where=path, limits=limits)


def decode_image(data: bytes, channels: int = 3, *, where: object = "<bytes>", limits: Limits = LIMITS) -> np.ndarray:
    """As ``read_image``, from the bytes of a file; ``where`` is what errors name."""
    assert channels in (1, 3), channels
    header, _ = _read_header(io.BytesIO(data), where, limits)
    data = _completed(data, header.format, where, limits)
    if header.format == "GIF":  # OpenCV reads GIF only since 4.11
        return _orient(_decode_gif(data, channels, where), header.orientation)
    flag = cv2.IMREAD_COLOR if channels == 3 else cv2.IMREAD_GRAYSCALE
    if flag == cv2.IMREAD_COLOR and header.format == "JPEG":
        flag = JPEG_COLOUR
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise ImageError(where, f"OpenCV cannot decode this {header.format}: {error.err}") from error
    if pixels is None:
        raise ImageError(where, f"OpenCV cannot decode this {header.format}", "is the file damaged? save it again")
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ImageError(where, f"pixels of type {pixels.dtype}, expected 8 or 16 bits", "save it as 8-bit")
    if flag == cv2.IMREAD_COLOR:
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    # OpenCV turns a TIFF upright whatever it is told
    return _orient(pixels.reshape(*pixels.shape[:2], channels), 1 if header.format == "TIFF" else header.orientation)


def _with_file(path: str | Path, look: Callable[[BinaryIO], T], limits: Limits) -> T:
    """``look`` at an open file, again after a pause where reading fails in a way that may pass."""
    for pause in (*PAUSES, None):
        try:
            with _open(path, limits) as file:
                return look(file)
        except OSError as error:
            if pause is None or error.errno not in PASSING:
                raise ImageError(path, error.strerror or str(error)) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _open(path: str | Path, limits: Limits) -> BinaryIO:
    """Open a regular file; a pipe or a device would block or never end."""
    try:
        state = os.stat(path)  # noqa: PTH116  (a Path costs as much as to open the file)
    except ValueError as error:  # a NUL in the name
        raise ImageError(repr(path), str(error)) from error
    if not stat.S_ISREG(state.st_mode):
        raise ImageError(path, "not a regular file", "expected a picture" if stat.S_ISDIR(state.st_mode) else "")
    most = FREE_BYTES + BYTES_PER_PIXEL * limits.max_pixels
    if state.st_size > most:
        raise ImageError(path, f"too large: {state.st_size} bytes, a picture within the limits has at most {most}")
    return open(path, "rb")  # noqa: PTH123


def _read_header(file: BinaryIO, where: object, limits: Limits) -> tuple[Header, ImageFile]:
    start = file.read(512)
    format = next((name for magic, name in MAGIC if start.startswith(magic)), None)
    if format is None:
        raise ImageError(where, _describe(start), f"expected one of {', '.join(READERS)}")
    file.seek(0)
    try:
        image = READERS[format](file)
    except HEADER_ERRORS as error:
        if getattr(error, "errno", None) in PASSING:  # not the picture's fault
            raise
        raise ImageError(where, f"damaged header of a {format}: {error}") from error
    if format == "TIFF":  # Pillow's size is the upright one in some of its versions
        tags = image.tag_v2
        width, height, orientation = tags[IMAGE_WIDTH], tags[IMAGE_LENGTH], tags.get(ORIENTATION, 1)
    else:
        width, height = image.size
        orientation = _exif_orientation(image.info.get("exif", b""))
    if width < 1 or height < 1:
        raise ImageError(where, f"no pixels: {width} x {height}")
    if width * height > limits.max_pixels:
        found = f"too large: {width} x {height} pixels, the limit is {limits.max_pixels}"
        raise ImageError(where, found, "scale it down, or raise --max-pixels")
    if image.mode in UNDEFINED_MODES:
        raise ImageError(where, f"{UNDEFINED_MODES[image.mode]} pixels, expected 8 or 16 bits", "save it as 8-bit")
    return Header(format, image.mode, (height, width), orientation), image


def _is_animated(image: ImageFile) -> bool:
    """Does a second picture follow? Where the file is damaged there, the first one may still be good."""
    try:
        return bool(getattr(image, "is_animated", False))
    except (*HEADER_ERRORS, EOFError, KeyError, IndexError):
        return False


def _describe(start: bytes) -> str:
    """What a file that is no known picture seems to be."""
    if not start:
        return "an empty file"
    if start[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypavif"):
        return "HEIC and AVIF are not supported: convert it to JPEG"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "not a picture but a web page, XML or SVG"
    return "not a picture"


def _exif_orientation(exif: bytes) -> int:
    """The orientation tag of an EXIF block; 1 (upright) where there is none or the block is damaged."""
    body = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(body[:4])
    if order is None or len(body) < 10:
        return 1
    (start,) = struct.unpack_from(order + "I", body, 4)
    if start + 2 > len(body):
        return 1
    (count,) = struct.unpack_from(order + "H", body, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(body) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", body, entry)
        if tag == ORIENTATION:
            return struct.unpack_from(order + ("H" if kind == 3 else "I"), body, entry + 8)[0]
    return 1


def _completed(data: bytes, format: str, where: object, limits: Limits) -> bytes:
    """The bytes of a picture that has its end. Bytes after the end are legal and ignored.

    Raises:
        ImageError: it has none. Only a JPEG may be given one: a PNG without its end would cost its decoder gigabytes.
    """
    if format not in COMPLETE or COMPLETE[format](data):
        return data
    if limits.allow_truncated and format == "JPEG":
        return data + END_MARKS["JPEG"]
    found = f"cut off or damaged: a {format} of {len(data)} bytes without its end"
    raise ImageError(where, found, "copy it again" + ", or --allow-truncated" * (format == "JPEG"))


def _jpeg_is_complete(data: bytes) -> bool:
    """Is there an end mark behind every header segment? (A thumbnail among them has an end mark of its own.)"""
    if data.endswith(END_MARKS["JPEG"]):
        return True
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # up to the first scan
        if data[at + 1] == 0xFF:  # fill byte
            at += 1
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.find(END_MARKS["JPEG"], at) >= 0


def _png_is_complete(data: bytes) -> bool:
    """Do the chunks lead to the last one? (OpenCV would allocate the length a damaged chunk claims, up to 4 GB.)"""
    at = 8
    while at + 12 <= len(data):
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return False


COMPLETE = {"JPEG": _jpeg_is_complete, "PNG": _png_is_complete}


def _decode_gif(data: bytes, channels: int, where: object) -> np.ndarray:
    try:
        pixels = np.array(GifImageFile(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"))
    except (OSError, SyntaxError, ValueError, IndexError, struct.error) as error:  # Pillow's words for damage
        raise ImageError(where, f"cannot decode this GIF: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _orient(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn a stored picture upright (EXIF 2.3, tag 0x0112)."""
    if orientation not in TURNS:
        return image
    swap, flip_rows, flip_columns = TURNS[orientation]
    if swap:
        image = image.swapaxes(0, 1)
    return np.ascontiguousarray(image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])

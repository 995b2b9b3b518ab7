"""Damaged pictures, read in a process with little memory: no signal, no other error, nothing larger than allowed."""

import io
import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from mutator import mutations, num_inputs
from PIL import Image

from utils.datasets.images import ImageError, decode_image, inspect
from utils.datasets.limits import Limits

LIMITS = Limits(max_pixels=1_000_000)
ROOM = 300_000_000  # bytes beyond what the process has already
SIZE = 24, 20


def seeds(format: str) -> list[bytes]:
    """Pictures of a format: plain, with an EXIF block, animated where it can be."""
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    image = Image.fromarray(np.stack([x * 9, y * 9, x + y], axis=2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [{}, {"exif": exif}]
    if format in ("GIF", "PNG", "TIFF", "WEBP"):
        kinds.append({"save_all": True, "append_images": [image.rotate(90)]})
    files = []
    for options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        files.append(buffer.getvalue())
    return files


WORDS = {
    "JPEG": (b"\xff\xd8", b"\xff\xd9", b"\xff\xc0\0\x11\x08", b"\xff\xc2", b"\xff\xda", b"\xff\xc4", b"\xff\xe1"),
    "PNG": (b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"acTL", b"iCCP", b"zTXt", b"eXIf", b"\x7f\xff\xff\xff"),
    "GIF": (b"GIF89a", b"\x21\xf9", b"\x2c", b"\x3b", b"\x21\xff\x0b"),
    "WEBP": (b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"EXIF"),
    "TIFF": (b"II*\0", b"MM\0*", b"\x00\x01\x03\0", b"\x01\x01\x04\0", b"\x11\x01", b"\x12\x01"),
    "BMP": (b"BM", b"\x28\0\0\0", b"\x7c\0\0\0", b"\x18\0", b"\x20\0", b"\x01\0"),
    "PPM": (b"P6", b"P3", b"P1", b"65535", b"#", b"\n", b" 1000 1000 "),
}  # fmt: skip


def _look(format: str, count: int, file: Path, answers) -> None:
    """The child: libraries write their own warnings to stderr, which nobody reads here."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, -1))
    decoded = 0
    for number, data in enumerate(mutations(seeds(format), WORDS[format], count)):
        header = None
        try:
            if number % 8 == 0:  # a file costs ten times what its bytes do
                file.write_bytes(data)
                header, _ = inspect(file, LIMITS)
            image = decode_image(data, 1 + 2 * (number % 2), limits=LIMITS)
        except ImageError as error:
            assert "\n" not in str(error), str(error)
            continue
        except BaseException as error:
            answers.put(f"input {number}: {error!r}")
            raise
        assert image.dtype == np.uint8 and image.shape[0] * image.shape[1] <= LIMITS.max_pixels
        assert header is None or header.upright == image.shape[:2]
        decoded += 1
    answers.put(decoded)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its size from /proc")
@pytest.mark.parametrize("format", WORDS)
def test_pictures(tmp_path, format):
    """2,000 inputs of each format unless told otherwise: a decoder takes up to a millisecond."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_look, args=(format, num_inputs(2000), tmp_path / "x", answers))
    child.start()
    child.join(60 + num_inputs(2000) * 0.05)
    child.kill()
    decoded = None if answers.empty() else answers.get()
    assert child.exitcode == 0 and decoded > 0, f"exit {child.exitcode}, {decoded}"

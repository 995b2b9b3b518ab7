"""One reader for everything: formats by content, orientation, depths, and nothing half-read."""

import io
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from utils.datasets.images import ImageError, decode_image, probe, read_image
from utils.datasets.limits import LIMITS, Limits

H, W = 30, 40


@pytest.fixture
def pixels():
    """uint8 [H, W, 3] RGB, smooth, so that lossy formats stay close."""
    y, x = np.mgrid[0:H, 0:W]
    return np.stack([x * 6, y * 8, (x + y) * 3], axis=2).astype(np.uint8)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write(folder, name: str, data: bytes):
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "format, tolerance", [("PNG", 0), ("BMP", 0), ("TIFF", 0), ("PPM", 0), ("JPEG", 12), ("WEBP", 14)]
)
def test_rgb_of_every_format_under_a_wrong_name(tmp_path, pixels, format, tolerance):
    path = write(tmp_path, "写真 ü.jpg", encode(Image.fromarray(pixels), format))
    assert probe(path) == (format, (H, W))
    image = read_image(path)
    assert image.dtype == np.uint8 and image.shape == (H, W, 3) and image.flags.c_contiguous
    assert np.abs(image.astype(int) - pixels).max() <= tolerance
    grey = read_image(path, 1)
    assert grey.shape == (H, W, 1)
    assert np.abs(grey[..., 0].astype(float) - pixels @ [0.299, 0.587, 0.114]).max() <= tolerance + 1


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_orientation_is_applied_once(tmp_path, pixels, format, orientation):
    if format == "TIFF" and orientation in (0, 9):
        pytest.skip("libtiff warns about illegal values on stderr")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(pixels), format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    path = write(tmp_path, "turned", data)
    assert probe(path)[1] == upright.shape[:2]
    assert np.abs(read_image(path).astype(int) - upright).max() <= (0 if format in ("PNG", "TIFF") else 12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"]
)
def test_broken_exif_means_upright(pixels, exif):
    assert decode_image(encode(Image.fromarray(pixels), "JPEG", exif=exif)).shape == (H, W, 3)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA"])
def test_pixel_types_become_rgb(pixels, mode):
    image = Image.fromarray(pixels).convert(mode)
    expected = np.asarray(image.convert("RGB"))  # drops alpha, looks the palette up
    assert np.array_equal(decode_image(encode(image, "PNG")), expected)


def test_alpha_is_dropped_not_blended(pixels):
    rgba = np.dstack([pixels, np.zeros((H, W), np.uint8)])
    assert np.array_equal(decode_image(encode(Image.fromarray(rgba), "PNG")), pixels)


def test_cmyk_jpeg(pixels):
    image = Image.fromarray(pixels).convert("CMYK")
    decoded = decode_image(encode(image, "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_lose_the_low_byte(suffix, channels):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (H, W, channels), dtype=np.uint16)
    data = cv2.imencode(suffix, deep)[1].tobytes()
    assert np.array_equal(decode_image(data), np.broadcast_to(deep[..., ::-1] >> 8, (H, W, 3)))


def test_first_picture_of_an_animation(pixels):
    first = Image.fromarray(pixels).quantize(64)
    data = encode(first, "GIF", save_all=True, append_images=[Image.new("P", (W, H))])
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert decode_image(data, 1).shape == (H, W, 1)
    with pytest.raises(ImageError, match="GIF"):
        decode_image(data[:200])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_is_refused_never_half_grey(tmp_path, format, keep):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    path = write(tmp_path, "cut.jpg", data[: int(len(data) * keep)])
    with pytest.raises(ImageError, match=r"cut\.jpg"):
        read_image(path)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_probe_sees_a_lost_end_but_allows_bytes_behind_it(tmp_path, pixels, format):
    data = encode(Image.fromarray(pixels), format)
    with pytest.raises(ImageError, match="cut off"):
        probe(write(tmp_path, "cut", data[:-2]))
    path = write(tmp_path, "tail", data + b"trailing garbage" * 50)
    assert probe(path)[1] == (H, W)
    assert np.array_equal(read_image(path), decode_image(data))
    assert path.read_bytes() == data + b"trailing garbage" * 50


def test_end_mark_of_a_thumbnail_does_not_count(pixels):
    noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    thumbnail = encode(Image.fromarray(pixels), "JPEG")
    assert thumbnail.endswith(b"\xff\xd9")
    data = encode(Image.fromarray(noise), "JPEG", exif=b"Exif\0\0" + thumbnail)
    with pytest.raises(ImageError, match="cut off"):
        decode_image(data[: len(data) - 100])


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\n<svg xmlns=''/>", "web page, XML or SVG"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "HEIC"),
        (bytes(1000), "not a picture"),
        (b"\xff\xd8\xff\xe0garbage", "JPEG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(80), "PNG"),
        (b"RIFF\0\0\0\0WAVE", "damaged header"),
        (b"BM" + bytes(60), "BMP"),
        (b"II*\0" + bytes(60), "TIFF"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path, data, message):
    path = write(tmp_path, "x.jpg", data)
    for reader in (probe, read_image):
        with pytest.raises(ImageError, match=message) as caught:
            reader(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def png_of(width: int, height: int) -> bytes:
    """A PNG of under 200 bytes that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(30000, 30000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (LIMITS.max_pixels + 1, 1)])
def test_claimed_sizes_are_refused_before_decoding(tmp_path, size):
    path = write(tmp_path, "bomb.png", png_of(*size))
    for reader in (probe, read_image):
        with pytest.raises(ImageError, match=r"too large|damaged"):
            reader(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_damaged_bytes_give_a_picture_or_an_image_error(tmp_path, pixels, format):
    """The size of what is decoded is the size the header names, whatever happened to the bytes behind it."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encode(Image.fromarray(pixels), format, exif=exif)
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 8)):
            data[at] = rng.integers(256)
        path = write(tmp_path, "damaged", bytes(data))
        try:
            image = read_image(path, limits=Limits(max_pixels=10**6))
        except ImageError:
            continue
        assert image.dtype == np.uint8 and image.shape == (*probe(path)[1], 3)


def test_limit_is_the_callers(tmp_path, pixels):
    path = write(tmp_path, "x.png", encode(Image.fromarray(pixels), "PNG"))
    with pytest.raises(ImageError, match=f"too large: {W} x {H} pixels, the limit is 100"):
        read_image(path, limits=Limits(max_pixels=100))
    assert read_image(path, limits=Limits(max_pixels=H * W)).shape == (H, W, 3)


def test_float_pixels_have_no_defined_range():
    data = cv2.imencode(".tiff", np.random.default_rng(0).random((H, W), dtype=np.float32))[1].tobytes()
    with pytest.raises(ImageError, match="float"):
        decode_image(data)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name in ("pipe.jpg", "folder.jpg", "loop.jpg", "missing.jpg", "nul\0.jpg"):
        with pytest.raises(ImageError):
            probe(tmp_path / name)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (9, 9)])
def test_tiny_pictures_are_pictures(size):
    image = Image.fromarray(np.full((*size, 3), 7, np.uint8))
    assert np.array_equal(decode_image(encode(image, "PNG")), np.full((*size, 3), 7))


def test_real_pictures_equal_opencv(data_dir):
    for path in sorted((data_dir / "images").glob("*.jpg")):
        image = read_image(path)
        assert np.array_equal(image, cv2.imread(str(path))[..., ::-1])
        assert probe(path) == ("JPEG", image.shape[:2])

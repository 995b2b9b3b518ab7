"""A picture as Darknet hands it to a network, bit for bit, so that recorded outputs can be compared to 1e-5.

Darknet's JPEG decoder rounds in other places than libjpeg, by up to 2 of 255: enough to move outputs by 1e-2. Written
from the standard (ITU T.81) and the transform's paper (Loeffler, Ligtenberg, Moschytz 1989) with that decoder's 12-bit
constants. Only what the recorded pictures need: baseline JPEG,
colour at half the rows, restarts.
"""

import re
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np

ZIGZAG = np.array(sorted(range(64), key=lambda k: (k // 8 + k % 8, k // 8 if (k // 8 + k % 8) % 2 else k % 8)))
BLOCKS = (0, 0, 1, 2)  # channel of each block of a unit: two rows of luma, one of each colour


def darknet_input(path: Path, width: int, height: int, letterbox: bool):
    """float32 [3, height, width] in 0..1, and where the picture lies in it: (left, top, width, height)."""
    image = decode_jpeg(path).astype(np.float32) / np.float32(255)
    rows, columns = image.shape[:2]
    if not letterbox:
        return resize(image, width, height).transpose(2, 0, 1), (0, 0, width, height)
    inner = (width, rows * width // columns) if width / columns < height / rows else (columns * height // rows, height)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas = np.full((height, width, 3), 0.5, np.float32)
    canvas[top : top + inner[1], left : left + inner[0]] = resize(image, *inner)
    return canvas.transpose(2, 0, 1), (left, top, *inner)


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear with aligned corners, columns first (darknet-format, section 7)."""
    return _interpolate(_interpolate(image, width, axis=1), height, axis=0)


def _interpolate(image: np.ndarray, length: int, axis: int) -> np.ndarray:
    old = image.shape[axis]
    position = np.arange(length, dtype=np.float32) * np.float32((old - 1) / (length - 1))
    lower = np.minimum(position.astype(np.int64), old - 2)
    fraction = (position - lower).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    return (1 - fraction) * image.take(lower, axis) + fraction * image.take(lower + 1, axis)


@lru_cache
def decode_jpeg(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] RGB."""
    data, at, codes, steps = Path(path).read_bytes(), 2, {}, {}
    marker = None
    while marker != 0xDA:
        marker, length = struct.unpack(">xBH", data[at : at + 4])
        body, at = data[at + 4 : at + 2 + length], at + 2 + length
        if marker == 0xDB:  # quantisation tables
            for table in range(0, len(body), 65):
                steps[body[table]] = np.frombuffer(body[table + 1 : table + 65], np.uint8).astype(np.int64)
        elif marker == 0xC4:  # Huffman tables
            while body:
                count = sum(body[1:17])
                codes[body[0]], body = _lookup(body[1:17], body[17 : 17 + count]), body[17 + count :]
        elif marker == 0xC0:  # frame
            height, width = struct.unpack(">HH", body[1:5])
            assert body[7::3] == b"\x12\x11\x11", "colour at half the rows only"
            quantisers = [body[8 + 3 * channel] for channel in range(3)]
        elif marker == 0xDA:  # scan
            tables = [(codes[body[2 + 2 * i] >> 4], codes[16 + body[2 + 2 * i] % 16]) for i in range(3)]
        else:
            assert marker >= 0xDD, f"marker {marker:#x}: baseline JPEG only"
    blocks = []
    for stretch in re.split(rb"\xff[\xd0-\xd7]", data[at : data.rindex(b"\xff\xd9")]):
        blocks += _entropy_decode(stretch.replace(b"\xff\x00", b"\xff"), tables)
    rows, columns = -(-height // 16), -(-width // 8)
    steps = [steps[quantisers[channel]] for channel in BLOCKS]
    coefficients = np.zeros((rows * columns, 4, 64), np.int64)
    coefficients[..., ZIGZAG] = np.array(blocks[: rows * columns]) * np.stack(steps)
    pixels = _inverse_dct(coefficients.reshape(-1, 8, 8)).reshape(rows, columns, 4, 8, 8)
    luma = pixels[:, :, :2].transpose(0, 2, 3, 1, 4).reshape(rows * 16, columns * 8)
    colour = pixels[:, :, 2:].transpose(2, 0, 3, 1, 4).reshape(2, rows * 8, columns * 8)[:, : -(-height // 2)]
    planes = [luma, *(_double(plane) for plane in colour)]
    return _rgb(*(plane[:height, :width] for plane in planes))


def _lookup(counts: bytes, symbols: bytes) -> list:
    """(code length, symbol) for every 16 bits that can come next."""
    table, used = [], 0
    for length, count in enumerate(counts, 1):
        for symbol in symbols[used : used + count]:
            table += [(length, symbol)] * (1 << (16 - length))
        used += count
    return table + [(16, 0)] * (65536 - len(table))


def _entropy_decode(data: bytes, tables: list) -> list:
    """The units between two restarts, each the BLOCKS of 64 quantised values in zigzag order."""
    end, data, position, level, units = 8 * len(data) - 7, data + bytes(8), 0, [0, 0, 0], []

    def peek(count: int) -> int:
        window = int.from_bytes(data[position >> 3 : (position >> 3) + 5], "big")
        return (window >> (40 - (position & 7) - count)) & ((1 << count) - 1)

    while position < end:
        units.append([])
        for channel in BLOCKS:
            first, others = tables[channel]
            values, index = [0] * 64, 0
            while index < 64:
                length, symbol = (others if index else first)[peek(16)]
                position += length
                if index and symbol == 0:  # end of block
                    break
                index += symbol >> 4
                size = symbol & 15
                if size:
                    bits = peek(size)
                    position += size
                    values[index] = bits if bits >> (size - 1) else bits - (1 << size) + 1
                index += 1
            level[channel] = values[0] = values[0] + level[channel]
            units[-1].append(values)
    return units


def _inverse_dct(blocks: np.ndarray) -> np.ndarray:
    """Coefficients [N, 8, 8] -> pixels 0..255; columns first, keeping two more bits, then rows."""
    columns = _transform(blocks.transpose(1, 0, 2), 512) >> 10
    rows = _transform(columns.transpose(2, 1, 0), 65536 + (128 << 17)) >> 17
    return rows.transpose(1, 2, 0).clip(0, 255)


def _transform(s: np.ndarray, rounding: int) -> np.ndarray:
    """One-dimensional inverse transform along the first axis [8, ...], times 4096."""

    def c(number: float) -> int:
        return int(number * 4096 + 0.5)

    middle = (s[2] + s[6]) * c(0.5411961)
    low, high = middle + s[6] * c(-1.847759065), middle + s[2] * c(0.765366865)
    plus, minus = (s[0] + s[4]) * 4096 + rounding, (s[0] - s[4]) * 4096 + rounding
    even = [plus + high, minus + low, minus - low, plus - high]
    common = (s[1] + s[3] + s[5] + s[7]) * c(1.175875602)
    with_17, with_35 = common + (s[1] + s[7]) * c(-0.899976223), common + (s[3] + s[5]) * c(-2.562915447)
    with_37, with_15 = (s[3] + s[7]) * c(-1.961570560), (s[1] + s[5]) * c(-0.390180644)
    odd = [
        s[1] * c(1.501321110) + with_17 + with_15,
        s[3] * c(3.072711026) + with_35 + with_37,
        s[5] * c(2.053119869) + with_35 + with_15,
        s[7] * c(0.298631336) + with_17 + with_37,
    ]
    first = [x + y for x, y in zip(even, odd)]
    return np.stack(first + [x - y for x, y in zip(even, odd)][::-1])


def _double(plane: np.ndarray) -> np.ndarray:
    """Twice as many rows, weights 3:1 of the two nearest."""
    above, below = np.concatenate([plane[:1], plane[:-1]]), np.concatenate([plane[1:], plane[-1:]])
    return (np.stack([3 * plane + above, 3 * plane + below], axis=1).reshape(-1, plane.shape[1]) + 2) >> 2


def _rgb(y: np.ndarray, cb: np.ndarray, cr: np.ndarray) -> np.ndarray:
    """20-bit fixed point; one product is cut to its upper 16 bits."""

    def c(number: float) -> int:
        return int(number * 4096 + 0.5) << 8

    luma, cb, cr = (y << 20) + (1 << 19), cb - 128, cr - 128
    green = luma - cr * c(0.71414) + (-cb * c(0.34414) & ~0xFFFF)
    planes = np.stack([luma + cr * c(1.402), green, luma + cb * c(1.772)], axis=-1)
    return (planes >> 20).clip(0, 255).astype(np.uint8)

"""The default data set, drawn from a seed at first use: circles, rectangles and triangles that are not easy to find.

Textured and lit backgrounds, noise and blur; shapes of 22 to 150 pixels, turned and stretched, over one another and
over the border; outlines, stars and bars as distractors of no class; pictures of several aspect ratios, one in twelve
without any object. Written as ordinary files: ``images/{train,val}/*.jpg``, ``labels/{train,val}/*.txt``, ``data.yaml``
and ``annotations/{train,val}.json`` with the polygons of what is visible of each shape (COCO instances).
"""

import json
import math
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.errors import ResourceError, UserError

VERSION = 3  # of what a seed draws
NAMES = ("circle", "rectangle", "triangle")
NUM_PICTURES = {"train": 1200, "val": 120}
SIZES = ((240, 320), (320, 240), (240, 240), (208, 368), (288, 288))  # H, W
SIDES = (22.0, 150.0)  # of a shape, pixels; drawn log-uniformly
MAX_SHAPES = 8
EMPTY_SHARE = 1 / 12  # of the pictures
MIN_UNCOVERED = 0.6  # share of a shape that later ones must leave visible
MIN_INSIDE = 0.75  # share of a shape that must lie in the picture: a corner could be anything
MIN_PIXELS = 120  # of a shape
MIN_CONTRAST = 90.0  # distance in RGB between a shape and what lies behind it
JPEG_QUALITY = 92
SHIFT = 4  # fractional bits of OpenCV's polygon corners


class Shape(NamedTuple):
    """One drawn object."""

    label: int
    mask: np.ndarray  # bool [H, W]: its visible pixels
    num_pixels: int  # of the uncovered shape


def ensure_shapes(folder: str | Path, seed: int = 0, num_pictures: dict[str, int] | None = None) -> Path:
    """The data.yaml of the generated data set in ``folder``; everything is drawn if the folder is not there yet.

    The files are a function of the seed (and of the installed OpenCV's drawing). The set is made in a temporary folder
    beside ``folder`` and renamed, so half a data set never exists; an existing folder is never touched.

    Raises:
        ResourceError: the folder cannot be written.
        UserError: the folder holds what another seed or an older version drew.
    """
    folder, splits = Path(folder), num_pictures or NUM_PICTURES
    text = _yaml(splits, seed)
    if (folder / "data.yaml").is_file():
        return _checked(folder, text)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir(parents=True)
        for number, (split, num) in enumerate(splits.items()):
            _write_split(part, split, num, np.random.SeedSequence([seed, number]))
        (part / "data.yaml").write_text(text, encoding="utf-8")
        part.rename(folder)
    except OSError as error:
        if (folder / "data.yaml").is_file():  # another process was faster
            return _checked(folder, text)
        raise ResourceError(folder, f"cannot write the default data set: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder / "data.yaml"


def _yaml(splits: dict[str, int], seed: int) -> str:
    """The text of data.yaml; its first line names everything the pictures depend on."""
    counts = ", ".join(f"{num} {split}" for split, num in splits.items())
    lines = [f"# Drawn by Matchbox: version {VERSION}, seed {seed}, {counts}"]
    lines += [f"{split}: images/{split}" for split in splits]
    return "\n".join([*lines, "names:", *(f"  {label}: {name}" for label, name in enumerate(NAMES)), ""])


def _checked(folder: Path, text: str) -> Path:
    """The data.yaml of an existing folder, if it is the one that would be made."""
    path = folder / "data.yaml"
    found = path.read_text(encoding="utf-8").partition("\n")[0]
    expected = text.partition("\n")[0]
    if found != expected:
        raise UserError(
            f"{path}:1", f"found '{found}', expected '{expected}'", f"remove {folder} to have it drawn anew"
        )
    return path


def _write_split(root: Path, split: str, num: int, seed: np.random.SeedSequence) -> None:
    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, (data, (height, width), objects) in enumerate(pool.map(_make, seed.spawn(num))):
            name = f"{index:04d}"
            (root / "images" / split / f"{name}.jpg").write_bytes(data)
            images.append({"id": index + 1, "file_name": f"{name}.jpg", "width": width, "height": height})
            rows = []
            for item in objects:
                x, y, w, h = item["bbox"]
                center = (x + w / 2) / width, (y + h / 2) / height
                label = item["category_id"] - 1
                rows.append(f"{label} {center[0]:.6f} {center[1]:.6f} {w / width:.6f} {h / height:.6f}\n")
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **item})
            (root / "labels" / split / f"{name}.txt").write_text("".join(rows), encoding="utf-8")
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(NAMES)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(data), encoding="utf-8")


def _make(seed: np.random.SeedSequence) -> tuple[bytes, tuple[int, int], list[dict]]:
    """One picture as the bytes of a JPEG, its (H, W), and its objects as COCO describes them."""
    image, shapes = draw_picture(np.random.default_rng(seed))
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return data.tobytes(), image.shape[:2], [_describe(shape) for shape in shapes]


def _describe(shape: Shape) -> dict:
    """COCO's entry of a shape: the outlines of its visible parts, and the box around them. Specks are no parts."""
    contours, _ = cv2.findContours(shape.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    contours = [contour for contour in contours if len(contour) >= 3]
    return {
        "category_id": shape.label + 1,
        "bbox": list(cv2.boundingRect(np.concatenate(contours))),
        "area": int(shape.mask.sum()),
        "iscrowd": 0,
        "segmentation": [contour.ravel().tolist() for contour in contours],
    }


# -------------------------------------------------------------------------------------------------------------- drawing


def draw_picture(rng: np.random.Generator) -> tuple[np.ndarray, list[Shape]]:
    """One picture, uint8 [H, W, 3] RGB, and its shapes, the hindmost first."""
    height, width = SIZES[rng.integers(len(SIZES))]
    canvas = _background(rng, height, width)
    for _ in range(rng.integers(0, 3)):
        _paint_distractor(rng, canvas)
    shapes: list[Shape] = []
    num = 0 if rng.random() < EMPTY_SHARE else rng.integers(1, MAX_SHAPES + 1)
    for _ in range(num):
        _paint_shape(rng, canvas, shapes)
    return _develop(rng, canvas), shapes


def _background(rng, height, width) -> np.ndarray:
    """float32 [H, W, 3]: two colours mixed by a texture, with grain."""
    texture = TEXTURES[rng.integers(len(TEXTURES))](rng, height, width)[..., None]
    first, second = rng.uniform(30, 225, (2, 3)).astype(np.float32)
    canvas = first + (second - first) * np.float32(rng.uniform(0.2, 0.7)) * texture
    return canvas + rng.standard_normal((height, width, 1), np.float32) * np.float32(rng.uniform(1, 9))


def _clouds(rng, height, width):
    """Smooth noise of a random grain, 0..1."""
    cells = rng.integers(3, 14)
    coarse = rng.random((cells, cells), dtype=np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def _ramp(rng, height, width):
    """A gradient in a random direction, 0..1."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ramp = x * math.cos(angle) + y * math.sin(angle)
    return (ramp - ramp.min()) / np.ptp(ramp)


def _stripes(rng, height, width):
    """Waves of a random direction, width and hardness, 0..1."""
    length = math.hypot(height, width) / rng.uniform(10, 60)
    waves = np.sin(_ramp(rng, height, width) * math.hypot(height, width) / length * 2 * math.pi)
    return np.clip(0.5 + waves * rng.uniform(0.5, 3), 0, 1)


def _blobs(rng, height, width):
    """Two levels with wavy borders, 0..1."""
    return np.clip((_clouds(rng, height, width) - 0.5) * rng.uniform(4, 20) + 0.5, 0, 1)


def _tiles(rng, height, width):
    """A grid of squares of random grey, 0..1."""
    side = rng.integers(12, 48)
    tiles = rng.random((height // side + 1, width // side + 1), dtype=np.float32)
    return np.kron(tiles, np.ones((side, side), np.float32))[:height, :width]


TEXTURES = (_clouds, _ramp, _stripes, _blobs, _tiles)


def _paint_shape(rng, canvas, shapes) -> None:
    """Paint one shape of a class over the canvas, unless it, or one behind it, would hardly be seen."""
    height, width = canvas.shape[:2]
    label = int(rng.integers(len(NAMES)))
    side = math.exp(rng.uniform(math.log(SIDES[0]), math.log(min(SIDES[1], 0.6 * min(height, width)))))
    center = rng.uniform(0, 1, 2) * (width, height)
    corners = OUTLINES[label](rng) * side / 2 + center
    coverage = _coverage(corners, height, width)
    mask = coverage > 0.5
    whole = abs(cv2.contourArea(corners.astype(np.float32)))
    left = [shape.mask & ~mask for shape in shapes]
    hidden = any(after.sum() < max(MIN_UNCOVERED * shape.num_pixels, MIN_PIXELS) for shape, after in zip(shapes, left))
    if hidden or mask.sum() < max(MIN_INSIDE * whole, MIN_PIXELS):
        return
    colour = _contrasting(rng, canvas[mask].mean(axis=0))
    _blend(canvas, coverage, colour * _shading(rng, height, width))
    shapes[:] = [shape._replace(mask=after) for shape, after in zip(shapes, left)]
    shapes.append(Shape(label, mask, int(mask.sum())))


def _circle(rng):
    """Unit outline of an ellipse, [n, 2]."""
    angle = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return _turn(rng, np.stack([np.cos(angle), np.sin(angle) * rng.uniform(0.6, 1)], axis=1))


def _rectangle(rng):
    """Unit outline of a rectangle, sides up to 1 : 2.5, [4, 2]."""
    ratio = math.sqrt(rng.uniform(1, 2.5))
    return _turn(rng, np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (ratio, 1 / ratio) * 0.8)


def _triangle(rng):
    """Unit outline of a triangle with no angle below about 30 degrees, [3, 2]."""
    angle = np.array([90, 210, 330]) + rng.uniform(-22, 22, 3)
    return _turn(rng, np.stack([np.cos(np.radians(angle)), np.sin(np.radians(angle))], axis=1) * 1.15)


OUTLINES = (_circle, _rectangle, _triangle)  # by label


def _turn(rng, corners):
    angle = rng.uniform(0, 2 * math.pi)
    return corners @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def _paint_distractor(rng, canvas) -> None:
    """Paint something that is no class: a star, a bar, or the mere outline of a shape."""
    height, width = canvas.shape[:2]
    center = rng.uniform(0, 1, 2) * (width, height)
    size = rng.uniform(12, 60)
    kind = rng.integers(3)
    if kind == 0:
        angle = np.arange(10) * math.pi / 5
        radius = np.where(np.arange(10) % 2, 0.4, 1.0)
        corners = _turn(rng, np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]) * size / 2 + center
        coverage = _coverage(corners, height, width)
    elif kind == 1:
        bar = np.array([[-8, -1], [8, -1], [8, 1], [-8, 1]]) / 8
        coverage = _coverage(_turn(rng, bar) * size * 0.8 + center, height, width)
    else:
        outline = OUTLINES[rng.integers(len(OUTLINES))](rng) * size / 2
        coverage = _coverage(outline + center, height, width) - _coverage(outline * 0.75 + center, height, width)
    mask = coverage > 0.5
    if mask.any():
        _blend(canvas, coverage, _contrasting(rng, canvas[mask].mean(axis=0)))


def _coverage(corners, height, width) -> np.ndarray:
    """float32 [H, W] in 0..1: how much of each pixel a polygon covers, with smooth edges."""
    plane = np.zeros((height, width), np.uint8)
    points = np.round((corners - 0.5) * 2**SHIFT).astype(np.int32)
    cv2.fillPoly(plane, [points], 255, lineType=cv2.LINE_AA, shift=SHIFT)
    return plane.astype(np.float32) / 255


def _blend(canvas, coverage, colour) -> None:
    """Lay a colour, [3] or [H, W, 3], over the canvas where a shape covers it."""
    x, y, w, h = cv2.boundingRect((coverage > 0).astype(np.uint8))
    area = slice(y, y + h), slice(x, x + w)
    colour = np.broadcast_to(colour, canvas.shape)[area]
    canvas[area] += (colour - canvas[area]) * coverage[area][..., None]


def _contrasting(rng, behind) -> np.ndarray:
    """A random colour that differs visibly from the one behind it."""
    while True:
        colour = rng.uniform(15, 240, 3)
        if np.linalg.norm(colour - behind) > MIN_CONTRAST:
            return colour.astype(np.float32)


def _shading(rng, height, width) -> np.ndarray:
    """float32 [H, W, 1] around 1: an uneven surface."""
    texture = TEXTURES[rng.integers(len(TEXTURES))](rng, height, width)
    return (1 + rng.uniform(0, 0.25) * (texture - 0.5))[..., None].astype(np.float32)


def _develop(rng, canvas) -> np.ndarray:
    """Light from one side, blur, sensor noise, 8 bits."""
    height, width = canvas.shape[:2]
    light = 1 + rng.uniform(0, 0.7) * (_ramp(rng, height, width) - 0.5)
    canvas *= (light * rng.uniform(0.75, 1.15)).astype(np.float32)[..., None]
    if rng.random() < 0.4:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.4))
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(0, 6))
    return np.clip(canvas, 0, 255).astype(np.uint8)

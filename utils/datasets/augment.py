"""What chance does to a training picture: pure functions of a Sample and a numpy Generator.

Boxes and outlines go through the matrix that the pixels went through. A box stays the hull of its own four corners
where the picture turns, whether there is an outline or not: targets do not depend on what else was annotated.

Every geometric change is a 3x3 matrix from the pixels of a source picture to the pixels of the sample, put together
first and carried out once per picture, straight at the final size: no canvas of double size is made, cropped and
resized again. Where nothing rotates, that one step is a crop and a resize, at a third of the cost of a warp.

``out``, where a function takes one, is as in numpy: uint8 [H, W, C], where the pixels go; it may be the picture's own
memory.

Letters: H W height and width of the sample, h w of a source picture, n boxes of one picture.
Coordinates are continuous (pixel i covers i..i+1); OpenCV's warps count from pixel centres, see ``_warp``.
"""

import math
from dataclasses import dataclass, fields

import cv2
import numpy as np

from utils.datasets.letterbox import FILL, fit, resize
from utils.structures import ImageInfo, Outlines, Sample

# an object that a crop or a warp leaves is kept where enough of it can be seen (the thresholds of YOLOv5)
MIN_VISIBLE = 0.1  # of its area
MIN_SIDE = 2.0  # pixels
MAX_ASPECT = 100.0

GREY = np.full((3, 3), 1 / 3)  # a colour's share along the grey axis
COLOURFUL = np.eye(3) - GREY  # and the rest of it
QUARTER_TURN = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5  # of that rest about the axis, from red to green
CORNERS = [0, 1, 2, 1, 2, 3, 0, 3]  # of a box: where the x and y of its four corners stand in it
FLIP_CODES = {(True, False): 1, (False, True): 0, (True, True): -1}  # mirrored along x, along y -> OpenCV's word

LIMITS = {  # largest meaningful value of a recipe key
    "hsv_h": 0.5, "hsv_s": 1, "hsv_v": 1, "degrees": 180, "translate": 1, "scale": 0.99, "shear": 80,
    "perspective": 0.001, "fliplr": 1, "flipud": 1, "mosaic": 1, "mixup": 1, "close_mosaic": float("inf"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The ``augment`` section of a recipe; names and meaning as in YOLOv5. What is not named does not happen."""

    hsv_h: float = 0.0  # hue turns by up to +- this share of the colour circle
    hsv_s: float = 0.0  # saturation times 1 +- this
    hsv_v: float = 0.0  # brightness times 1 +- this
    degrees: float = 0.0  # rotation up to +-
    translate: float = 0.0  # shift up to +- this share of the sample's width and height
    scale: float = 0.0  # zoom 1 +- this
    shear: float = 0.0  # degrees up to +-, along x and along y
    perspective: float = 0.0  # up to +-, per pixel; 0.0005 is strong
    fliplr: float = 0.0  # probability of left-right mirroring
    flipud: float = 0.0  # probability of upside-down mirroring
    mosaic: float = 0.0  # probability that a sample is put together from four pictures
    mixup: float = 0.0  # probability that a second sample shines through
    close_mosaic: int = 0  # the last so many epochs go without mosaic and mixup
    multi_scale: tuple[float, float] = (1.0, 1.0)  # a batch is this much smaller or larger, at random between the two

    def __post_init__(self):
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        problems = [
            f"{name}: expected 0..{limit}, found {values[name]}"
            for name, limit in LIMITS.items()
            if not 0 <= values[name] <= limit
        ]
        low, high = self.multi_scale
        if not 0 < low <= high <= 4:
            problems.append(f"multi_scale: expected 0 < low <= high <= 4 (1, 1 is off), found {low}, {high}")
        if problems:
            raise ValueError("; ".join(problems))


# ---------------------------------------------------------------------------------------------- whole samples


def random_perspective(
    sample: Sample, size: tuple[int, int], augment: Augment, rng, *, stretch: bool = False, out=None
) -> Sample:
    """One picture at ``size`` (H, W): letterboxed, then turned, zoomed, sheared, tilted and shifted at random."""
    view = _random_view(augment, size, size, rng)
    return _compose([sample], view @ _placement(sample, size, stretch)[None], size, out)


def mosaic(samples: list[Sample], size, augment: Augment, rng, *, stretch: bool = False, out=None) -> Sample:
    """Four pictures around a random point as one sample of ``size`` (H, W) (YOLOv4, section 3.3).

    Laid out as in the YOLOv3 archive: on a plane of twice the size each picture is as large as it would be alone, a
    corner on a point in the middle half; the sample is a random view of the size of one picture onto the plane's
    middle. On purpose otherwise: pictures are not cut at the border of that plane, so that a view beyond it shows
    pictures and not grey. Its info is the first picture's, without a way back to the original.
    """
    height, width = size
    center_x, center_y = (rng.uniform(0.5, 1.5, 2) * (width, height)).tolist()
    view = _random_view(augment, size, (2 * height, 2 * width), rng)
    places = []
    for sample, corner in zip(samples, rng.permutation(4).tolist(), strict=True):
        (tile_height, tile_width), placed = fit(sample.image.shape, size, stretch=stretch)
        left = center_x - tile_width * (corner % 2 == 0)
        top = center_y - tile_height * (corner < 2)
        places.append(_place(*placed.scale, left, top))
    return _compose(samples, view @ np.stack(places), size, out)


def mixup(sample: Sample, other: Sample, rng, out=None) -> Sample:
    """Two samples of one size shining through each other, with the objects of both.

    arXiv 1710.09412; the share is drawn from Beta(32, 32), near a half, as in YOLOv5.
    """
    share = rng.beta(32.0, 32.0)
    image = cv2.addWeighted(sample.image, share, other.image, 1 - share, 0, dst=out).reshape(sample.image.shape)
    joined = {
        name: np.concatenate([getattr(sample, name), getattr(other, name)]) for name in ("boxes", "labels", "ignore")
    }
    if sample.outlines is not None:
        joined["outlines"] = Outlines.cat([sample.outlines, other.outlines])
    return sample.replace(image=image, **joined)


def hsv(sample: Sample, augment: Augment, rng, out=None) -> Sample:
    """Hue, saturation and brightness at random, as one 3x3 matrix. A grey picture has brightness only.

    Hue turns a colour about the grey axis, saturation scales its distance from there, brightness scales all of it: the
    HSI model, whose brightness is the mean of red, green and blue. On purpose unlike YOLOv5, which takes a round trip
    through HSV, at twelve times the cost: over pictures the changes agree (a test), except that the strongest gains of
    saturation come out a tenth weaker.
    """
    turn, *gains = (rng.uniform(-1, 1, 3) * (augment.hsv_h, augment.hsv_s, augment.hsv_v)).tolist()
    image, saturation, brightness = sample.image, 1.0 + gains[0], 1.0 + gains[1]
    if not (turn or any(gains)):
        if out is None:
            return sample
        np.copyto(out, image)
        return sample.replace(image=out)
    if image.shape[2] != 3:
        return sample.replace(image=cv2.convertScaleAbs(image, dst=out, alpha=brightness).reshape(image.shape))
    angle = turn * 2 * math.pi
    colour = saturation * (math.cos(angle) * COLOURFUL + math.sin(angle) * QUARTER_TURN)
    return sample.replace(image=cv2.transform(image, brightness * (GREY + colour), dst=out))


def flip(sample: Sample, augment: Augment, rng, out=None) -> Sample:
    """Mirrored left-right and upside down, each with its probability."""
    left_right, upside_down = rng.random(2).tolist()
    mirrored = left_right < augment.fliplr, upside_down < augment.flipud
    if not any(mirrored):
        return sample
    image, boxes = sample.image, sample.boxes.copy()
    corners = None if sample.outlines is None else sample.outlines.corners.copy()
    for axis in (0, 1):
        if mirrored[axis]:
            side = image.shape[1 - axis]
            boxes[:, axis::2] = side - boxes[:, axis::2][:, ::-1]
            if corners is not None:
                corners[:, axis] = side - corners[:, axis]
    image = cv2.flip(image, FLIP_CODES[mirrored], dst=out).reshape(image.shape)
    return sample.replace(image=image, boxes=boxes, outlines=sample.outlines_after(lambda _: corners))


# ---------------------------------------------------------------------------------------------- matrices


def _place(scale_x: float, scale_y: float, x: float, y: float) -> np.ndarray:
    """Zoom, then shift."""
    return np.array([[scale_x, 0.0, x], [0.0, scale_y, y], [0.0, 0.0, 1.0]])


def _placement(sample: Sample, size, stretch: bool) -> np.ndarray:
    """Picture -> sample, as ``letterbox`` would place it."""
    _, placed = fit(sample.image.shape, size, stretch=stretch)
    return _place(*placed.scale, *placed.pad)


def _random_view(augment: Augment, size, plane, rng) -> np.ndarray:
    """A random view of ``size`` (H, W) onto the middle of a ``plane`` (H', W'): tilt, turn and zoom, shear, shift."""
    limits = (augment.perspective,) * 2 + (augment.degrees, augment.scale) + (augment.shear,) * 2
    limits += (augment.translate,) * 2
    tilt_x, tilt_y, angle, zoom, shear_x, shear_y, right, down = (rng.uniform(-1, 1, 8) * limits).tolist()
    angle, shear_x, shear_y = math.radians(angle), math.tan(math.radians(shear_x)), math.tan(math.radians(shear_y))
    cos, sin = (1 + zoom) * math.cos(angle), (1 + zoom) * math.sin(angle)
    x, y = -plane[1] / 2, -plane[0] / 2
    tilted = np.array([[1.0, 0.0, x], [0.0, 1.0, y], [tilt_x, tilt_y, 1 + tilt_x * x + tilt_y * y]])
    turned_and_sheared = [
        [cos - shear_x * sin, sin + shear_x * cos, (0.5 + right) * size[1]],
        [shear_y * cos - sin, shear_y * sin + cos, (0.5 + down) * size[0]],
        [0.0, 0.0, 1.0],
    ]
    return np.array(turned_and_sheared) @ tilted


def _is_upright(matrix: np.ndarray) -> bool:
    """Whether rectangles stay rectangles: nothing but zoom and shift."""
    return not (matrix[0, 1] or matrix[1, 0] or matrix[2, 0] or matrix[2, 1])


# ---------------------------------------------------------------------------------------------- pixels and boxes


def _compose(samples: list[Sample], matrices: np.ndarray, size: tuple[int, int], out=None) -> Sample:
    """Each picture painted through its matrix into one sample of ``size`` (H, W), and all their boxes with them."""
    canvas = np.empty((*size, samples[0].image.shape[2]), np.uint8) if out is None else out
    canvas.fill(FILL)
    done = np.stack(
        [
            (_crop_resize if _is_upright(matrix) else _warp)(canvas, sample.image, matrix)
            for sample, matrix in zip(samples, matrices, strict=True)
        ]
    )
    counts = [len(sample.labels) for sample in samples]
    boxes, labels, ignore = (
        np.concatenate([getattr(sample, name) for sample in samples]) for name in ("boxes", "labels", "ignore")
    )
    boxes, kept = _move_boxes(boxes, ignore, np.repeat(done, counts, axis=0), size)
    outlines = []
    if samples[0].outlines is not None:
        for sample, matrix, mine in zip(samples, done, np.split(kept, np.cumsum(counts)[:-1])):
            remaining = sample.outlines[mine]
            outlines.append(remaining.moved(_through(remaining.corners.astype(np.float64), matrix)[0]))
    first = samples[0].info
    info = ImageInfo(id=first.id, path=first.path, size=first.size)
    joined = Outlines.cat(outlines) if outlines else None
    return Sample(image=canvas, boxes=boxes[kept], labels=labels[kept], ignore=ignore[kept], info=info, outlines=joined)


def _crop_resize(canvas: np.ndarray, image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Paint an upright picture: what can be seen of it, cut and resized into its place. Returns the matrix done.

    Both the place and the cut are rounded to whole pixels, and the matrix that this makes is what the boxes get.
    """
    places, ((scale_x, _, start_x), (_, scale_y, start_y), _) = [], matrix.tolist()
    for axis, scale, start in ((0, scale_x, start_x), (1, scale_y, start_y)):
        canvas_side, side = canvas.shape[1 - axis], image.shape[1 - axis]
        end = start + scale * side
        first, last = max(round(start), 0), min(round(end), canvas_side)
        if first >= last:  # out of sight: the boxes are, too
            return matrix
        low = min(round((first - start) / scale), side - 1) if first > start else 0
        high = max(round((last - start) / scale), low + 1) if last < end else side
        places.append((first, last, low, min(high, side)))
    (left, right, cut_left, cut_right), (top, bottom, cut_top, cut_bottom) = places
    resize(image[cut_top:cut_bottom, cut_left:cut_right], canvas[top:bottom, left:right])
    scale_x, scale_y = (right - left) / (cut_right - cut_left), (bottom - top) / (cut_bottom - cut_top)
    return _place(scale_x, scale_y, left - cut_left * scale_x, top - cut_top * scale_y)


def _warp(canvas: np.ndarray, image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Paint a turned or tilted picture through its matrix. Returns the matrix."""
    height, width = image.shape[:2]
    shrink = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    to_image = matrix
    if shrink < 0.5:  # bilinear alone would leave pixels out, see resize
        small = np.empty((max(1, round(height * shrink)), max(1, round(width * shrink)), image.shape[2]), np.uint8)
        resize(image, small)
        to_image = matrix @ _place(width / small.shape[1], height / small.shape[0], 0.0, 0.0)
        image = small
    corners, depth = _project(np.array([[0.0, 0.0, width, height]]), matrix)
    low, high = np.zeros(2, int), np.array(canvas.shape[1::-1])
    if (depth > 0).all():  # work on the part of the canvas that it can reach
        low = np.clip(np.floor(corners.min((0, 1))), 0, high).astype(int)
        high = np.clip(np.ceil(corners.max((0, 1))), 0, high).astype(int)
    if (high > low).all():
        # half a pixel there and back: OpenCV's coordinates are 0 in the middle of the first pixel, not at its edge
        centered = _place(1.0, 1.0, -0.5 - low[0], -0.5 - low[1]) @ to_image @ _place(1.0, 1.0, 0.5, 0.5)
        part = canvas[low[1] : high[1], low[0] : high[0]]
        span = (int(high[0] - low[0]), int(high[1] - low[1]))
        options = {"dst": part, "flags": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_TRANSPARENT}
        if centered[2, :2].any():
            cv2.warpPerspective(image, centered, span, **options)
        else:  # the same in half the time
            cv2.warpAffine(image, centered[:2], span, **options)
    return matrix


def _project(boxes: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners [n, 4, 2] of boxes [n, 4] through a matrix (each), and their depth [n, 4] (1 without perspective)."""
    return _through(boxes[:, CORNERS].reshape(-1, 4, 2), matrix)


def _through(points: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [..., m, 2] through a matrix [..., 3, 3], and their depth [..., m] (1 without perspective)."""
    moved = points @ matrix[..., :2].swapaxes(-1, -2) + matrix[..., None, :, 2]
    depth = moved[..., 2]
    return moved[..., :2] / np.where(depth > 1e-6, depth, 1e-6)[..., None], depth


def _move_boxes(boxes, ignore, matrices, size) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [n, 4] through a matrix each: the upright hull, clipped to the sample; and which remain (bool [n]).

    An object remains where at least MIN_VISIBLE of its hull is inside, no side is under MIN_SIDE and the aspect is
    under MAX_ASPECT. On purpose unlike YOLOv5, where an object cut at the mosaic's outer border is measured after that
    cut: visible is always a share of the whole object. An ignore region remains while anything of it is inside.
    """
    corners, depth = _project(boxes.astype(np.float64), matrices)
    low, high = corners.min(1), corners.max(1)
    inside = np.array([size[1], size[0]])
    low_inside, high_inside = (np.minimum(np.maximum(ends, 0), inside) for ends in (low, high))
    (width, height), (whole_width, whole_height) = (high_inside - low_inside).T, (high - low).T
    shorter = np.minimum(width, height)
    visible = width * height >= MIN_VISIBLE * whole_width * whole_height
    object_kept = visible & (shorter >= MIN_SIDE) & (np.maximum(width, height) < MAX_ASPECT * shorter)
    kept = np.where(ignore, shorter > 0, object_kept) & (depth > 0).all(1)
    return np.concatenate([low_inside, high_inside], axis=1, dtype=np.float32), kept

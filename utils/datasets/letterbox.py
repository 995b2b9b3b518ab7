"""The only gate into network pixels: place a picture on the network's canvas, and remember how.

Coordinates are continuous: pixel i covers i..i+1, so a picture of width w spans 0..w and resizing to w' is exactly a
multiplication by w'/w.
"""

import cv2
import numpy as np

from utils.structures import Letterbox

FILL = 114  # grey of the canvas where there is no picture


def fit(image_size, size, *, upscale: bool = True, stretch: bool = False) -> tuple[tuple[int, int], Letterbox]:
    """Where a picture of ``image_size`` (h, w) goes on a canvas of ``size`` (H, W): its new (h, w) and the Letterbox.

    The picture is centred, its aspect kept to the rounding of a pixel; ``stretch`` fills the canvas instead (Darknet
    without letter_box=1). The Letterbox holds the scale that the whole-pixel size really has, per axis, so that
    ``undo(apply(boxes)) == boxes`` and boxes follow the pixels.
    """
    (height, width), (canvas_height, canvas_width) = image_size[:2], size
    scale_y, scale_x = canvas_height / height, canvas_width / width
    if not stretch:
        scale_y = scale_x = min(scale_y, scale_x)
    if not upscale:
        scale_y, scale_x = min(scale_y, 1.0), min(scale_x, 1.0)
    new_height, new_width = max(1, round(height * scale_y)), max(1, round(width * scale_x))
    pad = (float((canvas_width - new_width) // 2), float((canvas_height - new_height) // 2))
    return (new_height, new_width), Letterbox(scale=(new_width / width, new_height / height), pad=pad)


def resize(image: np.ndarray, out: np.ndarray) -> None:
    """Resize ``image`` [h, w, C] into ``out`` [h', w', C], which may be a part of a larger array. uint8.

    Bilinear. Where that would be to less than half, pictures are halved first, as often as it takes: bilinear reads
    four pixels, of a footprint that is then larger than four, and would turn fine texture into noise. All pixels are
    read, as by area (``cv2.INTER_AREA``), at an eighth of its price.
    """
    (height, width), (new_height, new_width) = image.shape[:2], out.shape[:2]
    while height > 2 * new_height or width > 2 * new_width:
        height = -(-height // 2) if height > 2 * new_height else height
        width = -(-width // 2) if width > 2 * new_width else width
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    cv2.resize(image, (new_width, new_height), dst=out, interpolation=cv2.INTER_LINEAR)


def reduced_to(image: np.ndarray, max_side: int) -> np.ndarray:
    """A picture [h, w, C] with no side longer than ``max_side``; itself where none is."""
    (height, width), _ = fit(image.shape, (max_side, max_side), upscale=False)
    if (height, width) == image.shape[:2]:
        return image
    out = np.empty((height, width, image.shape[2]), np.uint8)
    resize(image, out)
    return out


def letterbox(
    image: np.ndarray, size: tuple[int, int], *, upscale: bool = True, fill: int = FILL, stretch: bool = False, out=None
) -> tuple[np.ndarray, Letterbox]:
    """Resize a picture [h, w, C] onto a canvas [H, W, C] of ``size`` (H, W), uint8, one resize straight into place.

    Returns the canvas and the Letterbox that takes boxes there and back. Pictures smaller than the canvas are enlarged
    unless ``upscale`` is off. ``out``: memory for the canvas.
    """
    (height, width), placed = fit(image.shape, size, upscale=upscale, stretch=stretch)
    left, top = int(placed.pad[0]), int(placed.pad[1])
    canvas = np.empty((*size, image.shape[2]), np.uint8) if out is None else out
    canvas.fill(fill)
    resize(image, canvas[top : top + height, left : left + width])
    return canvas, placed

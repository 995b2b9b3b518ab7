"""Boxes and masks on pictures: what was found, what is true, and many pictures at a glance.

Pictures are RGB or grey uint8 [H, W, C]; every function returns a new RGB picture and leaves its input alone.
"""

import unicodedata
from functools import lru_cache

import cv2
import numpy as np
from torch import Tensor

from utils.mask_frames import paste
from utils.structures import Detections

# 20 colours that stand out on photographs, neighbours far apart in hue; RGB
PALETTE = (
    (230, 57, 70), (29, 142, 232), (76, 187, 23), (255, 159, 28), (155, 81, 224), (0, 191, 179), (241, 91, 181),
    (254, 215, 0), (0, 95, 215), (163, 220, 60), (255, 94, 19), (94, 96, 206), (0, 158, 96), (199, 125, 255),
    (255, 133, 133), (0, 210, 255), (176, 122, 61), (214, 40, 120), (120, 170, 140), (140, 150, 255),
)  # fmt: skip
WHITE, BLACK = (255, 255, 255), (25, 25, 25)
FONT = cv2.FONT_HERSHEY_SIMPLEX
TINT = 0.45  # how much of a mask's colour is laid over its pixels
FINE = 3  # text is drawn this many times larger and averaged down: OpenCV's own small letters are ragged


def colour_of(label: int) -> tuple[int, int, int]:
    """The colour of a class, RGB. The same in every picture and plot."""
    return PALETTE[label % len(PALETTE)]


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    names: list[str],
    *,
    line_thickness: int | None = None,
    hide_labels: bool = False,
    hide_conf: bool = False,
) -> np.ndarray:
    """Draw what was found, the most certain on top.

    Args:
        detections: boxes in pixels of ``image``, best first; their masks are tinted and their numbers named, where
            they have some.
        line_thickness: pixels; by default it grows with the picture.
    """
    labels, scores = detections.labels.tolist(), detections.scores.tolist()
    ids = [0] * len(labels) if detections.ids is None else detections.ids.tolist()
    if hide_labels:
        captions = [""] * len(labels)
    else:
        captions = [
            " ".join([f"#{number}"] * (number > 0) + [names[label]] + [f"{score:.2f}"] * (not hide_conf))
            for number, label, score in zip(ids, labels, scores)
        ]
    image = _tinted(image, detections.boxes, labels, detections.masks)
    return _draw(image, detections.boxes, labels, captions, line_thickness)


def draw_boxes(
    image: np.ndarray,
    boxes,
    labels,
    names: list[str],
    *,
    masks: Tensor | None = None,
    line_thickness: int | None = None,
) -> np.ndarray:
    """Draw annotated boxes [n, 4] of classes [n] (numpy or torch), in pixels of ``image``, and masks [n, S, S]."""
    labels = [int(label) for label in labels]
    image = _tinted(image, boxes, labels, masks)
    return _draw(image, boxes, labels, [names[label] for label in labels], line_thickness)


def batch_mosaic(
    images: list[np.ndarray], *, captions: list[str] | None = None, max_images: int = 16, max_size: int = 1920
) -> np.ndarray:
    """Pictures of any size -> one grid, at most ``max_size`` pixels a side."""
    images = [_rgb(image) for image in images[:max_images]]
    assert images, "a grid needs a picture"
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = int(np.ceil(len(images) / columns))
    gap = 4
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    room = max_size - gap
    scale = min(1.0, (room / columns - gap) / width, (room / rows - gap) / height)
    height, width = max(1, int(height * scale)), max(1, int(width * scale))
    canvas = np.full((gap + rows * (height + gap), gap + columns * (width + gap), 3), 255, np.uint8)
    for number, image in enumerate(images):
        if scale < 1:
            size = max(1, int(image.shape[1] * scale)), max(1, int(image.shape[0] * scale))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        top, left = gap + number // columns * (height + gap), gap + number % columns * (width + gap)
        cell = canvas[top : top + image.shape[0], left : left + image.shape[1]]
        cell[:] = image
        if captions:
            _paste(cell, text_patch(captions[number], 16, WHITE, BLACK), 0, 0)
    return canvas


def plain_text(text: str) -> str:
    """The letters OpenCV's font has: accents are dropped, what has no Latin form becomes ``?``."""
    letters = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return letters.encode("ascii", "replace").decode()


@lru_cache(maxsize=4096)
def text_patch(text: str, height: int, colour: tuple, background: tuple) -> np.ndarray:
    """One line of text on a filled box, uint8 [height, w, 3]. Cached: treat as read-only."""
    text, tall = plain_text(text), height * FINE
    scale = 0.56 * tall / 22.0  # capitals of this font are 22 pixels high at scale 1
    thickness = max(1, round(0.062 * tall))
    (width, _), _ = cv2.getTextSize(text, FONT, scale, thickness)
    margin = round(0.26 * tall)
    patch = np.full((tall, -(-(width + 2 * margin) // FINE) * FINE, 3), background, np.uint8)
    cv2.putText(patch, text, (margin, round(0.77 * tall)), FONT, scale, colour, thickness, cv2.LINE_AA)
    return cv2.resize(patch, (patch.shape[1] // FINE, height), interpolation=cv2.INTER_AREA)


def _draw(image, boxes, labels: list, captions: list[str], line_thickness: int | None) -> np.ndarray:
    """All boxes, then all captions, so that no line crosses a text; the first on top."""
    canvas = _rgb(image).copy()
    height, width = canvas.shape[:2]
    thickness = line_thickness or max(1, round(np.hypot(height, width) / 400))
    text_height = max(14, round(7 * thickness + 4))
    boxes = np.asarray(boxes.detach().cpu() if isinstance(boxes, Tensor) else boxes, np.float64).reshape(-1, 4)
    drawn = []
    for box, label, caption in zip(boxes, labels, captions):
        x1, y1, x2, y2 = box
        if np.isfinite(box).all() and x2 >= 0 and y2 >= 0 and x1 <= width and y1 <= height:
            corners = np.clip(box, 0, [width - 1, height - 1] * 2).round().astype(int).tolist()
            drawn.append((corners, colour_of(label), caption))
    for (x1, y1, x2, y2), colour, _ in drawn[::-1]:
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness)
    occupied, patches = [], []
    for corners, colour, caption in drawn:
        if caption:
            patch = text_patch(caption, text_height, _readable_on(colour), colour)
            occupied.append(_spot(patch, corners, thickness // 2, canvas.shape, occupied))
            patches.append(patch)
    for patch, (left, top, _, _) in list(zip(patches, occupied))[::-1]:
        _paste(canvas, patch, left, top)
    return canvas


def _tinted(image: np.ndarray, boxes: Tensor, labels: list[int], masks: Tensor | None) -> np.ndarray:
    """The picture with each mask in its class's colour and a line around it, the first on top."""
    if masks is None:
        return image
    canvas = _rgb(image).copy()
    patches = paste(masks.detach().cpu().float(), boxes.detach().cpu().float(), canvas.shape[:2])
    for patch, label in list(zip(patches, labels))[::-1]:
        left, top, right, bottom = patch.window
        part, colour = canvas[top:bottom, left:right], colour_of(label)
        part[patch.pixels] = (part[patch.pixels] * (1 - TINT) + np.array(colour) * TINT).astype(np.uint8)
        pixels = patch.pixels.astype(np.uint8)
        around, _ = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top))
        cv2.drawContours(canvas, around, -1, colour, 1)
    return canvas


def _spot(
    patch: np.ndarray, corners: list[int], margin: int, shape: tuple, occupied: list
) -> tuple[int, int, int, int]:
    """Where a caption goes: on its box, inside it or below it, the first of these that is free; never outside."""
    (x1, y1, _, y2), (height, width) = corners, patch.shape[:2]
    left = max(0, min(x1 - margin, shape[1] - width))
    spots = [(left, max(0, min(top, shape[0] - height))) for top in (y1 - height, y1, y2)]
    spots = [(x, y, x + width, y + height) for x, y in (spots if y1 >= height else spots[1:])]
    return next((spot for spot in spots if not any(_overlap(spot, other) for other in occupied)), spots[0])


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _paste(canvas: np.ndarray, patch: np.ndarray, left: int, top: int) -> None:
    area = canvas[top : top + patch.shape[0], left : left + patch.shape[1]]
    area[:] = patch[: area.shape[0], : area.shape[1]]


def _readable_on(colour: tuple) -> tuple:
    """Dark text on light colours, white on dark ones (luma of BT.601)."""
    return BLACK if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else WHITE


def _rgb(image: np.ndarray) -> np.ndarray:
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (1, 3), "uint8 [H, W, 1 or 3]"
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.ascontiguousarray(image)

"""Which points of a picture answer for which object: one picture of it.

Letters: H W of the picture, n objects, K points, M negatives, R regions.
"""

import cv2
import numpy as np

from utils.draw import BLACK, WHITE, text_patch

# levels from the finest on; distinct in hue and in lightness, also for colour-blind eyes; RGB
LEVELS = ((0, 114, 218), (240, 130, 0), (200, 30, 130), (0, 150, 90), (110, 70, 220), (150, 100, 40))
ALONE = (214, 30, 30)  # an object that nobody answers for
SHADE = (96, 110, 150)
NEGATIVE = (70, 70, 70)
REGION = (0, 120, 70)
NONE = np.zeros((0, 4))
HATCH = 9  # pixels from line to line
SHIFT = 4  # OpenCV draws in sixteenths of a pixel


def level_colour(level: int) -> tuple[int, int, int]:
    """Colour of a pyramid level, RGB, the finest first."""
    return LEVELS[level % len(LEVELS)]


def draw_assignment(
    image: np.ndarray,
    boxes: np.ndarray,
    points: np.ndarray,
    levels: np.ndarray,
    objects: np.ndarray,
    radii: np.ndarray,
    ignored: np.ndarray,
    negatives: np.ndarray,
    background: np.ndarray = NONE,
    regions: np.ndarray = NONE,
    *,
    side: int = 640,
) -> np.ndarray:
    """The picture, pale; its objects numbered; every point joined to the middle of its object.

    Args:
        image: uint8 [H, W, 3].
        boxes: [n, 4] xyxy, in pixels of ``image`` like all that follows. Red and dashed where no point has it.
        points, levels, objects, radii: [K, 2] x and y; [K] level for the colour, row of ``boxes``, size.
        ignored: float [H, W] in 0..1, hatched as densely: neither right nor wrong.
        negatives: [M, 2] points drawn as small crosses.
        background, regions: [R, 4] boxes of a second stage, thin: those that hold no object, and those that do.
        side: longer side of the result, pixels.
    """
    scale = side / max(image.shape[:2])
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    canvas = _pale(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA))
    canvas = _hatched(canvas, cv2.resize(ignored.astype(np.float32), size, interpolation=cv2.INTER_NEAREST))
    for x, y in negatives * scale:
        cv2.drawMarker(canvas, (round(x), round(y)), NEGATIVE, cv2.MARKER_TILTED_CROSS, 7, 1, cv2.LINE_AA)
    for some, colour in ((background, NEGATIVE), (regions, REGION)):
        for x1, y1, x2, y2 in (some * scale).tolist():
            cv2.rectangle(canvas, _fixed((x1, y1)), _fixed((x2, y2)), colour, 1, cv2.LINE_AA, SHIFT)
    answered = np.bincount(objects, minlength=len(boxes)) > 0
    for box, found in zip(boxes * scale, answered):
        if found:
            _rectangle(canvas, box, BLACK)
        else:
            _dashed(canvas, box, ALONE)
    _spokes(canvas, points * scale, levels, (boxes[:, :2] + boxes[:, 2:])[objects] / 2 * scale)
    for box in boxes[answered] * scale:
        middle = ((box[:2] + box[2:]) / 2).round().astype(int).tolist()
        cv2.drawMarker(canvas, middle, BLACK, cv2.MARKER_CROSS, 9, 2)
    for row in np.lexsort((radii, -levels)):  # coarse levels first: their points are few and large
        _disc(canvas, points[row] * scale, max(1.6, radii[row] * scale), level_colour(levels[row]))
    for number, (box, found) in enumerate(zip(boxes * scale, answered)):
        _tag(canvas, f"{number + 1}" if found else f"{number + 1}: nobody", box, BLACK if found else ALONE)
    return canvas


def _pale(image: np.ndarray) -> np.ndarray:
    """Light and almost grey, so that colour belongs to the points alone."""
    grey = image.mean(2, keepdims=True)
    return (170 + 0.33 * (0.8 * grey + 0.2 * image)).clip(0, 255).astype(np.uint8)


def _hatched(canvas: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Diagonal lines where ``strength`` [h, w] is above 0, on a tint."""
    rows, columns = np.ogrid[: canvas.shape[0], : canvas.shape[1]]
    lines = (rows + columns) % HATCH < 2
    alpha = (strength * np.where(lines, 0.45, 0.16))[..., None]
    return (canvas * (1 - alpha) + np.array(SHADE) * alpha).astype(np.uint8)


def _spokes(canvas: np.ndarray, points: np.ndarray, levels: np.ndarray, centers: np.ndarray) -> None:
    """Lines from points to the middle of their object, fainter where there are many."""
    drawn = canvas.copy()
    for point, level, center in zip(points, levels, centers):
        cv2.line(drawn, _fixed(point), _fixed(center), level_colour(level), 1, cv2.LINE_AA, SHIFT)
    alpha = float(np.clip(60 / max(len(points), 1), 0.3, 0.8))
    cv2.addWeighted(drawn, alpha, canvas, 1 - alpha, 0, canvas)


def _disc(canvas: np.ndarray, point: np.ndarray, radius: float, colour: tuple) -> None:
    cv2.circle(canvas, _fixed(point), round((radius + 1) * 2**SHIFT), WHITE, -1, cv2.LINE_AA, SHIFT)
    cv2.circle(canvas, _fixed(point), round(radius * 2**SHIFT), colour, -1, cv2.LINE_AA, SHIFT)


def _rectangle(canvas: np.ndarray, box: np.ndarray, colour: tuple) -> None:
    x1, y1, x2, y2 = _corners(canvas, box)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), WHITE, 4)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, 2)


def _dashed(canvas: np.ndarray, box: np.ndarray, colour: tuple, dash: int = 8) -> None:
    x1, y1, x2, y2 = _corners(canvas, box)
    inside = canvas[y1 : y2 + 1, x1 : x2 + 1]
    inside[:] = (inside * 0.8 + np.array(colour) * 0.2).astype(np.uint8)
    for (ax, ay), (bx, by) in zip(((x1, y1), (x2, y1), (x2, y2), (x1, y2)), ((x2, y1), (x2, y2), (x1, y2), (x1, y1))):
        steps = max(1, max(abs(bx - ax), abs(by - ay)) // dash)
        ends = np.linspace((ax, ay), (bx, by), steps + 1).round().astype(int).tolist()
        for start, end in zip(ends[::2], ends[1::2]):
            cv2.line(canvas, start, end, colour, 2)


def _tag(canvas: np.ndarray, text: str, box: np.ndarray, colour: tuple) -> None:
    """The object's number on its upper left corner."""
    patch = text_patch(text, 15, WHITE, colour)
    x1, y1, _, _ = _corners(canvas, box)
    top = y1 - patch.shape[0] if y1 >= patch.shape[0] else y1
    left = min(x1, canvas.shape[1] - patch.shape[1])
    if left >= 0:
        canvas[top : top + patch.shape[0], left : left + patch.shape[1]] = patch


def _corners(canvas: np.ndarray, box: np.ndarray) -> list[int]:
    height, width = canvas.shape[:2]
    return np.clip(box, 0, [width - 1, height - 1] * 2).round().astype(int).tolist()


def _fixed(point: np.ndarray) -> tuple[int, int]:
    """A point in OpenCV's sixteenths; pixel i covers i..i+1 here and is centred on i there."""
    x, y = np.round((np.clip(point, -1e4, 1e4) - 0.5) * 2**SHIFT).astype(int).tolist()
    return x, y

"""Axes, lines, bars and grids of numbers on a white canvas, by OpenCV alone.

Geometry is drawn twice as large and averaged down, text is put on last: both come out smooth. Colours are RGB, sizes
are pixels of the finished picture.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np

from utils.draw import WHITE, text_patch

INK, SOFT, GRID, PALE = (45, 52, 64), (110, 118, 130), (228, 231, 236), (248, 249, 251)
FINE = 2  # supersampling of geometry
SHIFT = 4  # fixed-point bits of OpenCV coordinates
BLUES = ((250, 251, 253), (199, 220, 241), (107, 167, 219), (33, 106, 178), (10, 48, 106))


@dataclass
class Chart:
    """One pair of axes. Add series, then ``render()``; ranges come from the series where they are not given."""

    title: str
    x_label: str = ""
    y_label: str = ""
    width: int = 640
    height: int = 420
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    categories: list[str] | None = None  # names on the x axis instead of numbers
    _series: list[tuple] = field(default_factory=list)  # (draw method, x, y, colour, thickness)
    _legend: list[tuple] = field(default_factory=list)  # (name, colour)

    def line(self, x, y, colour, *, thickness: float = 2, name: str = "") -> None:
        """A polyline; it breaks where y is nan."""
        self._add(self._draw_line, x, y, colour, thickness, name)

    def dots(self, x, y, colour, *, thickness: float = 6, name: str = "") -> None:
        self._add(self._draw_dots, x, y, colour, thickness, name)

    def bars(self, x, y, colours, *, thickness: float = 0.8) -> None:
        """Bars from 0 upwards, ``thickness`` in units of x, one colour each."""
        self._add(self._draw_bars, x, y, colours, thickness, "")
        self.y_range = self.y_range or (0.0, 1.06 * float(max(np.max(y, initial=0), 1)))

    def density(self, values: np.ndarray) -> None:
        """Fill the axes with a picture of ``values`` [rows, columns], rows upwards: the darker the larger."""
        self._add(self._draw_density, [0, 1], [0, 1], values, 0, "")

    def render(self) -> np.ndarray:
        """-> uint8 [height, width, 3]."""
        entries = [text_patch(name, 18, INK, WHITE) for name, _ in self._legend]
        legend_width = max((entry.shape[1] for entry in entries), default=-30) + 44
        self._box = (68, 44, self.width - 14 - legend_width, self.height - (54 if self.x_label else 36))
        self._x = self.x_range or self._range([s[1] for s in self._series], 0.0 if self.categories is None else 0.5)
        self._y = self.y_range or self._range([s[2] for s in self._series], 0.0, room=0.06)
        x_ticks = ticks(self._x, (self._box[2] - self._box[0]) // 75, self._smallest_step(1))
        y_ticks = ticks(self._y, (self._box[3] - self._box[1]) // 50, self._smallest_step(2))
        self._canvas = np.full((self.height * FINE, self.width * FINE, 3), 255, np.uint8)
        left, top, right, bottom = self._box
        self._fill(left, top, right, bottom, PALE)
        for draw, x, y, colour, thickness in self._series:
            if draw == self._draw_density:
                draw(x, y, colour, thickness)
        for value in y_ticks:
            y = self._pixel(self._x[0], value)[1]
            self._stroke([(left, y), (right, y)], GRID, 1)
        for value in x_ticks if self.categories is None else []:
            x = self._pixel(value, self._y[0])[0]
            self._stroke([(x, top), (x, bottom)], GRID, 1)
        for draw, x, y, colour, thickness in self._series:
            if draw != self._draw_density:
                draw(x, y, colour, thickness)
        self._stroke([(left, top), (left, bottom), (right, bottom)], SOFT, 1.2)
        for number, (_, colour) in enumerate(self._legend):
            y = top + 12 + 22 * number
            self._stroke([(right + 16, y), (right + 36, y)], colour, 3)
        image = cv2.resize(self._canvas, (self.width, self.height), interpolation=cv2.INTER_AREA)

        paste(image, text_patch(self.title, 24, INK, WHITE), (left + right) / 2, 22, 0.5)
        paste(image, text_patch(self.x_label, 20, SOFT, WHITE), (left + right) / 2, self.height - 14, 0.5)
        paste(image, np.rot90(text_patch(self.y_label, 20, SOFT, WHITE)), 14, (top + bottom) / 2, 0.5)
        for value in y_ticks:
            label = text_patch(tick_text(value), 17, SOFT, WHITE)
            paste(image, label, left - 3, self._pixel(self._x[0], value)[1], 1)
        for value, text in self._x_names(x_ticks):
            paste(image, text_patch(text, 17, SOFT, WHITE), self._pixel(value, self._y[0])[0], bottom + 12, 0.5)
        for number, entry in enumerate(entries):
            paste(image, entry, right + 38, top + 12 + 22 * number, 0)
        return image

    def _add(self, draw, x, y, colour, thickness, name) -> None:
        self._series.append((draw, np.asarray(x, float), np.asarray(y, float), colour, thickness))
        if name:
            self._legend.append((name, colour))

    def _x_names(self, numbers: list[float]) -> list[tuple[float, str]]:
        """Category names, as many as fit beside each other, or numbers."""
        if self.categories is None:
            return [(value, tick_text(value)) for value in numbers]
        room = (self._box[2] - self._box[0]) / max(1, len(self.categories))
        widest = max((text_patch(name, 17, SOFT, WHITE).shape[1] for name in self.categories), default=1)
        every = max(1, int(np.ceil(widest / room)))
        return [(number, name) for number, name in enumerate(self.categories) if number % every == 0]

    def _smallest_step(self, axis: int) -> float:
        """Whole numbers get whole ticks."""
        values = np.concatenate([np.zeros(0), *(series[axis] for series in self._series)])
        values = values[np.isfinite(values)]
        densities = any(series[0] == self._draw_density for series in self._series)
        return 1.0 if values.size and not densities and (values == values.round()).all() else 0.0

    @staticmethod
    def _range(parts: list[np.ndarray], margin: float, room: float = 0.0) -> tuple[float, float]:
        values = np.concatenate([np.zeros(0), *parts])
        values = values[np.isfinite(values)]
        if not values.size:
            return 0.0, 1.0
        low, high = values.min() - margin, values.max() + margin
        if low > 0 and low < 0.5 * high and room:
            low = 0.0
        if high <= low:
            low, high = low - 0.5 * max(abs(low), 1e-9), high + 0.5 * max(abs(high), 1e-9)
        return float(low - room * (high - low) * (low != 0)), float(high + room * (high - low))

    def _pixel(self, x, y) -> tuple:
        """Data -> pixels of the finished picture."""
        left, top, right, bottom = self._box
        (x0, x1), (y0, y1) = self._x, self._y
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    def _stroke(self, points, colour, thickness) -> None:
        points = (np.asarray(points, float) * FINE * (1 << SHIFT)).round().astype(np.int32)
        cv2.polylines(self._canvas, [points], False, colour, max(1, round(thickness * FINE)), cv2.LINE_AA, SHIFT)

    def _fill(self, left, top, right, bottom, colour) -> None:
        corners = [round(v * FINE) for v in (left, top, right, bottom)]
        cv2.rectangle(self._canvas, corners[:2], corners[2:], colour, cv2.FILLED)

    def _draw_line(self, x, y, colour, thickness) -> None:
        known = np.isfinite(y)
        for part in np.split(np.arange(len(x)), np.flatnonzero(np.diff(known)) + 1):
            if len(part) and known[part[0]]:
                x_pixels, y_pixels = self._pixel(x[part], np.clip(y[part], *self._y))
                self._stroke(np.stack([x_pixels, y_pixels], axis=1), colour, thickness)

    def _draw_dots(self, x, y, colour, thickness) -> None:
        for x_pixel, y_pixel in zip(*self._pixel(x[np.isfinite(y)], y[np.isfinite(y)])):
            centre = [round(v * FINE * (1 << SHIFT)) for v in (x_pixel, y_pixel)]
            radius = round(thickness / 2 * FINE * (1 << SHIFT))
            cv2.circle(self._canvas, centre, radius, colour, cv2.FILLED, cv2.LINE_AA, SHIFT)

    def _draw_bars(self, x, y, colours, thickness) -> None:
        for at, value, colour in zip(x, y, colours):
            if value:
                left, top = self._pixel(at - thickness / 2, value)
                right, bottom = self._pixel(at + thickness / 2, max(0.0, self._y[0]))
                self._fill(left, top, right, bottom, colour)

    def _draw_density(self, x, y, values, thickness) -> None:
        corners = self._pixel(0.0, 0.0), self._pixel(1.0, 1.0)
        (left, right), (top, bottom) = ([round(v * FINE) for v in sorted(side)] for side in zip(*corners))
        upwards = self._y[1] > self._y[0]
        shade = blues(values[:: -1 if upwards else 1] / max(values.max(), 1e-12))
        self._canvas[top:bottom, left:right] = cv2.resize(
            shade, (right - left, bottom - top), interpolation=cv2.INTER_CUBIC
        )


def ticks(bounds: tuple[float, float], most: int, smallest: float) -> list[float]:
    """Round numbers within the bounds, about ``most`` of them or fewer; multiples of ``smallest`` unless that is 0."""
    low, high = sorted(bounds)
    least = max((high - low) / max(most, 1), smallest) * 0.999
    power = 10.0 ** np.floor(np.log10(least))
    steps = [factor * power for factor in (1, 2, 2.5, 5, 10, 20)]
    step = next(step for step in steps if step >= least and not (smallest and step % smallest))
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(number * step) + 0.0 for number in np.arange(first, last + 1)]  # + 0.0: no "-0"


def tick_text(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"


def blues(values: np.ndarray) -> np.ndarray:
    """Numbers in 0..1 -> uint8 RGB, white to dark blue."""
    stops = np.linspace(0, 1, len(BLUES))
    channels = [np.interp(values, stops, [colour[channel] for colour in BLUES]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def paste(image: np.ndarray, patch: np.ndarray, x: float, y: float, align: float) -> None:
    """Put a text beside, on or before x (align 0, 0.5, 1), vertically centred on y, clipped to the picture."""
    height, width = patch.shape[:2]
    left, top = round(x - align * width), round(y - height / 2)
    left, top = max(0, min(left, image.shape[1] - width)), max(0, min(top, image.shape[0] - height))
    area = image[top : top + height, left : left + width]
    area[:] = np.minimum(area, patch[: area.shape[0], : area.shape[1]])  # dark ink on any light ground


def side_by_side(images: list[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size -> a grid on white."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    canvas = np.full((rows * height + 12, columns * width + 12, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = 6 + number // columns * height, 6 + number % columns * width
        canvas[top : top + height, left : left + width] = image
    return canvas


def number_grid(shares: np.ndarray, texts: list[list[str]], names: list[str], title: str, x_label: str, y_label: str):
    """A square table as a picture: cells [n, n] shaded by share (0..1), with texts where they fit.

    Returns:
        uint8 [height, width, 3].
    """
    num = len(names)
    cell = int(np.clip(900 // num, 10, 90))
    text_height = int(np.clip(cell * 0.42, 9, 20))
    labels = [text_patch(name, max(text_height, 11), INK, WHITE) for name in names]
    longest = max(label.shape[1] for label in labels)
    left, top, side = 40 + longest, 50, cell * num
    image = np.full((top + side + longest + 46, max(left + side + 24, 420), 3), 255, np.uint8)
    image[top : top + side, left : left + side] = np.repeat(np.repeat(blues(shares), cell, axis=0), cell, axis=1)
    for number in range(num + 1):
        at = min(number * cell, side - 1)
        image[top + at, left : left + side] = image[top : top + side, left + at] = GRID
    for row in range(num):
        paste(image, labels[row], left - 4, top + (row + 0.5) * cell, 1)
        column_label = np.rot90(labels[row])
        paste(image, column_label, left + (row + 0.5) * cell, top + side + 4 + column_label.shape[0] / 2, 0.5)
        for column in range(num):
            x, y = left + column * cell, top + row * cell
            ground = tuple(int(channel) for channel in image[y + cell // 2, x + cell // 2])
            ink = WHITE if shares[row, column] > 0.45 else INK
            patch = text_patch(texts[row][column], text_height, ink, ground)
            if texts[row][column] and patch.shape[1] <= cell - 1 and patch.shape[0] <= cell - 2:
                y, x = y + (cell - patch.shape[0]) // 2 + 1, x + (cell - patch.shape[1]) // 2 + 1
                image[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
    paste(image, text_patch(title, 24, INK, WHITE), left + side / 2, 24, 0.5)
    paste(image, text_patch(x_label, 20, SOFT, WHITE), left + side / 2, image.shape[0] - 16, 0.5)
    paste(image, np.rot90(text_patch(y_label, 20, SOFT, WHITE)), 16, top + side / 2, 0.5)
    return image

"""Parts of a page: one HTML file with its pictures inside, nothing fetched from anywhere. Text comes escaped."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

import cv2
import numpy as np

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; max-width: 1500px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.7em; margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 18px; }
figure { margin: 0; } figure img { width: 100%; border: 1px solid #ccc; } figcaption b { font-size: 1.1em; }
.quiet { color: #5c6370; font-size: .92em; } table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .3em .75em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } thead th { border-bottom: 2px solid #999; vertical-align: bottom; }
.swatch { display: inline-block; width: .85em; height: .85em; border-radius: 50%; margin: 0 .3em 0 .9em; }
.bar { display: flex; width: 340px; height: 17px; background: #f1f1f1; } .bar i { display: block; height: 100%; }
.bad { color: rgb(214, 30, 30); font-weight: 600; } .key { display: flex; flex-wrap: wrap; }
"""
# without thinned-out colours, which would blur the lines; a quarter of a PNG's size
SHARP = [cv2.IMWRITE_JPEG_QUALITY, 92, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]

Colour = tuple[int, int, int]  # RGB


def whole_page(title: str, sections: Iterable[str], *, style: str = "") -> str:
    """The HTML text of a page; ``title`` is plain, sections are HTML, ``style`` is what only this page needs."""
    head = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}{style}</style>"
    )
    return head + "\n".join(section for section in sections if section) + "</html>\n"


def row(cell: str, values: Iterable[str]) -> str:
    """A row of a table of ``td`` or ``th``."""
    return "<tr>" + "".join(f"<{cell}>{value}</{cell}>" for value in values) + "</tr>"


def bar(shares: np.ndarray, colours: list[Colour]) -> str:
    """A bar divided by ``shares`` of its whole width."""
    parts = [
        f"<i style='width:{100 * share:.2f}%;background:{css(colour)}' title='{share:.0%}'></i>"
        for share, colour in zip(shares.tolist(), colours)
    ]
    return f"<div class=bar>{''.join(parts)}</div>"


def swatch(colour: Colour) -> str:
    """A dot of a colour, for the key of a picture."""
    return f"<span class=swatch style='background:{css(colour)}'></span>"


def css(colour: Colour) -> str:
    """A colour as a style sheet writes it."""
    return f"rgb({colour[0]},{colour[1]},{colour[2]})"


def picture(image: np.ndarray) -> str:
    """An RGB picture uint8 [H, W, 3], inside the page."""
    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), SHARP)
    assert encoded, "OpenCV encodes JPEG"
    return _inside(data.tobytes(), "jpeg")


def picture_file(path: Path) -> str:
    """A picture's file (.png, .jpg) as it is, inside the page."""
    return _inside(path.read_bytes(), {".jpg": "jpeg"}.get(path.suffix, path.suffix[1:]))


def _inside(data: bytes, kind: str) -> str:
    return f"<img alt='' src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"

"""The page that shows a comparison of assigners: one HTML file, pictures inside, nothing fetched from anywhere.

Letters: S assigners, L levels, n objects of a picture.
"""

import base64
from collections.abc import Mapping
from html import escape

import cv2
import numpy as np

from models.assignment_pictures import caption, level_order
from models.compare_assigners import SIZES, Comparison
from utils.draw import PALETTE
from utils.draw_assignment import level_colour

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


def page(
    comparison: Comparison,
    panels: list[Mapping[str, np.ndarray]],
    shares: Mapping[str, Mapping[str, np.ndarray]],
    *,
    title: str,
    notes: list[str],
    about: Mapping[str, str],
    refused: Mapping[str, str],
) -> str:
    """The HTML text.

    Args:
        panels: of every picture, one RGB picture per assigner.
        shares: of the first picture: per assigner and loss term, [n + 1] of its objects and the background.
        notes: sentences about the network and the data.
        about: a sentence per assigner.
        refused: assigners that the network cannot have, and why.
    """
    sections = [
        f"<h1>{escape(title)}</h1><p class=quiet>{'<br>'.join(map(escape, notes))}</p>",
        _how_to_read(comparison),
        *(_picture(comparison, drawn, about, number) for number, drawn in enumerate(panels)),
        _numbers(comparison),
        _agreement(comparison),
        _losses(shares),
        _refused(refused),
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    return head + "\n".join(section for section in sections if section) + "</html>\n"


def _how_to_read(comparison: Comparison) -> str:
    return f"""<h2>How to read the pictures</h2>
<p>A detector has thousands of output slots, each at its own point of the picture. While it is taught, somebody must
decide which of them shall answer for which object; all others learn to say "nothing here". That decision is the
assignment. It is the only difference between the pictures of a group: network, picture and objects are the same.</p>
<ul>
<li>A <b>dot</b> is a slot that answers for the object it is joined to. A larger dot has more weight.</li>
<li>Its <b>colour</b> is its level of the pyramid: {_levels(comparison)}, in pixels from slot to slot. Dots side by
side are the anchors of one cell.</li>
<li>A <span class=bad>red dashed box</span> is an object that nobody answers for: this picture does not teach it.</li>
<li><b>Hatched</b> slots are neither right nor wrong and learn nothing, the darker the more of them.</li>
<li><b>&times;</b> is a slot that learns "nothing here", marked where most slots learn nothing at all. Without
hatching, every slot without a dot is one.</li>
</ul>"""


def _levels(comparison: Comparison) -> str:
    order, priors = level_order(comparison.priors), comparison.priors
    strides = {rank: priors.stride[grid.start].max().item() for rank, grid in zip(order.tolist(), priors.grids)}
    return ", ".join(f"{_swatch(level_colour(rank))}stride {strides[rank]:g}" for rank in sorted(strides))


def _picture(comparison: Comparison, drawn: Mapping[str, np.ndarray], about: Mapping[str, str], number: int) -> str:
    figures = [
        f"<figure>{_image(image)}<figcaption><b>{escape(name)}</b> &nbsp;{caption(comparison, name, number)}"
        f"<br><span class=quiet>{escape(about[name])}</span></figcaption></figure>"
        for name, image in drawn.items()
    ]
    return f"<h2>Picture {number + 1}</h2><div class=grid>{''.join(figures)}</div>"


def _numbers(comparison: Comparison) -> str:
    rows = []
    for name in comparison.names:
        counts, sizes, alone = comparison.per_object(name), comparison.per_size(name), comparison.alone(name)
        cells = [
            f"{counts.sum()}",
            f"{counts.mean():.1f} <span class=quiet>({counts.min()} to {counts.max()})</span>" if len(counts) else "-",
            *("-" if np.isnan(mean) else f"{mean:.1f}" for mean in sizes.values()),
            "-" if np.isnan(alone) else f"<span class={'bad' if alone else 'quiet'}>{alone:.0%}</span>",
            f"{comparison.ignored(name):.0%}",
            _bar(_by_rank(comparison, name), [level_colour(rank) for rank in range(len(comparison.priors.grids))]),
        ]
        rows.append(_row("td", [escape(name), *cells]))
    head = ["assigner", "positives", "per object (least to most)", *SIZES, "nobody<br>answers", "slots<br>ignored"]
    return f"""<h2>How many answer, and where</h2>
<p>Over all pictures above. Per object, then for small (below 32&sup2; pixels of the input), medium and large (96&sup2;)
objects. The bar divides the positives among the levels: {_levels(comparison)}.</p>
<table><thead>{_row("th", [*head, "share of each level"])}</thead>{"".join(rows)}</table>"""


def _by_rank(comparison: Comparison, name: str) -> np.ndarray:
    """Shares of the positives by level, the finest first."""
    counts = comparison.per_level(name)[np.argsort(level_order(comparison.priors))]
    return counts / max(counts.sum(), 1)


def _agreement(comparison: Comparison) -> str:
    rows = []
    for name, values in zip(comparison.names, comparison.agreement()):
        cells = [f"<td style='background:rgba(0,114,218,{0.75 * value:.2f})'>{value:.0%}</td>" for value in values]
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    return f"""<h2>How far they agree</h2>
<p>Of the pairs of slot and object that either of two assigners has, the share that both have.</p>
<table><thead>{_row("th", ["", *map(escape, comparison.names)])}</thead>{"".join(rows)}</table>"""


def _losses(shares: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    terms = list(dict.fromkeys(term for mine in shares.values() for term in mine))
    num_objects = max((len(values) - 1 for mine in shares.values() for values in mine.values()), default=0)
    colours = [PALETTE[number % len(PALETTE)] for number in range(num_objects)] + [(205, 208, 214)]
    rows = [
        _row("td", [escape(name), *(_bar(mine[term], colours) if term in mine else "-" for term in terms)])
        for name, mine in shares.items()
    ]
    key = "".join(f"{_swatch(colour)}{number + 1}" for number, colour in enumerate(colours[:-1]))
    return f"""<h2>Whose error the loss is</h2>
<p>Of picture 1, with the loss that each assigner is published with: through the slots of which object each term pulls
at the network (share of the absolute gradient). Objects by their number in the picture, grey for all slots that answer
for nobody. An empty bar is a term without gradient.</p>
<div class=key>{key}{_swatch(colours[-1])}nobody</div>
<table><thead>{_row("th", ["assigner", *map(escape, terms)])}</thead>{"".join(rows)}</table>"""


def _refused(refused: Mapping[str, str]) -> str:
    if not refused:
        return ""
    rows = "".join(f"<li><b>{escape(name)}</b>: {escape(reason)}</li>" for name, reason in refused.items())
    return f"<h2>Not possible on this network</h2><ul>{rows}</ul>"


def _row(cell: str, values: list[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{value}</{cell}>" for value in values) + "</tr>"


def _bar(shares: np.ndarray, colours: list[tuple[int, int, int]]) -> str:
    parts = [
        f"<i style='width:{100 * share:.2f}%;background:{_css(colour)}' title='{share:.0%}'></i>"
        for share, colour in zip(shares.tolist(), colours)
    ]
    return f"<div class=bar>{''.join(parts)}</div>"


def _swatch(colour: tuple[int, int, int]) -> str:
    return f"<span class=swatch style='background:{_css(colour)}'></span>"


def _css(colour: tuple[int, int, int]) -> str:
    return f"rgb({colour[0]},{colour[1]},{colour[2]})"


def _image(image: np.ndarray) -> str:
    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), SHARP)
    assert encoded, "OpenCV encodes JPEG"
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(data).decode()}'>"

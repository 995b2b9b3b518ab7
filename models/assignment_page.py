"""The page that shows a comparison of assigners: one HTML file, pictures inside, nothing fetched from anywhere.

Letters: S assigners, L levels, n objects of a picture.
"""

from collections.abc import Mapping
from html import escape

import numpy as np

from models.assignment_pictures import caption, level_order
from models.compare_assigners import SIZES, Comparison
from utils.draw import PALETTE
from utils.draw_assignment import level_colour
from utils.page import bar, picture, row, swatch, whole_page


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
    return whole_page(title, sections)


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
    return ", ".join(f"{swatch(level_colour(rank))}stride {strides[rank]:g}" for rank in sorted(strides))


def _picture(comparison: Comparison, drawn: Mapping[str, np.ndarray], about: Mapping[str, str], number: int) -> str:
    figures = [
        f"<figure>{picture(image)}<figcaption><b>{escape(name)}</b> &nbsp;{caption(comparison, name, number)}"
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
            bar(_by_rank(comparison, name), [level_colour(rank) for rank in range(len(comparison.priors.grids))]),
        ]
        rows.append(row("td", [escape(name), *cells]))
    head = ["assigner", "positives", "per object (least to most)", *SIZES, "nobody<br>answers", "slots<br>ignored"]
    return f"""<h2>How many answer, and where</h2>
<p>Over all pictures above. Per object, then for small (below 32&sup2; pixels of the input), medium and large (96&sup2;)
objects. The bar divides the positives among the levels: {_levels(comparison)}.</p>
<table><thead>{row("th", [*head, "share of each level"])}</thead>{"".join(rows)}</table>"""


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
<table><thead>{row("th", ["", *map(escape, comparison.names)])}</thead>{"".join(rows)}</table>"""


def _losses(shares: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    terms = list(dict.fromkeys(term for mine in shares.values() for term in mine))
    num_objects = max((len(values) - 1 for mine in shares.values() for values in mine.values()), default=0)
    colours = [PALETTE[number % len(PALETTE)] for number in range(num_objects)] + [(205, 208, 214)]
    rows = [
        row("td", [escape(name), *(bar(mine[term], colours) if term in mine else "-" for term in terms)])
        for name, mine in shares.items()
    ]
    key = "".join(f"{swatch(colour)}{number + 1}" for number, colour in enumerate(colours[:-1]))
    return f"""<h2>Whose error the loss is</h2>
<p>Of picture 1, with the loss that each assigner is published with: through the slots of which object each term pulls
at the network (share of the absolute gradient). Objects by their number in the picture, grey for all slots that answer
for nobody. An empty bar is a term without gradient.</p>
<div class=key>{key}{swatch(colours[-1])}nobody</div>
<table><thead>{row("th", ["assigner", *map(escape, terms)])}</thead>{"".join(rows)}</table>"""


def _refused(refused: Mapping[str, str]) -> str:
    if not refused:
        return ""
    rows = "".join(f"<li><b>{escape(name)}</b>: {escape(reason)}</li>" for name, reason in refused.items())
    return f"<h2>Not possible on this network</h2><ul>{rows}</ul>"

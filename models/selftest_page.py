"""The page of a self-test: the verdict, each question with its answer, and pictures to look at."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape

import cv2
import numpy as np
import torch
from torch import Tensor

from models.learn_by_heart import Story
from models.selftest_checks import BAD, GOOD, UNSURE, WORDS, Check
from utils.chart import Chart
from utils.draw import draw_boxes, draw_detections
from utils.page import picture, row, swatch, whole_page
from utils.structures import Batch, Detections

COLOURS = {GOOD: (46, 160, 67), UNSURE: (224, 148, 0), BAD: (214, 30, 30)}
BLUE = (29, 118, 210)
READABLE = 640  # pixels that a picture may be wide
STYLE = """
.verdict { font-size: 1.25em; padding: .8em 1.1em; border-left: 6px solid; background: #f7f8fa; }
.wide img { width: 100%; border: 1px solid #ccc; }
"""


def page(checks: Sequence[Check], verdict: str, story: Story | None, names: list[str], *, notes: Sequence[str]) -> str:
    """The HTML text.

    Args:
        story: of the pictures that were to be learned by heart, if it came to that.
        notes: sentences about the network and the data.
    """
    worst = next((state for state in (BAD, UNSURE) if any(check.state == state for check in checks)), GOOD)
    colour = "rgb({},{},{})".format(*COLOURS[worst])
    return whole_page(
        "Self-test",
        [
            f"<h1>Why is my mAP zero?</h1><p class=quiet>{'<br>'.join(map(escape, notes))}</p>",
            f"<p class=verdict style='border-color:{colour}'>{escape(verdict)}</p>",
            _answers(checks),
            *(_pictures(story, names) if story else ()),
            *map(_table, checks),
        ],
        style=STYLE,
    )


def _answers(checks: Sequence[Check]) -> str:
    rows = []
    for check in checks:
        mark = f"{swatch(COLOURS[check.state])}<b>{WORDS[check.state]}</b>"
        cure = f"<br><span class=quiet>{escape(check.cure)}</span>" if check.cure else ""
        cell = f"<td style='text-align:left;white-space:normal'>{escape(check.answer)}{cure}</td>"
        rows.append(f"<tr><td>{escape(check.question)}</td><td style='text-align:left'>{mark}</td>{cell}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _pictures(story: Story, names: list[str]) -> list[str]:
    figures = []
    for number in range(len(story.batch)):
        mine = story.batch.targets.image == number
        boxes, labels = story.batch.targets.boxes[mine], story.batch.targets.labels[mine]
        image, scale = _enlarged(_image(story.batch, number))
        said = [_best(found[number], len(labels)) for found in (story.before, story.after)]
        before, after = (
            draw_detections(image, replace(found, boxes=found.boxes.cpu() * scale, masks=None), names) for found in said
        )
        drawn = {
            "labels, as the network is given them": draw_boxes(image, boxes * scale, labels, names),
            "what it says as it starts": before,
            "after learning these pictures": after,
        }
        figures += [
            f"<figure>{picture(panel)}<figcaption class=quiet>{escape(text)}</figcaption></figure>"
            for text, panel in drawn.items()
        ]
    columns = "style='grid-template-columns:repeat(3,1fr)'"
    return [
        f"""<h2>The pictures to learn by heart</h2><p>Do the boxes on the left lie on the objects, and are they named
rightly? Of the network's boxes as many are shown as there are labels, the surest ones.</p>
<div class=grid {columns}>{"".join(figures)}</div>""",
        f"<h2>How it learned them</h2><div class=grid>{_learning(story)}</div>",
        f"""<h2>Sizes and places, side by side</h2><p>Of the labels, of the network as it starts, and after learning.
What the network says must come to lie where the labels are.</p><div class=grid {columns}>{_ranges(story)}</div>""",
    ]


def _learning(story: Story) -> str:
    loss = Chart("Loss", "step", width=560, height=330)
    loss.line(np.arange(1, len(story.losses) + 1), story.losses, BLUE)
    score = Chart("mAP50 on these pictures", "step", width=560, height=330, y_range=(0.0, 1.02))
    score.line(*zip((0, 0.0), *story.scores), BLUE)
    return "".join(f"<figure>{picture(chart.render())}</figure>" for chart in (loss, score))


def _ranges(story: Story) -> str:
    """Two rows of three charts with the same axes: sizes, and where the middles are, in pixels of the input."""
    batch = story.batch
    height, width = batch.images.shape[2:]
    counts = [int((batch.targets.image == number).sum()) for number in range(len(batch))]
    sets = {
        "labels": batch.targets.boxes,
        "network as it starts": _joined(story.before, counts),
        "after learning": _joined(story.after, counts),
    }
    charts = []
    for title, x_label, y_label, values in (
        ("sizes", "box width, px", "box height, px", lambda boxes: boxes[:, 2:] - boxes[:, :2]),
        ("places", "middle x, px", "middle y, px", lambda boxes: (boxes[:, 2:] + boxes[:, :2]) / 2),
    ):
        limits = {"x_range": (0.0, float(width)), "y_range": (0.0, float(height))}
        if title == "places":
            limits["y_range"] = (float(height), 0.0)
        for name, boxes in sets.items():
            chart = Chart(f"{title}: {name}", x_label, y_label, width=460, height=380, **limits)
            x, y = (axis.clamp(0, side).numpy() for axis, side in zip(values(boxes).unbind(1), (width, height)))
            chart.dots(x, y, BLUE, thickness=7)
            charts.append(f"<figure>{picture(chart.render())}</figure>")
    return "".join(charts)


def _table(check: Check) -> str:
    if not check.rows:
        return ""
    head, *rows = [list(map(escape, cells)) for cells in check.rows]
    return f"""<h2>{escape(check.question)}</h2><p>{escape(check.answer)}</p>
<table><thead>{row("th", head)}</thead>{"".join(row("td", cells) for cells in rows)}</table>"""


def _best(found: Detections, num: int) -> Detections:
    return found[:num]


def _joined(found: Sequence[Detections], counts: Sequence[int]) -> Tensor:
    """Boxes [n, 4] of the best detections, of each picture as many as it has labels."""
    return torch.cat([_best(one, count).boxes.cpu().float() for one, count in zip(found, counts)])


def _enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """A small picture so large that captions leave room for it, and how many times larger that is."""
    scale = max(1, READABLE // image.shape[1])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC), scale


def _image(batch: Batch, number: int) -> np.ndarray:
    image = batch.images[number].permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))

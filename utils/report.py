"""``report.html``: a run on one page, with everything inside: how it went, how good it is, what it gets wrong."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np

from utils.files import write_text
from utils.metrics import Evaluation
from utils.mistakes import KINDS, Mistakes
from utils.page import picture, picture_file, row, whole_page

NAME = "report.html"
STYLE = """
.tall img { max-width: 100%; border: 1px solid #ddd; } .crops { grid-template-columns: repeat(auto-fill, 190px); }
.crops figcaption { font-size: .85em; line-height: 1.3; overflow-wrap: anywhere; } .numbers td { font-size: 1.25em; }
"""
MOST_CLASSES = 200  # of the table of mistakes: the others have the fewest


def save_report(run: Path, evaluation: Evaluation, mistakes: Mistakes, facts: Mapping[str, object]) -> None:
    """Write the page of a run from its last evaluation and the pictures that lie in its folder already.

    Args:
        mistakes: of the same evaluation.
        facts: what the run was, a line each.
    """
    text = whole_page(
        f"Report: {run.name}",
        [
            f"<h1>{escape(run.name)}</h1>",
            _facts(facts),
            _numbers(evaluation),
            _files(run, "How it went", ["results.png"]),
            _classes(evaluation),
            _files(run, "Precision, recall and confidence", ["PR_curve.png", "F1_curve.png"]),
            _files(run, "Which class is taken for which", ["confusion_matrix.png"]),
            _kinds(mistakes),
            _crops("The surest false detections", FALSE_TEXT, mistakes.false),
            _crops("The largest missed objects", MISSED_TEXT, mistakes.missed),
            _files(
                run, "Validation pictures: labels, and what was found", ["val_batch0_labels.jpg", "val_batch0_pred.jpg"]
            ),
            _files(run, "What it was shown", ["train_batch0.jpg", "labels.png"]),
        ],
        style=STYLE,
    )
    write_text(run / NAME, text)


FALSE_TEXT = """At confidence 0.25 and IoU 0.5: the detection in red, the objects in green. A red box around an object
that has no green one is often a label that was forgotten."""
MISSED_TEXT = "At confidence 0.25 and IoU 0.5: the missed object is the thick box."


def _facts(facts: Mapping[str, object]) -> str:
    lines = [f"{escape(str(name))}: {escape(str(value))}" for name, value in facts.items()]
    return f"<p class=quiet>{'<br>'.join(lines)}</p>"


def _numbers(evaluation: Evaluation) -> str:
    scalars = evaluation.scalars()
    shown = {name: scalars[f"metrics/{name}"] for name in ("mAP50-95", "mAP50", "precision", "recall")}
    if evaluation.segm:
        shown |= {name: scalars[f"metrics/{name}"] for name in ("mask-mAP50-95", "mask-mAP50")}
    return f"""<table class=numbers><thead>{row("th", shown)}</thead>{row("td", map(_number, shown.values()))}</table>
<p class=quiet>{evaluation.num_images} validation pictures with {evaluation.instances.sum()} objects; precision and
recall at confidence {evaluation.confidence:.3f}, where F1 is largest.</p>"""


def _classes(evaluation: Evaluation) -> str:
    columns = [evaluation.precision, evaluation.recall, evaluation.f1, evaluation.ap[0], evaluation.ap.mean(axis=0)]
    head = ["class", "pictures", "objects", "precision", "recall", "F1", "AP50", "AP50-95"]
    rows = []
    for number in np.argsort(-np.nan_to_num(columns[-1], nan=-1), kind="stable"):
        cells = [escape(evaluation.names[number]), evaluation.images[number], evaluation.instances[number]]
        shares = [f"<td style='{_shade(values[number])}'>{_number(values[number])}</td>" for values in columns]
        rows.append(row("td", cells).replace("</tr>", "".join(shares) + "</tr>"))
    return f"<h2>Class by class</h2><table><thead>{row('th', head)}</thead>{''.join(rows)}</table>"


def _kinds(mistakes: Mistakes) -> str:
    """How many of each kind, over all and by class, the class with most mistakes first."""
    names, counts = mistakes.names, mistakes.counts
    totals = [sum(counts[kind, label] for kind in KINDS) for label in range(len(names))]
    order = [label for label in sorted(range(len(names)), key=lambda label: -totals[label]) if totals[label]]
    every = [sum(counts[kind, label] for label in range(len(names))) for kind in KINDS]
    rows = [row("td", ["<b>all</b>", *every])]
    rows += [
        row("td", [escape(names[label]), *(counts[kind, label] for kind in KINDS)]) for label in order[:MOST_CLASSES]
    ]
    meaning = "".join(f"<li><b>{kind}</b>: {text}</li>" for kind, text in KINDS.items())
    return f"""<h2>What it gets wrong</h2><p>At confidence 0.25 and IoU 0.5.</p><ul>{meaning}</ul>
<table><thead>{row("th", ["class", *KINDS])}</thead>{"".join(rows)}</table>"""


def _crops(title: str, text: str, worst: list) -> str:
    if not worst:
        return f"<h2>{title}</h2><p>None.</p>"
    figures = [
        f"<figure>{picture(crop)}<figcaption><b>{escape(mistake.text)}</b><br>{mistake.kind}"
        f"<br><span class=quiet>{escape(Path(path).name)}</span></figcaption></figure>"
        for mistake, path, crop in worst
    ]
    return f"<h2>{title}</h2><p>{text}</p><div class='grid crops'>{''.join(figures)}</div>"


def _files(run: Path, title: str, names: list[str]) -> str:
    """Pictures of the run's folder, those that are there."""
    shown = [f"<p>{picture_file(run / name)}</p>" for name in names if (run / name).is_file()]
    return f"<h2>{title}</h2><div class=tall>{''.join(shown)}</div>" if shown else ""


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def _shade(value: float) -> str:
    return "" if np.isnan(value) else f"background:rgba(46,160,67,{0.45 * value:.2f})"

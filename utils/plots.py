"""The pictures of a run: how it went, how good it is, and what its data looks like. Letters: C classes, S steps."""

import csv
from pathlib import Path

import cv2
import numpy as np

from utils.chart import INK, SOFT, Chart, number_grid, side_by_side
from utils.draw import colour_of
from utils.metrics import Evaluation
from utils.results import write_image
from utils.structures import Record

PLOTTED = ("train/", "val/", "metrics/", "lr")  # columns of results.csv; the others are book-keeping
FEW = 12  # up to this many classes are named in a legend; beyond, single classes are thin grey lines
PALE_LINE = (206, 212, 221)
MOST_CLASSES = 100  # of a confusion matrix; beyond, no name would be legible
MANY_LINES = ((29, 118, 210), (226, 88, 34), (46, 160, 67), (142, 68, 173), (200, 150, 0), (110, 118, 130))


def save_results_png(csv_path: Path, path: Path) -> None:
    """Losses, metrics and learning rates of a run's ``results.csv``; training and validation share a panel."""
    with Path(csv_path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    epochs = np.array([float(row["epoch"]) for row in rows])
    panels: dict[str, list[tuple[str, np.ndarray]]] = {}
    for column in rows[0]:
        values = np.array([_float(row[column]) for row in rows])
        if column.startswith(PLOTTED) and np.isfinite(values).any():
            panel, name = _panel(column)
            panels.setdefault(panel, []).append((name, values))
    images = []
    for title, series in panels.items():
        chart = Chart(
            title, x_label="epoch", width=520, height=340, x_range=(epochs[0], max(epochs[-1], epochs[0] + 1))
        )
        for number, (name, values) in enumerate(series):
            colour = MANY_LINES[number % len(MANY_LINES)]
            chart.line(epochs, values, colour, name=name if len(series) > 1 else "")
            if len(epochs) <= 40:
                chart.dots(epochs, values, colour, thickness=5)
        images.append(chart.render())
    if images:
        write_image(path, side_by_side(images, columns=min(4, int(np.ceil(np.sqrt(len(images)))))))


def _panel(column: str) -> tuple[str, str]:
    """Where a column of results.csv is drawn: (title of the panel, name of the line)."""
    group, _, name = column.rpartition("/")
    if group in ("train", "val"):
        return f"{name} loss".replace("_loss loss", " loss"), group
    if group != "metrics":
        return group or name, name
    if name in ("precision", "recall"):
        return "precision and recall", name
    return (
        "average recall" if name.startswith("AR") else "average precision" if name.startswith("AP") else "mAP"
    ), name


def _float(text: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):  # an empty cell: not every column has a value in every epoch
        return float("nan")


def save_evaluation_plots(evaluation: Evaluation, folder: Path) -> None:
    """``PR_curve.png``, ``F1_curve.png``, ``P_curve.png``, ``R_curve.png``, ``confusion_matrix.png`` in ``folder``."""
    folder, curves = Path(folder), evaluation.curves
    mark = f"best F1 at confidence {evaluation.confidence:.3f}"
    pictures = {
        "PR_curve.png": _curve_chart(
            evaluation, "Precision and recall at IoU 0.5", "recall", "precision",
            curves.recall_points, curves.precision_at_recall, evaluation.ap[0], None,
        ),
        "F1_curve.png": _curve_chart(
            evaluation, mark[0].upper() + mark[1:], "confidence", "F1",
            curves.confidence, curves.f1, evaluation.f1, evaluation.confidence,
        ),
        "P_curve.png": _curve_chart(
            evaluation, "Precision over confidence", "confidence", "precision",
            curves.confidence, curves.precision, evaluation.precision, evaluation.confidence,
        ),
        "R_curve.png": _curve_chart(
            evaluation, "Recall over confidence", "confidence", "recall",
            curves.confidence, curves.recall, evaluation.recall, evaluation.confidence,
        ),
    }  # fmt: skip
    for name, image in pictures.items():
        write_image(folder / name, image)
    write_image(folder / "confusion_matrix.png", _confusion_picture(evaluation))


def _curve_chart(evaluation, title, x_label, y_label, x, curves, values, mark: float | None) -> np.ndarray:
    """One line per class with truth, named with its value, and their mean."""
    chart = Chart(title, x_label, y_label, width=880, height=560, x_range=(0.0, 1.0), y_range=(0.0, 1.02))
    known = [number for number in range(len(curves)) if evaluation.instances[number]]
    if mark is not None:
        chart.line([mark, mark], [0, 1.02], SOFT, thickness=1)
    if known:
        rows = curves[known]
        for number in known if len(known) > 1 else []:
            few = len(known) <= FEW
            name = f"{evaluation.names[number]} {values[number]:.3f}" if few else ""
            chart.line(
                x, curves[number], colour_of(number) if few else PALE_LINE, thickness=1.5 if few else 0.5, name=name
            )
        count = np.isfinite(rows).sum(axis=0)
        mean = np.where(count > 0, np.nansum(rows, axis=0) / np.maximum(count, 1), np.nan)
        name = "all classes" if len(known) > 1 else evaluation.names[known[0]]
        chart.line(x, mean, INK, thickness=3.2, name=f"{name} {np.mean(values[known]):.3f}")
    return chart.render()


def _confusion_picture(evaluation: Evaluation) -> np.ndarray:
    """Shares of each true class, down its column; counts in the cells. Of very many classes the most frequent ones."""
    matrix, num_classes = evaluation.confusion, len(evaluation.names)
    frequency = (matrix.sum(axis=0) + matrix.sum(axis=1))[:num_classes]
    shown = np.sort(np.argsort(-frequency, kind="stable")[:MOST_CLASSES])
    rows = np.append(shown, num_classes)
    shares = (matrix / np.maximum(matrix.sum(axis=0, keepdims=True), 1))[np.ix_(rows, rows)]
    texts = [[str(count) if count else "" for count in row] for row in matrix[np.ix_(rows, rows)].tolist()]
    title = "Confusion (IoU 0.45, confidence 0.25)"
    if num_classes > MOST_CLASSES:
        title += f", {MOST_CLASSES} most frequent of {num_classes} classes"
    return number_grid(
        shares, texts, [*(evaluation.names[number] for number in shown), "background"], title, "true", "predicted"
    )


def save_labels_png(records: list[Record], names: list[str], path: Path) -> None:
    """What a data set holds: boxes per class and picture, where they lie, how large they are; without ignored ones."""
    kept = [~record.ignore for record in records]
    labels = np.concatenate([np.zeros(0, np.int64), *(record.labels[rows] for record, rows in zip(records, kept))])
    boxes = [record.boxes[rows] / np.array(record.size[::-1] * 2) for record, rows in zip(records, kept)]
    boxes = np.concatenate([np.zeros((0, 4)), *boxes])
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]

    counts = np.bincount(labels, minlength=len(names))
    classes = Chart(
        f"{len(labels)} boxes of {len(names)} classes", "", "boxes", width=640, height=460, categories=list(names)
    )
    classes.bars(np.arange(len(names)), counts, [colour_of(number) for number in range(len(names))])
    per_image = np.bincount([rows.sum() for rows in kept]) if records else np.zeros(1)
    images = Chart(f"{len(records)} pictures", "boxes in a picture", "pictures", width=640, height=460)
    images.x_range = (-0.6, max(len(per_image) - 0.4, 0.6))
    images.bars(np.arange(len(per_image)), per_image, [MANY_LINES[0]] * len(per_image))
    where = Chart("Where the boxes lie", "centre x / width", "centre y / height", width=640, height=460)
    where.x_range, where.y_range = (0.0, 1.0), (1.0, 0.0)
    where.density(_density(centres[:, 0], centres[:, 1]))
    large = Chart("How large they are", "box width / width", "box height / height", width=640, height=460)
    large.x_range = large.y_range = (0.0, 1.0)
    large.density(_density(sizes[:, 0], sizes[:, 1]))
    write_image(path, side_by_side([chart.render() for chart in (classes, images, where, large)], columns=2))


def _density(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Counts on a 50 x 50 grid, lightly blurred, compressed so that single boxes stay visible."""
    counts, _, _ = np.histogram2d(y, x, bins=50, range=[[0, 1], [0, 1]])
    return np.sqrt(cv2.GaussianBlur(counts, (0, 0), 0.8))

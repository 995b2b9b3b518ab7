"""Plots: every file appears and can be read, whatever a run has or lacks; the chart puts ink where the numbers are."""

import cv2
import numpy as np
import pytest
import torch

from utils.chart import Chart, number_grid, ticks
from utils.metrics import DetectionMetrics
from utils.plots import save_evaluation_plots, save_labels_png, save_results_png
from utils.structures import Detections, Record

RED = (200, 0, 0)


def make_record(num: int, num_classes: int) -> Record:
    corner = np.linspace(10, 200, num)[:, None].repeat(2, axis=1)
    boxes = np.hstack([corner, corner + 40]).astype(np.float32)
    return Record(
        path="a.jpg",
        size=(300, 400),
        boxes=boxes,
        labels=np.arange(num) % max(num_classes, 1),
        ignore=np.zeros(num, bool),
        crowd=np.zeros(num, bool),
        area=np.full(num, 1600, np.float32),
    )


def evaluation(num: int, num_classes: int):
    metrics = DetectionMetrics([f"kind {n}" for n in range(num_classes)])
    record = make_record(num, num_classes)
    found = Detections(
        boxes=torch.from_numpy(record.boxes),
        scores=torch.linspace(0.9, 0.2, num),
        labels=torch.from_numpy(record.labels),
    )
    metrics.update(found, record)
    return metrics.compute()


def read(path) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None and min(image.shape[:2]) > 200
    return image


@pytest.mark.parametrize("num, num_classes", [(0, 2), (1, 1), (6, 3), (20, 15), (4, 130)])
def test_evaluation_plots(tmp_path, num, num_classes):
    save_evaluation_plots(evaluation(num, num_classes), tmp_path)
    names = {"PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png", "confusion_matrix.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        assert max(read(tmp_path / name).shape) < 2000


@pytest.mark.parametrize("num, num_classes", [(0, 2), (1, 1), (50, 100)])
def test_labels_png(tmp_path, num, num_classes):
    save_labels_png(
        [make_record(num, num_classes)] * 2, [f"kind {n}" for n in range(num_classes)], tmp_path / "labels.png"
    )
    read(tmp_path / "labels.png")


def test_labels_png_of_nothing(tmp_path):
    save_labels_png([], ["a"], tmp_path / "labels.png")
    read(tmp_path / "labels.png")


@pytest.mark.parametrize(
    "rows",
    [
        "epoch,train/box,val/box,lr\n0,1,2,0.1\n1,nan,1.5,0.1\n2,0.5,,0.1\n",
        "epoch,train/box\n0,1.0\n",
        "epoch,train/box,metrics/mAP50\n0,inf,\n1,0.001,\n",
        "epoch,lr\n" + "".join(f"{n},0.01\n" for n in range(300)),
    ],
)
def test_results_png(tmp_path, rows):
    (tmp_path / "results.csv").write_text(rows)
    save_results_png(tmp_path / "results.csv", tmp_path / "results.png")
    read(tmp_path / "results.png")


def test_results_of_no_epoch_make_no_picture(tmp_path):
    (tmp_path / "results.csv").write_text("epoch,train/box\n")
    save_results_png(tmp_path / "results.csv", tmp_path / "results.png")
    assert not (tmp_path / "results.png").exists()


def test_a_line_runs_through_its_points():
    chart = Chart("t", width=400, height=300, x_range=(0, 10), y_range=(0, 1))
    chart.line([0, 10], [0.5, 0.5], RED, thickness=3)
    image = chart.render()
    red = np.argwhere((np.abs(image.astype(int) - RED) < 30).all(axis=2))
    left, top, right, bottom = chart._box
    assert red[:, 1].min() <= left + 3 and red[:, 1].max() >= right - 3
    assert abs(red[:, 0].mean() - (top + bottom) / 2) < 1.5


def test_a_line_breaks_where_a_number_is_missing():
    chart = Chart("t", width=400, height=300, x_range=(0, 4), y_range=(0, 1))
    chart.line([0, 1, 2, 3, 4], [0.5, 0.5, np.nan, 0.5, 0.5], RED, thickness=3)
    middle = round(chart_middle(chart))
    assert not (chart.render()[:, middle - 5 : middle + 5] == RED).all(axis=2).any()


def chart_middle(chart: Chart) -> float:
    chart.render()
    return (chart._box[0] + chart._box[2]) / 2


@pytest.mark.parametrize(
    "bounds, most, smallest, expected",
    [
        ((0, 1), 5, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ((0, 3), 8, 1, [0, 1, 2, 3]),
        ((0.2, 14), 5, 1, [5, 10]),
        ((1, 0), 2, 0, [0, 0.5, 1]),
        ((-0.1, 0.1), 4, 0, [-0.1, -0.05, 0, 0.05, 0.1]),
    ],
)
def test_ticks_are_round(bounds, most, smallest, expected):
    assert ticks(bounds, most, smallest) == pytest.approx(expected)


def test_number_grid_shades_by_share():
    image = number_grid(np.array([[1.0, 0.0], [0.0, 0.5]]), [["", ""], ["", ""]], ["a", "b"], "t", "x", "y")
    dark = np.argwhere(image.sum(axis=2) < 200)
    assert len(dark) > 90 * 80, "one full cell is dark"

"""A run's report: every kind of mistake is told from the others, the worst are kept, and the page holds everything."""

from collections import Counter

import numpy as np
import pytest
import torch

from utils.metrics import DetectionMetrics
from utils.mistakes import DOUBLED, KEPT, MISNAMED, MISPLACED, MISSED, NOTHING, SIDE, Mistakes, judge
from utils.report import save_report
from utils.results import write_image
from utils.structures import Batch, Detections, ImageInfo, Letterbox, Record, Targets

NAMES = ["cat", "<dog>"]


def record(boxes, labels, ignore=None) -> Record:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    ignore = np.array([False] * len(labels) if ignore is None else ignore, bool)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return Record(
        path="a/picture.jpg", size=(100, 200), boxes=boxes, labels=np.array(labels, np.int64), ignore=ignore,
        crowd=ignore, area=area, image_id=1,
    )  # fmt: skip


def found(*rows) -> Detections:
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(boxes=table[:, :4], scores=table[:, 4], labels=table[:, 5].long())


CAT, DOG = [10, 10, 50, 50], [100, 20, 160, 80]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(*CAT, 0.9, 0), (*DOG, 0.8, 1)], []),
        ([(*CAT, 0.9, 0)], [(MISSED, "<dog>: not seen")]),
        ([(*CAT, 0.9, 0), (*DOG, 0.2, 1)], [(MISSED, "<dog>: seen as <dog> 0.20")]),
        ([(*CAT, 0.9, 0), (*DOG, 0.7, 0)], [(MISNAMED, "cat 0.70, is <dog>"), (MISSED, "<dog>: seen as cat 0.70")]),
        ([(*CAT, 0.9, 0), (*CAT, 0.8, 0), (*DOG, 0.8, 1)], [(DOUBLED, "cat 0.80")]),
        (
            [(*CAT, 0.9, 0), (100, 20, 120, 80, 0.8, 1)],
            [(MISPLACED, "<dog> 0.80, IoU 0.33"), (MISSED, "<dog>: not seen")],
        ),
        ([(*CAT, 0.9, 0), (*DOG, 0.8, 1), (0, 60, 30, 99, 0.6, 0)], [(NOTHING, "cat 0.60")]),
        ([(*CAT, 0.9, 0), (*DOG, 0.8, 1), (0, 60, 30, 99, 0.24, 0)], []),  # below the confidence
    ],
)
def test_kinds_of_mistakes(rows, expected):
    mistakes = list(judge(found(*rows), record([CAT, DOG], [0, 1]), NAMES))
    assert [(mistake.kind, mistake.text) for mistake in mistakes] == expected


def test_an_ignored_region_is_neither_right_nor_wrong():
    truth = record([[0, 0, 100, 100]], [0], ignore=[True])
    assert not list(judge(found((5, 5, 30, 30, 0.9, 1), (0, 0, 100, 100, 0.8, 0)), truth, NAMES))
    assert [mistake.kind for mistake in judge(found((90, 5, 140, 30, 0.9, 1)), truth, NAMES)] == [NOTHING]


def test_pictures_without_objects_or_detections():
    assert not list(judge(found(), record([], []), NAMES))
    assert [mistake.kind for mistake in judge(found((*CAT, 0.9, 0)), record([], []), NAMES)] == [NOTHING]
    (missed,) = judge(found(), record([CAT], [0]), NAMES)
    assert missed.kind == MISSED and missed.weight == pytest.approx(1600 / 20000)


def test_counts_agree_with_a_slow_count(monkeypatch):
    """Found, missed and false add up: objects = right + missed, detections = right + false."""
    draw = np.random.default_rng(3)
    for _ in range(30):
        corner = draw.uniform(0, 60, (8, 2))
        truth = record(np.concatenate([corner, corner + draw.uniform(20, 40, (8, 2))], axis=1), draw.integers(0, 2, 8))
        moved = truth.boxes + draw.normal(0, 6, (8, 4))
        rows = [(*box, score, label) for box, score, label in zip(moved, draw.random(8), draw.integers(0, 2, 8))]
        detections = found(*sorted(rows, key=lambda row: -row[4]))
        counts = Counter(mistake.kind for mistake in judge(detections, truth, NAMES))
        num_sure = int((detections.scores >= 0.25).sum())
        assert 8 - counts[MISSED] == num_sure - (sum(counts.values()) - counts[MISSED])


def batch_of(num: int) -> Batch:
    info = ImageInfo(id=0, path="a/pic<ture>.jpg", size=(100, 200), letterbox=Letterbox(scale=(0.5, 0.5), pad=(0, 7)))
    images = torch.full((num, 3, 64, 100), 90, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(images=images, targets=Targets.of(none, none, torch.zeros(0, 4)), infos=(info,) * num)


def test_the_worst_are_kept_with_a_crop_of_the_place():
    mistakes = Mistakes([record([], [])], NAMES)
    for score in np.linspace(0.3, 0.9, 2 * KEPT):
        mistakes.update(batch_of(1), [found((100, 20, 160, 80, score, 0))])
    assert mistakes.counts == {(NOTHING, 0): 2 * KEPT} and len(mistakes.false) == KEPT and not mistakes.missed
    weights = [entry[0].weight for entry in mistakes.false]
    assert weights == sorted(weights, reverse=True) and weights[0] == pytest.approx(0.9)
    crop = mistakes.false[0][2]
    assert crop.shape == (SIDE, SIDE, 3)
    red = np.argwhere((crop == (230, 40, 40)).all(axis=2))
    centre, extent = red.mean(axis=0), np.ptp(red, axis=0)
    assert np.abs(centre - SIDE / 2).max() < 2 and np.abs(extent - SIDE / 2.2).max() < 6  # 60 % around it, both sides


def test_the_page_is_whole_and_escaped(tmp_path):
    truth, detections = record([CAT, DOG], [0, 1]), found((*CAT, 0.9, 0), (0, 60, 30, 99, 0.6, 1))
    mistakes, metrics = Mistakes([truth], NAMES), DetectionMetrics(NAMES)
    mistakes.update(batch_of(1), [detections])
    metrics.update(detections, truth)
    write_image(tmp_path / "results.png", np.zeros((8, 8, 3), np.uint8))
    write_image(tmp_path / "val_batch0_pred.jpg", np.zeros((8, 8, 3), np.uint8))
    save_report(tmp_path, metrics.compute(), mistakes, {"data": "<script>"})
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 4 and page.count("data:image/png") == 1
    assert "<script>" not in page and "<dog>" not in page and "pic<ture>" not in page and "http" not in page
    assert "&lt;dog&gt; 0.60" in page and "&lt;dog&gt;: not seen" in page and page.rstrip().endswith("</html>")


def test_a_run_without_any_object_or_mistake(tmp_path):
    mistakes, metrics = Mistakes([], NAMES), DetectionMetrics(NAMES)
    save_report(tmp_path, metrics.compute(), mistakes, {})
    assert (tmp_path / "report.html").read_text().count("None.") == 2

"""The evaluator against recorded and known answers, and against itself under changes that must not matter.

``tests/faults/test_evaluation.py`` compares it with pycocotools on a thousand random sets.
"""

import json

import numpy as np
import pytest
import torch
from detection_sets import (
    NUMBERS,
    assert_equal_to_pycocotools,
    make_detections,
    make_record,
    measure,
    random_set,
)

from utils.metrics import RANK_RULES
from utils.metrics.flat import flatten, overlapping_pairs, paired_overlap
from utils.metrics.ranked import evaluate_ranked
from utils.structures import Detections


def test_more_than_100_detections_of_one_class():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 300, (30, 2)).repeat(2, axis=0).reshape(30, 4) + [0, 0, 40, 40]
    boxes[:, :2] = boxes[:, 2:] - rng.uniform(20, 60, (30, 2))
    guesses = boxes[rng.integers(0, 30, 260)] + rng.normal(0, 4, (260, 4))
    record = make_record(boxes, np.zeros(30))
    found = make_detections(guesses, rng.random(260), np.zeros(260))
    assert_equal_to_pycocotools([found], [record], 1)


def test_reference_coco(data_dir):
    folder = data_dir / "map-reference"
    truth, results = (
        json.loads((folder / "coco/gts.json").read_text()),
        json.loads((folder / "coco/dets.json").read_text())["annotations"],
    )
    categories = sorted(category["id"] for category in truth["categories"])
    found, records = [], []
    for image in truth["images"]:
        rows = [row for row in truth["annotations"] if row["image_id"] == image["id"]]
        guesses = [row for row in results if row["image_id"] == image["id"]]
        records.append(
            make_record(to_corners(rows), [categories.index(row["category_id"]) for row in rows], image_id=image["id"],
                        crowd=[row["iscrowd"] for row in rows], area=[row["area"] for row in rows])
        )  # fmt: skip
        labels = [categories.index(row["category_id"]) for row in guesses]
        found.append(make_detections(to_corners(guesses), [row["score"] for row in guesses], labels))
    result = measure(found, records, len(categories))
    expected = json.loads((folder / "expected.json").read_text())["coco"]
    long = {"s": "small", "m": "medium", "l": "large"}
    for name in NUMBERS:
        reference = expected[name[:2] + long[name[2:]] if name[2:] in long else name]
        assert result.coco[name] == pytest.approx(reference, abs=1e-6), name


def to_corners(rows: list[dict]) -> np.ndarray:
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


@pytest.mark.parametrize("rule, points", [("voc07", "eleven_point"), ("voc12", "every_point")])
def test_reference_voc(data_dir, rule, points):
    folder = data_dir / "map-reference"
    found, records = [], []
    for number, file in enumerate(sorted((folder / "voc-case-1/gts").glob("*.txt"))):
        truth, guesses = (np.array([line.split()[1:] for line in path.read_text().splitlines()], float)
                          for path in (file, folder / "voc-case-1/dets" / file.name))  # fmt: skip
        truth[:, 2:] += truth[:, :2] + 1  # inclusive pixels there, edges here
        guesses[:, 3:] += guesses[:, 1:3] + 1
        records.append(make_record(truth, np.zeros(len(truth)), image_id=number))
        found.append(make_detections(guesses[:, 1:], guesses[:, 0], np.zeros(len(guesses))))
    flat, truths, _ = flatten(list(zip(found, records)))
    expected = json.loads((folder / "expected.json").read_text())["voc-case-1"]["iou_to_AP"][points]
    for threshold, value in expected.items():
        ap = evaluate_ranked(flat, truths, 1, RANK_RULES[rule], iou_threshold=float(threshold)).mean
        assert ap == pytest.approx(value, abs=1e-9), threshold


# ---- small cases worked out by hand ----------------------------------------------------------------------------------

ONE = [[10, 10, 50, 50]]
TWO = [[10, 10, 50, 50], [100, 100, 150, 150]]


def test_one_of_two_objects_found():
    """A peer reports AP 1.0 here: recall that stops at one half must cost."""
    result = measure([make_detections(ONE, [0.9], [0])], [make_record(TWO, [0, 0])], 1)
    assert result.map50 == pytest.approx(51 / 101)
    assert result.recall[0] == 0.5 and result.precision[0] == 1.0


def test_nothing_found_is_zero_and_nothing_to_find_is_not_applicable():
    empty, record = make_detections(), make_record(TWO, [0, 0])
    result = measure([empty], [record], 2)
    assert result.map == 0 and result.coco["AR100"] == 0 and result.scalars()["metrics/mAP50"] == 0
    assert np.isnan(result.ap[:, 1]).all()
    result = measure([make_detections(ONE, [0.9], [1])], [make_record()], 2)
    assert np.isnan(result.map) and all(np.isnan(value) for value in result.coco.values())
    assert "n/a" in result.table() and "class 1 1" in result.table()
    assert np.isnan(measure([], [], 2).map)
    assert measure([empty], [record], 2, "voc12").ranked.mean == 0


def test_class_without_truth_does_not_lower_the_mean():
    found, record = make_detections(ONE + ONE, [0.9, 0.8], [0, 1]), make_record(ONE, [0])
    result = measure([found], [record], 2, "darknet0")
    assert result.map == pytest.approx(1.0)
    assert result.ranked.mean == pytest.approx(0.5), "Darknet divides by all classes"
    assert "detections of classes without truth here: class 1 1" in result.table()


def test_numbers_that_are_none_are_dropped_and_counted():
    bad = [[float("nan"), 10, 50, 50], [10, 10, float("inf"), 50], [10, 10, 50, 50], [50, 50, 10, 10]]
    found = make_detections(bad, [0.9, 0.9, float("nan"), 0.9], [0, 0, 0, 0])
    result = measure([found], [make_record(ONE, [0])], 1)
    assert result.num_invalid == 4 and result.map == 0
    assert "dropped 4 detections" in result.table()


def test_crowd_swallows_detections_and_costs_nothing():
    crowd = make_record([[0, 0, 200, 200], [300, 300, 340, 340]], [0, 0], crowd=[True, False])
    inside = [[x, 20, x + 20, 40] for x in (10, 40, 70)]
    found = make_detections([*inside, [300, 300, 340, 340]], [0.9, 0.9, 0.9, 0.5], [0, 0, 0, 0])
    result = measure([found], [crowd], 1)
    assert result.map == pytest.approx(1.0) and result.instances.sum() == 1
    assert result.confusion.tolist() == [[1, 0], [0, 0]]


def test_voc_difficult_is_neither_right_nor_wrong():
    record = make_record(TWO, [0, 0], ignore=[True, False])
    found = make_detections([TWO[0], TWO[0], TWO[1]], [0.9, 0.8, 0.7], [0, 0, 0])
    for rule in ("voc07", "voc12"):
        assert measure([found], [record], 1, rule).ranked.mean == pytest.approx(1.0)
    # a second detection of a found object is wrong, though it overlaps another one enough
    near = [[10, 10, 50, 50], [10, 18, 50, 58]]
    found = make_detections([near[0], [10, 11, 50, 51]], [0.9, 0.8], [0, 0])
    assert measure([found], [make_record(near, [0, 0])], 1, "voc12").ranked.mean == pytest.approx(0.5)
    assert measure([found], [make_record(near, [0, 0])], 1).coco["AP50"] == pytest.approx(1.0), "COCO gives it the next"


def test_darknet_counts():
    """IoU of exactly 0.5 is not enough, confidence of exactly 0.25 neither."""
    record = make_record([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 0])
    found = make_detections([[0, 0, 10, 5], [20, 0, 30, 8], [20, 0, 30, 10]], [0.9, 0.5, 0.25], [0, 0, 0])
    ranked = measure([found], [record], 1, "darknet0").ranked
    assert (ranked.tp.item(), ranked.fp.item(), ranked.fn.item()) == (1, 1, 1)
    assert ranked.mean_iou == pytest.approx(0.8 / 2)
    assert ranked.mean == pytest.approx(0.5 * 0.5)
    assert measure([found], [record], 1, "voc12").ranked.mean == pytest.approx(1.0)
    assert (ranked.precision, ranked.recall, ranked.f1) == (0.5, 0.5, 0.5)


def area_by_loop(hits: list[bool], num_truths: int) -> float:
    """Area under the envelope, one step after the other."""
    precision = [sum(hits[: n + 1]) / (n + 1) for n in range(len(hits))]
    return sum(max(precision[n:]) for n, hit in enumerate(hits) if hit) / num_truths


def test_area_equals_the_slow_loop():
    rng = np.random.default_rng(1)
    for _ in range(20):
        truth = [[40 * n, 0, 40 * n + 30, 30] for n in range(8)]
        hits = rng.random(12) < 0.5
        hits[np.flatnonzero(hits)[8:]] = False
        spots = iter(truth)
        boxes = [next(spots) if hit else [0, 100, 30, 130] for hit in hits]
        found = make_detections(boxes, np.linspace(0.9, 0.3, 12), np.zeros(12))
        result = measure([found], [make_record(truth, np.zeros(8))], 1, "voc12")
        assert result.ranked.mean == pytest.approx(area_by_loop(hits.tolist(), 8))


def test_confusion_by_hand():
    record = make_record([[0, 0, 40, 40], [100, 0, 140, 40], [200, 0, 240, 40], [0, 100, 40, 140]], [0, 1, 1, 2])
    found = make_detections(
        [[0, 0, 40, 40], [100, 0, 140, 40], [100, 2, 140, 42], [300, 300, 340, 340], [200, 0, 240, 40]],
        [0.9, 0.8, 0.7, 0.6, 0.2],
        [0, 2, 1, 1, 1],
    )
    matrix = measure([found], [record], 3).confusion
    expected = np.zeros((4, 4), int)
    expected[0, 0] = 1  # right
    expected[2, 1] = 1  # a 1 taken for a 2: the better overlap wins over the right class
    expected[1, 3] = 2  # the duplicate and the one in the void
    expected[3, 1] = expected[3, 2] = 1  # below the confidence; missed
    assert matrix.tolist() == expected.tolist()


def test_confusion_gives_the_next_truth_where_the_favourite_is_gone():
    record = make_record([[0, 0, 100, 100], [0, 20, 100, 120]], [0, 1])
    found = make_detections([[0, 0, 100, 100], [0, 8, 100, 108]], [0.9, 0.8], [0, 1])
    assert measure([found], [record], 2).confusion[:2, :2].tolist() == [[1, 0], [0, 1]]


def test_curves_by_hand():
    boxes = [[40 * n, 0, 40 * n + 30, 30] for n in range(4)]
    found = make_detections([boxes[0], boxes[1], [0, 200, 30, 230], boxes[2]], [0.9, 0.7, 0.5, 0.3], [0, 0, 0, 0])
    result = measure([found], [make_record(boxes, np.zeros(4))], 1)
    curves = result.curves
    for confidence, precision, recall in ((0.8, 1, 0.25), (0.6, 1, 0.5), (0.4, 2 / 3, 0.5), (0.1, 0.75, 0.75)):
        step = np.searchsorted(curves.confidence, confidence)
        assert curves.precision[0, step] == pytest.approx(precision)
        assert curves.recall[0, step] == pytest.approx(recall)
        assert curves.f1[0, step] == pytest.approx(2 * precision * recall / (precision + recall))
    assert np.isnan(curves.precision[0, -1]) and curves.recall[0, -1] == 0
    assert 0.1 < result.confidence < 0.2, "the middle of the best plateau"
    assert (result.precision[0], result.recall[0]) == (0.75, 0.75)


# ---- changes that must not matter ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_order_of_pictures_and_names_of_classes_do_not_matter(seed):
    found, records, num_classes = random_set(seed)
    before = measure(found, records, num_classes, "voc12")
    rng = np.random.default_rng(seed)
    order, names = rng.permutation(len(found)), rng.permutation(num_classes)
    renamed = [make_detections(d.boxes, d.scores, names[d.labels.numpy()]) for d in found]
    relabelled = [
        make_record(r.boxes, names[r.labels], crowd=r.crowd, area=r.area, image_id=r.image_id) for r in records
    ]
    after = measure([renamed[n] for n in order], [relabelled[n] for n in order], num_classes, "voc12")
    np.testing.assert_allclose(list(after.coco.values()), list(before.coco.values()), atol=1e-12)
    np.testing.assert_allclose(after.ap[:, names], before.ap, atol=1e-12)
    np.testing.assert_allclose(after.ranked.ap[names], before.ranked.ap, atol=1e-12)
    moved = np.append(names, num_classes)
    assert (after.confusion[np.ix_(moved, moved)] == before.confusion).all()


@pytest.mark.parametrize("seed", range(100, 105))
def test_a_false_detection_never_raises(seed):
    found, records, num_classes = random_set(seed)
    before = measure(found, records, num_classes).ap
    far_away = make_detections([[5000, 5000, 5050, 5050]] * num_classes, [0.95] * num_classes, range(num_classes))
    parts = {k: torch.cat([getattr(far_away, k), getattr(found[0], k)]) for k in ("boxes", "scores", "labels")}
    after = measure([Detections(**parts), *found[1:]], records, num_classes).ap
    assert (np.nan_to_num(after) <= np.nan_to_num(before) + 1e-12).all()
    assert np.isnan(before).any() or (after < before).any() or not before.any()


def test_pairs_equal_the_double_loop_also_in_blocks(monkeypatch):
    monkeypatch.setattr("utils.metrics.flat.PAIRS_AT_ONCE", 7)
    for seed in range(5):
        flat, truths, _ = flatten(list(zip(*random_set(seed)[:2])))
        found = {(i, k): o for i, k, o in zip(*overlapping_pairs(flat, truths, flat.image, truths.image, 0.3))}
        expected = {}
        for i in range(len(flat)):
            for k in range(len(truths)):
                overlap = paired_overlap(flat.boxes[[i]], truths.boxes[[k]], truths.crowd[[k]])[0]
                if flat.image[i] == truths.image[k] and overlap >= 0.3:
                    expected[i, k] = overlap
        assert found == expected


def test_table_is_aligned_and_scalars_are_named():
    found, record = make_detections(TWO, [0.9, 0.8], [0, 1]), make_record(TWO, [0, 0])
    result = measure([found], [record], 2, "voc07")
    lines = result.table(verbose=True).splitlines()
    assert lines[0].split() == ["Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95", "voc07"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[1].split()[:3] == ["all", "1", "2"] and lines[3].split()[2:5] == ["0", "0", "n/a"]
    scalars = result.scalars()
    assert {"metrics/precision", "metrics/recall", "metrics/mAP50", "metrics/mAP50-95", "metrics/APs"} <= set(scalars)
    assert scalars["metrics/voc07-mAP50"] == result.ranked.mean
    table = result.coco_table().splitlines()
    assert [line.split()[0] for line in table] == ["AP", "APs", "AR1", "ARs"] and len(
        {len(line) for line in table}
    ) == 1

"""The evaluator against pycocotools, against known answers, and against itself under changes that must not matter."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.evaluate import coco_results
from utils.metrics import RANK_RULES, DetectionMetrics
from utils.metrics.confusion import confusion_matrix
from utils.metrics.flat import flatten, overlapping_pairs, paired_overlap
from utils.metrics.ranked import evaluate_ranked
from utils.structures import Detections, Record

NUMBERS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def make_record(boxes=(), labels=(), ignore=None, crowd=None, area=None, image_id=1, size=(480, 640)) -> Record:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    none = np.zeros(len(boxes), bool)
    crowd = none if crowd is None else np.asarray(crowd, bool)
    ignore = none if ignore is None else np.asarray(ignore, bool)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    return Record(
        path=f"{image_id}.jpg", size=size, boxes=boxes, labels=np.asarray(labels, np.int64).reshape(-1),
        ignore=ignore | crowd, crowd=crowd, area=width * height if area is None else np.asarray(area, np.float32), image_id=image_id,
    )  # fmt: skip


def make_detections(boxes=(), scores=(), labels=()) -> Detections:
    return Detections(
        boxes=torch.tensor(np.asarray(boxes, np.float32).reshape(-1, 4)),
        scores=torch.tensor(np.asarray(scores, np.float32).reshape(-1)),
        labels=torch.tensor(np.asarray(labels, np.int64).reshape(-1)),
    )


def measure(found: list[Detections], records: list[Record], num_classes: int, protocol="coco"):
    metrics = DetectionMetrics([f"class {number}" for number in range(num_classes)])
    for detections, record in zip(found, records):
        metrics.update(detections, record)
    return metrics.compute(protocol)


def pycocotools_numbers(found, records, num_classes) -> tuple[dict[str, float], np.ndarray]:
    """The twelve numbers and AP per threshold and class, by the official code. Category ids are 1-based here."""
    annotations = [
        {"id": 0, "image_id": r.image_id, "category_id": int(label) + 1, "area": float(area), "iscrowd": int(crowd),
         "bbox": [float(box[0]), float(box[1]), float(box[2]) - float(box[0]), float(box[3]) - float(box[1])]}
        for r in records for box, label, area, crowd in zip(r.boxes, r.labels, r.area, r.crowd)
    ]  # fmt: skip
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1
    results = coco_results(found, records, list(range(1, num_classes + 1)))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": r.image_id, "height": r.size[0], "width": r.size[1]} for r in records],
            "categories": [{"id": number + 1, "name": str(number)} for number in range(num_classes)],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    per_class = np.where(precision[:, 0] < 0, np.nan, precision.mean(axis=1))
    return {name: np.nan if value == -1 else value for name, value in zip(NUMBERS, evaluation.stats)}, per_class


def assert_equal_to_pycocotools(found, records, num_classes, tolerance=1e-9):
    expected, per_class = pycocotools_numbers(found, records, num_classes)
    result = measure(found, records, num_classes)
    for name in NUMBERS:
        np.testing.assert_allclose(result.coco[name], expected[name], rtol=0, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(result.ap, per_class, rtol=0, atol=tolerance)
    return result


def random_set(seed: int) -> tuple[list[Detections], list[Record], int]:
    """A small data set in which everything difficult is likely: ties in score and overlap, crowds, empty pictures."""
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(1, 5))
    side = float(rng.choice([20, 60, 200, 400]))
    step = rng.choice([0.25, side / 4])  # a coarse grid makes equal boxes and equal overlaps frequent
    found, records = [], []
    ids = rng.permutation(np.arange(1, 100))
    for number in range(int(rng.integers(1, 7))):
        num = int(rng.choice([0, 1, 4, 12]))
        corner = np.round(rng.uniform(0, 1.5 * side, (num, 2)) / step) * step
        boxes = np.hstack([corner, corner + np.maximum(step, np.round(rng.uniform(0.2, 1, (num, 2)) * side / step) * step)])
        labels, crowd = rng.integers(0, num_classes, num), rng.random(num) < rng.choice([0, 0.3])
        area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) * rng.choice([1, 0.6])
        records.append(make_record(boxes, labels, crowd=crowd, area=area, image_id=int(ids[number])))

        rows = rng.integers(0, num, int(rng.choice([0, 1, 2, 5])) * num) if num else np.zeros(0, int)
        noise = np.round(rng.normal(0, 0.1 * side, (len(rows), 4)) / step) * step * (rng.random((len(rows), 1)) < 0.7)
        guesses = np.vstack([boxes[rows] + noise, rng.uniform(0, side, (int(rng.integers(0, 4)), 4))])
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2])
        guess_labels = np.where(rng.random(len(guesses)) < 0.8, np.append(labels[rows], np.zeros(len(guesses) - len(rows), int)),
                                rng.integers(0, num_classes, len(guesses)))  # fmt: skip
        scores = rng.choice([0.1, 0.5, 0.9], len(guesses)) if rng.random() < 0.5 else rng.random(len(guesses))
        found.append(make_detections(guesses, scores, guess_labels))
    if not sum(map(len, found)):
        found[0] = make_detections([[0, 0, 5, 5]], [0.5], [0])  # pycocotools cannot load an empty list of results
    return found, records, num_classes


@pytest.mark.parametrize("block", range(6))
def test_equal_to_pycocotools_on_random_sets(block):
    for seed in range(50 * block, 50 * block + 50):
        assert_equal_to_pycocotools(*random_set(seed))


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
    truth, results = json.loads((folder / "coco/gts.json").read_text()), json.loads((folder / "coco/dets.json").read_text())["annotations"]
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

"""What tests of numbers share: detections and truths by hand or at random, and pycocotools' verdict on them."""

import contextlib
import io

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.evaluate import coco_results
from utils.metrics import DetectionMetrics
from utils.structures import Detections, Record

NUMBERS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def make_record(boxes=(), labels=(), ignore=None, crowd=None, area=None, image_id=1, size=(480, 640)) -> Record:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    none = np.zeros(len(boxes), bool)
    crowd = none if crowd is None else np.asarray(crowd, bool)
    ignore = none if ignore is None else np.asarray(ignore, bool)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    return Record(
        path=f"{image_id}.jpg",
        size=size,
        boxes=boxes,
        labels=np.asarray(labels, np.int64).reshape(-1),
        ignore=ignore | crowd,
        crowd=crowd,
        area=width * height if area is None else np.asarray(area, np.float32),
        image_id=image_id,
    )


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
        boxes = np.hstack(
            [corner, corner + np.maximum(step, np.round(rng.uniform(0.2, 1, (num, 2)) * side / step) * step)]
        )
        labels, crowd = rng.integers(0, num_classes, num), rng.random(num) < rng.choice([0, 0.3])
        area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) * rng.choice([1, 0.6])
        records.append(make_record(boxes, labels, crowd=crowd, area=area, image_id=int(ids[number])))

        rows = rng.integers(0, num, int(rng.choice([0, 1, 2, 5])) * num) if num else np.zeros(0, int)
        noise = np.round(rng.normal(0, 0.1 * side, (len(rows), 4)) / step) * step * (rng.random((len(rows), 1)) < 0.7)
        guesses = np.vstack([boxes[rows] + noise, rng.uniform(0, side, (int(rng.integers(0, 4)), 4))])
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2])
        right_labels = np.append(labels[rows], np.zeros(len(guesses) - len(rows), int))
        other_labels = rng.integers(0, num_classes, len(guesses))
        guess_labels = np.where(rng.random(len(guesses)) < 0.8, right_labels, other_labels)
        scores = rng.choice([0.1, 0.5, 0.9], len(guesses)) if rng.random() < 0.5 else rng.random(len(guesses))
        found.append(make_detections(guesses, scores, guess_labels))
    if not sum(map(len, found)):
        found[0] = make_detections([[0, 0, 5, 5]], [0.5], [0])  # pycocotools cannot load an empty list of results
    return found, records, num_classes

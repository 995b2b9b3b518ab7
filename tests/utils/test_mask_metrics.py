"""AP of masks against pycocotools, and masks in what is written and drawn."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.draw import draw_boxes, draw_detections
from utils.evaluate import coco_results
from utils.mask_frames import Patch
from utils.metrics import DetectionMetrics
from utils.outlines import fill_boxes
from utils.results import Predictions
from utils.run_lengths import decode, encode, ring_of
from utils.structures import Batch, Detections, ImageInfo, Outlines, Record, Targets

NUMBERS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def random_set(seed: int):
    """Detections near the truth, records, and the annotations they were read from; every fifth object is a crowd."""
    rng = np.random.default_rng(seed)
    found, records, annotations = [], [], []
    side = int(rng.choice([60, 240]))  # of a picture: objects around 32 and around 96 pixels
    for number in range(6):
        height, width = side, side + 20
        num = int(rng.choice([0, 2, 5]))
        rings, boxes, area, crowd, masks, guesses = [], [], [], [], [], []
        for _ in range(num):
            center, radius = rng.uniform(0.2, 0.8, 2) * (width, height), rng.uniform(0.08, 0.4, 2) * side
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(5, 12)))
            ring = np.round(center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1), 2).clip(0, side)
            is_crowd = bool(rng.random() < 0.2)
            shape = [ring.ravel().tolist()]
            if is_crowd:
                plane = rng.random((height, width)) < 0.5
                plane[: height // 2] = False
                shape = encode(Patch(0, 0, plane), (height, width))
                ring = ring_of(plane)
            low, high = ring.min(0), ring.max(0)
            rings.append([ring])
            boxes.append([*low, *high])
            area.append(float(np.prod(high - low) * rng.choice([0.6, 0.8])))
            crowd.append(is_crowd)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": 100 - number, "category_id": int(rng.integers(1, 3)),
                 "bbox": [*low.tolist(), *(high - low).tolist()], "area": area[-1], "iscrowd": int(is_crowd),
                 "segmentation": shape}
            )  # fmt: skip
            for _ in range(rng.integers(0, 4)):
                guesses.append(np.array(boxes[-1]) + rng.normal(0, 0.04 * side, 4))
                ramp = np.linspace(-1, 1, 28)
                disc = rng.uniform(0.7, 1.3) - np.hypot(ramp[:, None], ramp) + rng.normal(0, 0.1, (28, 28))
                masks.append(1 / (1 + np.exp(-8 * disc)))
        guesses.append([5, 5, 30, 40])  # pycocotools cannot load an empty list of results
        masks.append(np.ones((28, 28)))
        guesses = np.array(guesses, np.float32)
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        mine = [row for row in annotations if row["image_id"] == 100 - number]
        found.append(
            Detections(
                boxes=torch.tensor(guesses),
                scores=torch.tensor(rng.choice([0.2, 0.5, 0.9], len(guesses)).astype(np.float32)),
                labels=torch.tensor(rng.integers(0, 2, len(guesses))),
                masks=torch.tensor(np.array(masks, np.float32)),
            )
        )
        records.append(
            Record(
                path=f"{number}.jpg", size=(height, width), boxes=np.array(boxes, np.float32).reshape(-1, 4),
                labels=np.array([row["category_id"] - 1 for row in mine], np.int64), ignore=np.array(crowd, bool),
                crowd=np.array(crowd, bool), area=np.array(area, np.float32), image_id=100 - number,
                outlines=Outlines.of(rings),
            )
        )  # fmt: skip
    return found, records, annotations


def official(found, records, annotations, kind: str):
    """The official numbers. Beside a box pycocotools takes its area for the mask's, so masks are handed over alone."""
    results = coco_results(found, records, [1, 2])
    if kind == "segm":
        results = [{key: value for key, value in entry.items() if key != "bbox"} for entry in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": r.image_id, "height": r.size[0], "width": r.size[1]} for r in records],
            "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: np.nan if value == -1 else value for name, value in zip(NUMBERS, evaluation.stats)}


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools
def test_mask_numbers_are_those_of_pycocotools(seed):
    found, records, annotations = random_set(seed)
    metrics = DetectionMetrics(["a", "b"])
    for row in np.random.default_rng(seed).permutation(len(found)):  # the order of pictures decides nothing
        metrics.update(found[row], records[row])
    result = metrics.compute()
    expected = official(found, records, annotations, "segm")
    assert result.segm.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(result.segm[name], value, rtol=0, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(np.nanmean(result.segm_ap), expected["AP"], rtol=0, atol=1e-9)
    for name, value in official(found, records, annotations, "bbox").items():
        np.testing.assert_allclose(result.coco[name], value, rtol=0, atol=1e-6, err_msg=name)
    scalars = result.scalars()
    assert scalars["metrics/mask-mAP50"] == result.segm["AP50"] and scalars["metrics/mAP50"] == result.coco["AP50"]
    assert "mask50-95" in result.table(verbose=True)


def test_boxes_alone_have_no_mask_numbers():
    found, records, _ = random_set(0)
    metrics = DetectionMetrics(["a", "b"])
    for mine, record in zip(found, records):
        metrics.update(Detections(boxes=mine.boxes, scores=mine.scores, labels=mine.labels), record)
    result = metrics.compute()
    assert result.segm is None and result.segm_ap is None
    assert not any("mask" in name for name in result.scalars()) and "mask" not in result.table()


def test_a_detection_without_numbers_costs_the_others_nothing():
    """What is dropped for its box must not shift the masks of those that stay."""
    found, records, _ = random_set(3)
    clean, dirty = DetectionMetrics(["a", "b"]), DetectionMetrics(["a", "b"])
    for mine, record in zip(found, records):
        clean.update(mine, record)
        odd = Detections(
            boxes=torch.cat([torch.full((2, 4), float("nan")), mine.boxes]),
            scores=torch.cat([torch.tensor([0.9, 0.9]), mine.scores]),
            labels=torch.cat([torch.tensor([0, 1]), mine.labels]),
            masks=torch.cat([torch.ones(2, 28, 28), mine.masks]),
        )
        dirty.update(odd, record)
    assert dirty.compute().num_invalid == 2 * len(found)
    assert dirty.compute().segm == clean.compute().segm


def test_perfect_masks():
    _, records, _ = random_set(5)
    metrics = DetectionMetrics(["a", "b"])
    for record in records:
        boxes = torch.tensor(record.boxes)
        metrics.update(
            Detections(
                boxes=boxes,
                scores=torch.ones(len(boxes)),
                labels=torch.tensor(record.labels),
                masks=torch.tensor(fill_boxes(record.outlines, record.boxes)).float(),
            ),
            record,
        )
    result = metrics.compute()
    assert result.coco["AP"] > 0.999 and result.segm["AP50"] > 0.999 and result.segm["AP"] > 0.75


def test_results_files_hold_run_lengths(tmp_path):
    found, records, _ = random_set(1)
    entries = coco_results(found, records, [1, 2])
    assert all(entry["segmentation"]["size"] == list(records[0].size) for entry in entries)
    predictions = Predictions(tmp_path, records, save_txt=False, save_conf=False, save_json=True)
    for number, mine in enumerate(found):
        info = ImageInfo(id=number, path=records[number].path, size=records[number].size)
        nothing = Targets.of(image=torch.zeros(0, dtype=torch.int64), labels=torch.zeros(0), boxes=torch.zeros(0, 4))
        batch = Batch(images=torch.zeros(1, 3, *info.size, dtype=torch.uint8), targets=nothing, infos=(info,))
        predictions.observe(batch, [mine])
    assert json.loads(predictions.write_json([1, 2]).read_text()) == json.loads(json.dumps(entries))
    area = sum(decode(entry["segmentation"]["counts"], records[0].size).sum() for entry in entries)
    assert area > 0


def test_masks_are_drawn_inside_their_boxes():
    image = np.full((60, 80, 3), 100, np.uint8)
    ramp = torch.linspace(-1, 1, 28)
    disc = (ramp[:, None] ** 2 + ramp**2 < 0.7).float()[None]
    boxes, one = torch.tensor([[10.0, 10, 50, 50]]), torch.zeros(1, dtype=torch.int64)
    found = Detections(boxes=boxes, scores=torch.ones(1), labels=one, masks=disc)
    drawn = draw_detections(image, found, ["a"], hide_labels=True, line_thickness=1)
    annotated = draw_boxes(image, boxes, one, [""], masks=disc.to(torch.uint8), line_thickness=1)
    assert (image == 100).all()
    for picture in (drawn, annotated):
        changed = (picture != 100).any(axis=2)
        assert changed[30, 30] and not changed[13, 13] and not changed[:, 52:].any()  # the middle, a corner, beyond
    plain = draw_detections(image, Detections(boxes=boxes, scores=torch.ones(1), labels=one), ["a"], hide_labels=True)
    assert not (plain[20:40, 20:40] != 100).any()

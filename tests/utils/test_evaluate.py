"""The evaluation loop: boxes return to the original picture, records are joined by id, results load elsewhere."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from utils.evaluate import coco_results, evaluate
from utils.structures import Batch, Detections, ImageInfo, Letterbox, Record, Targets
from utils.timing import Timer

NAMES = ["disc", "square"]


def make_record(number: int) -> Record:
    boxes = np.array([[10, 20, 110, 220], [200, 50, 260, 90]], np.float32) + 5 * number
    none, (width, height) = np.zeros(2, bool), (boxes[:, 2:] - boxes[:, :2]).T
    return Record(
        path=f"{number}.jpg",
        size=(300, 400),
        boxes=boxes,
        labels=np.array([0, 1]),
        ignore=none,
        crowd=none,
        area=width * height,
        image_id=7 * number + 1,
    )


def make_batches(num: int, batch_size: int) -> list[Batch]:
    """Letterboxed to 200 x 200, in another order than the records."""
    placed, batches = Letterbox(scale=(0.5, 0.5), pad=(0.0, 25.0)), []
    targets = Targets.of(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0, 4))
    for start in range(0, num, batch_size):
        ids = [num - 1 - n for n in range(start, min(start + batch_size, num))]
        infos = tuple(ImageInfo(id=n, path=f"{n}.jpg", size=(300, 400), letterbox=placed) for n in ids)
        images = torch.stack([torch.full((3, 200, 200), n, dtype=torch.uint8) for n in ids])
        batches.append(Batch(images=images, targets=targets, infos=infos))
    return batches


class Oracle:
    """Finds everything, in pixels of the network's input; knows a picture by its grey value."""

    def __init__(self, records):
        self.records, self.timer = records, Timer()

    def __call__(self, images):
        with self.timer("inference"):
            found = []
            for image in images:
                record = self.records[int(image[0, 0, 0])]
                boxes = torch.from_numpy(record.boxes) * 0.5 + torch.tensor([0.0, 25, 0, 25])
                scores = torch.tensor([0.9, 0.8])
                found.append(Detections(boxes=boxes, scores=scores, labels=torch.from_numpy(record.labels)))
            return found


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_an_oracle_is_perfect_at_any_batch_size(batch_size):
    records, seen = [make_record(n) for n in range(5)], []
    oracle = Oracle(records)
    result = evaluate(
        oracle,
        make_batches(5, batch_size),
        records,
        NAMES,
        protocol="voc07",
        progress=False,
        observe=lambda batch, found: seen.extend((info.id, f) for info, f in zip(batch.infos, found)),
    )
    assert result.map == pytest.approx(1.0) and result.ranked.mean == pytest.approx(1.0)
    assert result.num_images == 5 and result.images.tolist() == [5, 5] and result.instances.tolist() == [5, 5]
    assert set(result.speed) == {"data", "inference", "metrics"} and "speed" in result.table()
    assert sorted(number for number, _ in seen) == list(range(5))
    for number, found in seen:
        np.testing.assert_allclose(found.boxes.numpy(), records[number].boxes, atol=1e-4)


def test_speed_counts_this_evaluation_only():
    records = [make_record(0)]
    oracle = Oracle(records)
    oracle.timer.seconds["inference"] = 1000.0
    assert evaluate(oracle, make_batches(1, 1), records, NAMES, progress=False).speed["inference"] < 1000


def test_no_pictures_at_all():
    result = evaluate(lambda images: [], [], [], NAMES, progress=False)
    assert np.isnan(result.map) and "n/a" in result.table(verbose=True)


def test_results_load_in_pycocotools(tmp_path):
    records = [make_record(n) for n in range(3)]
    scores = torch.tensor([0.9, 0.8])
    found = [
        Detections(boxes=torch.from_numpy(r.boxes), scores=scores, labels=torch.from_numpy(r.labels)) for r in records
    ]
    results = coco_results(found, records, category_ids=[3, 90])
    assert results[0] == {"image_id": 1, "category_id": 3, "bbox": [10, 20, 100, 200], "score": pytest.approx(0.9)}
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": [{"id": r.image_id} for r in records], "annotations": [],
                         "categories": [{"id": 3}, {"id": 90}]}  # fmt: skip
        truth.createIndex()
        loaded = truth.loadRes(str(file))
    assert len(loaded.anns) == 6
    assert {annotation["category_id"] for annotation in loaded.anns.values()} == {3, 90}
    assert sum(annotation["area"] for annotation in loaded.anns.values()) == pytest.approx(3 * (20000 + 2400))


def test_pictures_without_an_id_are_numbered():
    records = [make_record(n) for n in range(2)]
    records = [Record(**{**vars(record), "image_id": None}) for record in records]
    found = [Detections(boxes=torch.zeros(1, 4), scores=torch.ones(1), labels=torch.zeros(1).long())] * 2
    assert [entry["image_id"] for entry in coco_results(found, records, [1, 2])] == [0, 1]

"""Predict every picture of a loader and measure the result: one evaluator for training and for ``test.py``."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor
from tqdm import tqdm

from utils.errors import DivergenceError
from utils.mask_frames import paste
from utils.metrics import DetectionMetrics, Evaluation
from utils.run_lengths import encode
from utils.structures import Batch, Detections, Record
from utils.timing import Waiting

Predict = Callable[[Tensor], list[Detections]]
Observe = Callable[[Batch, list[Detections]], None]


def evaluate(
    predict: Predict,
    loader: Iterable[Batch],
    records: list[Record],
    names: list[str],
    *,
    protocol: str = "coco",
    observe: Observe | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run ``predict`` over ``loader`` and compare with ``records``.

    Args:
        predict: uint8 images [B, C, H, W] -> detections per picture, in pixels of these images. Moves the images to
            its own device. Where it has a ``timer`` (utils/timing.py), its parts appear in ``Evaluation.speed``.
        loader: batches whose ``infos[i].id`` is a position in ``records``.
        protocol: ``coco``, or a key of ``RANK_RULES`` to be measured beside it.
        observe: called per batch with the detections in pixels of the original pictures.
    """
    metrics, num_images, seconds, measuring = DetectionMetrics(names), 0, 0.0, 0.0
    timer = getattr(predict, "timer", None)
    parts_before = dict(timer.seconds) if timer else {}
    waiting = Waiting(loader)
    for batch in tqdm(waiting, desc="evaluate", unit="batch", leave=False, disable=None if progress else True):
        start = time.perf_counter()
        found = predict(batch.images)
        found = [detections.cpu().to_original(info) for detections, info in zip(found, batch.infos, strict=True)]
        seconds += time.perf_counter() - start
        num_images += len(batch)
        start = time.perf_counter()
        for detections, info in zip(found, batch.infos):
            metrics.update(detections, records[info.id])
        measuring += time.perf_counter() - start
        if observe:
            observe(batch, found)
    start = time.perf_counter()
    result = metrics.compute(protocol)
    measuring += time.perf_counter() - start
    parts = {name: total - parts_before.get(name, 0.0) for name, total in timer.seconds.items()} if timer else {}
    parts = {"data": waiting.seconds, **(parts or {"predict": seconds}), "metrics": measuring}
    return replace(result, speed={name: 1000 * total / max(num_images, 1) for name, total in parts.items()})


def coco_results(detections: list[Detections], records: list[Record], category_ids: list[int]) -> list[dict]:
    """Detections in original pixels -> the entries of a COCO results file, ready for ``json.dump``.

    Args:
        category_ids: the data set's own id of every label. Pictures without a number of their own get their position.

    Masks stand beside the boxes as run lengths. Beside a box pycocotools sorts a mask by the box's area into small,
    medium and large: drop ``bbox`` (as detectron2 does) to have it measure masks by their own, as our evaluator does.
    """
    entries = []
    for position, (found, record) in enumerate(zip(detections, records, strict=True)):
        image_id = position if record.image_id is None else record.image_id
        boxes = found.boxes.double()
        boxes[:, 2:] -= boxes[:, :2]
        mine = [
            {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
            for box, score, label in zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist())
        ]
        entries += with_segmentations(mine, segmentations(found, record.size))
    return entries


def refuse_invalid(num_invalid: int, where: object) -> None:
    """Raise DivergenceError where a network (of file ``where``) said what is no number; to be called last of all."""
    if num_invalid:
        found = f"{num_invalid} detections had a box or score that is no number; they were left out and counted"
        raise DivergenceError(where, found, "--precision float32, or an earlier checkpoint")


def segmentations(found: Detections, size: tuple[int, int]) -> list[dict] | None:
    """Each mask in a picture of ``size`` (H, W) as compressed run lengths; None where there are only boxes."""
    if found.masks is None:
        return None
    return [encode(patch, size) for patch in paste(found.masks, found.boxes, size)]


def with_segmentations(entries: list[dict], shapes: list[dict] | None) -> list[dict]:
    """The same entries, each with its mask."""
    if shapes is None:
        return entries
    return [{**entry, "segmentation": shape} for entry, shape in zip(entries, shapes, strict=True)]

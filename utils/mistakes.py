"""What a network gets wrong: each detection and each object judged, the worst of them kept with a picture.

Letters: n detections, m objects of a picture.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
import torch

from utils.boxes import box_area, box_iou
from utils.metrics.confusion import CONFIDENCE
from utils.structures import Batch, Detections, Record

NOTHING, MISPLACED, MISNAMED, DOUBLED, MISSED = "nothing there", "badly placed", "wrong class", "doubled", "missed"
KINDS = {
    NOTHING: "no object of this class is near (IoU below 0.1)",
    MISPLACED: "an object of the class is near, but the box fits badly (IoU 0.1 to 0.5)",
    MISNAMED: "the box fits an object of another class",
    DOUBLED: "the object has a surer box already",
    MISSED: "an object that no box of its class fits",
}
FITS, NEAR = 0.5, 0.1  # IoU
KEPT = 24  # of false detections, and of missed objects
SIDE = 220  # pixels of a crop
CONTEXT = 0.6  # of its side, around a box
TRUE, FALSE = (46, 190, 67), (230, 40, 40)


class Mistake(NamedTuple):
    """One of them; the worse, the larger its weight."""

    kind: str
    weight: float  # of a false detection its score, of a missed object its share of the picture
    label: int  # of the detection, or of the object
    box: tuple[float, float, float, float]  # pixels of the original
    text: str


def judge(found: Detections, record: Record, names: list[str]) -> Iterator[Mistake]:
    """All mistakes in one picture, at confidence 0.25 and IoU 0.5. Boxes are in pixels of the original.

    Detections are matched best first, as COCO does; those on an ignored region are neither right nor wrong.
    """
    boxes, labels = torch.from_numpy(record.boxes).reshape(-1, 4), torch.from_numpy(record.labels)
    ignore = torch.from_numpy(record.ignore)
    iou = box_iou(found.boxes.float(), boxes)  # [n, m]
    same = found.labels[:, None] == labels
    taken, sure = ignore.clone(), found.scores >= CONFIDENCE
    on_ignored = _on_ignored(found, boxes[ignore])
    for row in sure.nonzero().flatten().tolist():
        fits = torch.where(same[row] & ~taken, iou[row], 0.0)
        if len(labels) and fits.max() >= FITS:
            taken[fits.argmax()] = True
        elif not on_ignored[row]:
            yield _false(found, row, iou[row], same[row], labels, ignore, names)
    height, width = record.size
    for column in (~taken).nonzero().flatten().tolist():
        share = box_area(boxes[column : column + 1]).item() / (height * width)
        text = f"{names[labels[column]]}: {_best_guess(found, iou[:, column], names)}"
        yield Mistake(MISSED, share, int(labels[column]), tuple(boxes[column].tolist()), text)


def _false(found: Detections, row: int, iou, same, labels, ignore, names: list[str]) -> Mistake:
    """What is wrong with a detection that has no object."""
    label, score = int(found.labels[row]), found.scores[row].item()
    of_class, of_others = (torch.where(mask & ~ignore, iou, 0.0) for mask in (same, ~same))
    mine, other = (float(values.max()) if len(values) else 0.0 for values in (of_class, of_others))
    kind, text = NOTHING, f"{names[label]} {score:.2f}"
    if mine >= FITS:
        kind = DOUBLED
    elif other >= FITS:
        kind, text = MISNAMED, f"{text}, is {names[labels[of_others.argmax()]]}"
    elif mine >= NEAR:
        kind, text = MISPLACED, f"{text}, IoU {mine:.2f}"
    return Mistake(kind, score, label, tuple(found.boxes[row].tolist()), text)


def _best_guess(found: Detections, iou: torch.Tensor, names: list[str]) -> str:
    """The surest detection at a missed object."""
    rows = (iou >= FITS).nonzero().flatten()
    if not len(rows):
        return "not seen"
    best = rows[found.scores[rows].argmax()]
    return f"seen as {names[found.labels[best]]} {found.scores[best].item():.2f}"


def _on_ignored(found: Detections, regions: torch.Tensor) -> torch.Tensor:
    """Which detections [n] lie by half on an ignored region."""
    low = torch.maximum(found.boxes[:, None, :2], regions[:, :2])
    high = torch.minimum(found.boxes[:, None, 2:], regions[:, 2:])
    covered = (high - low).clamp(min=0).prod(-1) / box_area(found.boxes)[:, None].clamp(min=1e-6)
    return (covered >= FITS).any(1)


class Mistakes:
    """Judges every picture of an evaluation (an ``observe`` of `evaluate`): counts all, keeps the worst with a crop."""

    def __init__(self, records: list[Record], names: list[str]):
        self.records, self.names = records, names
        self.counts: Counter[tuple[str, int]] = Counter()  # (kind, label)
        self.false: list[tuple[Mistake, str, np.ndarray]] = []  # the worst first: mistake, file, crop
        self.missed: list[tuple[Mistake, str, np.ndarray]] = []

    def update(self, batch: Batch, detections: list[Detections]) -> None:
        """Detections are in pixels of the originals."""
        for row, (found, info) in enumerate(zip(detections, batch.infos)):
            record = self.records[info.id]
            for mistake in judge(found.cpu(), record, self.names):
                self.counts[mistake.kind, mistake.label] += 1
                worst = self.missed if mistake.kind == MISSED else self.false
                if len(worst) < KEPT or mistake.weight > worst[-1][0].weight:
                    worst.append((mistake, info.path, _crop(batch, row, mistake, record)))
                    worst.sort(key=lambda entry: -entry[0].weight)
                    del worst[KEPT:]


def _crop(batch: Batch, row: int, mistake: Mistake, record: Record) -> np.ndarray:
    """A square around a box, as the network saw it, uint8 [SIDE, SIDE, 3]: objects in green, the mistake in red.

    A missed object is the thick green box.
    """
    image = batch.images[row].permute(1, 2, 0).cpu().numpy()
    placed = batch.infos[row].letterbox
    box = placed.apply(np.array([mistake.box], np.float32))[0]
    (x, y), side = (box[:2] + box[2:]) / 2, max(*(box[2:] - box[:2]), 16.0) * (1 + 2 * CONTEXT)
    scale = SIDE / side
    move = np.float32([[scale, 0, SIDE / 2 - scale * x], [0, scale, SIDE / 2 - scale * y]])
    grey = (114,) * 3
    canvas = cv2.warpAffine(np.ascontiguousarray(image), move, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderValue=grey)
    canvas = np.array(np.broadcast_to(canvas.reshape(SIDE, SIDE, -1), (SIDE, SIDE, 3)))
    objects = placed.apply(record.boxes[~record.ignore])
    for corners in objects:
        _outline(canvas, corners * scale + np.tile(move[:, 2], 2), TRUE, 1)
    colour = TRUE if mistake.kind == MISSED else FALSE
    _outline(canvas, box * scale + np.tile(move[:, 2], 2), colour, 3)
    return canvas


def _outline(canvas: np.ndarray, corners: np.ndarray, colour: tuple, thickness: int) -> None:
    x1, y1, x2, y2 = np.clip(corners, -9999, 9999).round().astype(int).tolist()
    cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness)

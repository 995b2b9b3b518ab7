"""How far another format's outputs are from the network's own, on real pictures.

Letters: B pictures, C H W of the input, P slots, N classes, K detections per picture.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from models.exports.wish import OUTPUTS, Export, Wish, boxes_and_scores
from models.postprocess import postprocess
from models.structures import Predictions
from utils.datasets.letterbox import letterbox
from utils.errors import UserError
from utils.structures import Detections

TOLERANCES = {"float32": 1e-4, "float16": 2e-2}  # of boxes, relative to the input's longer side, and of scores
NEAR = 1e-4  # scores so close to a threshold may lie on either side of it
FEWEST = 4  # pictures, where every batch is like the others
CERTAIN = 30.0  # a logit whose sigmoid is 1


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The largest differences over one batch of pictures.

    Boxes are compared in units of the input's longer side, or of the box's own where it is longer; scores as they are.
    """

    pictures: int
    size: tuple[int, int]  # H, W
    boxes: float
    scores: float
    detections: int | None = None  # found by the suppression in the file
    different: int | None = None  # of them and of ours, those without a partner of the same label, box and score

    def as_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


def batches(wish: Wish, pictures: Sequence[np.ndarray], stretch: bool) -> Iterator[Tensor]:
    """Inputs [B, C, H, W] to compare on, each of other pictures; with ``dynamic`` of several numbers and sizes."""
    (height, width), stride = wish.size, wish.model.stride
    wanted = [(wish.batch_size, wish.size)] * math.ceil(FEWEST / wish.batch_size)
    if wish.dynamic:
        wanted = [(1, wish.size), (3, (height + stride, width)), (7, (height, width + 3 * stride))]
    start = 0
    for number, size in wanted:
        chosen = [pictures[position % len(pictures)] for position in range(start, start + number)]
        canvases = np.stack([letterbox(picture, size, stretch=stretch)[0] for picture in chosen])
        yield torch.from_numpy(canvases).permute(0, 3, 1, 2).contiguous().float() / 255
        start += number


@torch.no_grad()
def compare(wish: Wish, export: Export, images: Tensor) -> Parity:
    """What ``export`` and the network say of ``images``. Errors: UserError where shapes differ."""
    size, raw = tuple(images.shape[2:]), export.raw(images)
    boxes, scores = differences(wish, raw, images)
    kept = _compare_detections(wish, raw, export.detect(images), size) if wish.nms else {}
    return Parity(pictures=len(images), size=size, boxes=boxes, scores=scores, **kept)


@torch.no_grad()
def differences(wish: Wish, raw: Sequence[Tensor], images: Tensor) -> tuple[float, float]:
    """The largest ones of ``raw`` (boxes, scores) from the network as it is: float32, batch norms not folded."""
    ours = boxes_and_scores(wish.model, images)
    for name, found, expected in zip(OUTPUTS, raw, ours):
        if found.shape != expected.shape:
            raise UserError(wish.weights, f"exported {name} are {list(found.shape)}, expected {list(expected.shape)}")
    side = (ours[0][..., 2:] - ours[0][..., :2]).amax(-1, keepdim=True).clamp(min=max(images.shape[2:]))
    return _largest((raw[0] - ours[0]) / side), _largest(raw[1] - ours[1])


def table(found: Sequence[Parity]) -> str:
    """Aligned lines, one per batch."""
    rows = [("pictures", "input", "boxes differ", "scores differ", "detections", "differ")]
    for parity in found:
        numbers = (f"{parity.boxes:.1e}", f"{parity.scores:.1e}")
        kept = ("", "") if parity.detections is None else (str(parity.detections), str(parity.different))
        rows.append((str(parity.pictures), "x".join(map(str, parity.size)), *numbers, *kept))
    columns = [column for column in zip(*rows) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in zip(*columns))


def refuse_differences(wish: Wish, found: Sequence[Parity]) -> None:
    """Raise a UserError where any difference is too large, or is no number."""
    precision = "float16" if wish.half else "float32"
    limit = TOLERANCES[precision]
    for parity in found:
        for name, difference in (("boxes", parity.boxes), ("scores", parity.scores)):
            if not difference <= limit:
                message = f"parity failed: {name} differ by {difference:.2g}, allowed in {precision} is {limit:g}"
                raise UserError(wish.weights, message, "nothing was written")
        if parity.different:
            message = f"parity failed: {parity.different} of {parity.detections} detections differ"
            raise UserError(wish.weights, message, "nothing was written; try without --nms")


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def _compare_detections(wish: Wish, raw: Sequence[Tensor], kept: Sequence[Tensor], size: tuple[int, int]) -> dict:
    """The suppression in the file beside our own, both of the file's own boxes and scores."""
    boxes, scores = raw
    preds = Predictions(
        boxes=boxes,
        deltas=torch.zeros_like(boxes),
        obj=torch.full_like(boxes[..., 0], CERTAIN),
        cls=scores.double().logit().clamp(-700, 700).to(scores.dtype),
        priors=None,
    )
    ours = postprocess(preds, size=size, kind="default", **vars(wish.nms))
    theirs = [Detections(boxes=b[s > 0], scores=s[s > 0], labels=n[s > 0]) for b, s, n in zip(*kept)]
    limit = max(size) * TOLERANCES["float32"]
    different = sum(_unmatched(a, b, limit, wish.nms.conf_thres) for a, b in zip(ours, theirs))
    return {"detections": sum(map(len, theirs)), "different": different}


def _unmatched(ours: Detections, theirs: Detections, limit: float, threshold: float) -> int:
    """Detections of either that the other lacks, but for those at the threshold."""

    def lacking(some: Detections, others: Detections) -> int:
        same = (
            (some.labels[:, None] == others.labels)
            & ((some.scores[:, None] - others.scores).abs() < NEAR)
            & ((some.boxes[:, None] - others.boxes).abs().amax(-1) < limit)
        )
        return int((~same.any(1) & (some.scores > threshold + NEAR)).sum())

    return lacking(ours, theirs) + lacking(theirs, ours)

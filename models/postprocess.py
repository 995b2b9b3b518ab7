"""Predictions -> Detections: thresholds and non-maximum suppression by Darknet's rules (darknet-format, section 8).

Of a network in two stages the slots are the proposals, as the second stage sees them.

Letters: B images, P slots, C classes, R slots that pass the objectness threshold, N candidates (slot, class), M boxes:
R, or N where each class has its own.

The result is exactly that of sorting all candidates of an image by score (equal scores: by slot, then class), dropping
in each class whatever overlaps a better one that was kept, and taking the best ``max_det``. It is found lazily: the
fate of a candidate depends only on better ones, so candidates are looked at best first, in chunks, until ``max_det``
are kept. Slots whose largest logit is too small are never scored, and of the others only those are sorted whose best
score is high enough for the next chunks. Memory and time per chunk are bounded whatever the network says.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from models.second_stage import refined, with_masks
from models.structures import Predictions
from utils.boxes import paired_iou
from utils.errors import UserError
from utils.structures import Detections

CHUNK = 256  # candidates that are compared with each other at once
LARGEST_CHUNK = 1024  # candidates that are compared with those kept at once, once the best have not been enough
FIRST_POOL = 512  # slots whose scores are sorted first; each further pool is 8 times larger
MARGIN = 1 - 1e-4  # the score of the largest logit is the largest score but for rounding: sigmoids are not monotone


def iou_overlap(boxes: Tensor, others: Tensor, beta: float) -> Tensor:
    """Plain IoU [K] of row with row."""
    return paired_iou(boxes, others)


def diou_overlap(boxes: Tensor, others: Tensor, beta: float) -> Tensor:
    """IoU - (d / c)^beta [K] of row with row: d squared distance of the centers, c squared diagonal of the hull.

    Zheng et al. 2020, with Darknet's exponent.
    """
    low = torch.minimum(boxes[:, :2], others[:, :2])
    high = torch.maximum(boxes[:, 2:], others[:, 2:])
    offset = (boxes[:, :2] + boxes[:, 2:] - others[:, :2] - others[:, 2:]) / 2
    diagonal = (high - low).square().sum(-1).clamp(min=torch.finfo(boxes.dtype).tiny)
    return paired_iou(boxes, others) - (offset.square().sum(-1) / diagonal).pow(beta)


def greedy_overlap(boxes: Tensor, others: Tensor, beta: float) -> Tensor:
    """Darknet's greedynms: as diounms with the exponent 0.6, whatever beta_nms says."""
    return diou_overlap(boxes, others, 0.6)


NMS_KINDS: dict[str, Callable] = {"default": iou_overlap, "greedynms": greedy_overlap, "diounms": diou_overlap}


@torch.no_grad()
def postprocess(
    preds: Predictions,
    *,
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    max_det: int = 300,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = True,
    kind: str = "default",
    beta_nms: float = 0.6,
    size: tuple[int, int] = (1, 1),
) -> list[Detections]:
    """What is in each picture: a list of B Detections, boxes in pixels of the network's input, best first, not clipped.

    Args:
        conf_thres: objectness and score (objectness * class * quality) must both be greater.
        iou_thres: a box is dropped if its overlap with a better one that was kept is greater.
        max_det: at most so many boxes per picture.
        classes: only these classes, None for all.
        agnostic: boxes of different classes suppress each other, too.
        multi_label: a slot may be reported under several classes (Darknet); otherwise only under its best one.
        kind, beta_nms: how overlap is measured, a key of ``NMS_KINDS``, and its exponent.
        size: (H, W) of the input. Distances are measured in its heights and widths, as in Darknet, which takes those of
            the picture: the same for stretched pictures; for letterboxed ones that are not square it can decide
            otherwise on a box near the threshold.

    A slot with a box or score that is not finite is never kept, but counted (``num_invalid``). Errors: UserError for a
    class that the network does not have.
    """
    assert conf_thres >= 0 and max_det >= 0
    preds = refined(preds)
    num_classes = preds.cls.shape[-1]
    unknown = [number for number in classes or () if not 0 <= number < num_classes]
    if unknown:
        raise UserError("classes", f"{unknown[0]}: expected 0..{num_classes - 1}, the network's classes")
    wanted = torch.zeros(num_classes, device=preds.cls.device)
    wanted[list(range(num_classes) if classes is None else classes)] = 1
    num_groups = 1 if agnostic else num_classes  # candidates of one group are rivals
    measure, aspect = NMS_KINDS[kind], preds.boxes.new_tensor([1, size[1] / size[0]] * 2)

    detections = []
    objectness = preds.obj.sigmoid()
    factors = objectness if preds.quality is None else objectness * preds.quality
    for boxes, logits, confidence, factor in zip(preds.boxes, preds.cls, objectness, factors):
        slots = (~(confidence <= conf_thres)).nonzero().squeeze(1)  # what is no number comes with them, to be counted
        reach = logits.index_select(0, slots).amax(dim=1).sigmoid() * factor[slots]
        far = (~(reach < conf_thres * MARGIN)).nonzero().squeeze(1)
        slots, reach = slots[far], reach[far]
        valid = boxes.index_select(0, slots).flatten(1).isfinite().all(-1) & reach.isfinite()
        num_found, slots = len(slots), slots[valid.nonzero().squeeze(1)]
        num_invalid = num_found - len(slots)
        boxes = boxes.index_select(0, slots).flatten(0, -2)  # [M, 4]
        shared = num_classes if preds.boxes.ndim == 3 else 1  # candidates per box
        measured = boxes * aspect
        scores = logits.index_select(0, slots).sigmoid() * factor[slots, None]
        if not multi_label:
            scores = _best_class_only(scores)
        if classes is not None:
            scores = scores * wanted

        def conflicts(rows: Tensor, others: Tensor, ahead: int, boxes=measured, shared=shared):
            """Positions of all pairs (row i, other k <= i + ahead) of one group that overlap too much."""
            rivals = (rows % num_groups)[:, None] == others % num_groups
            worse, better = rivals.tril(ahead).nonzero(as_tuple=True)
            pair = [
                boxes.index_select(0, (side // shared).index_select(0, at))
                for side, at in ((rows, worse), (others, better))
            ]
            over = (measure(*pair, beta_nms) > iou_thres).nonzero().squeeze(1)
            return worse[over], better[over]

        kept = _suppress(_best_first(scores, conf_thres), conflicts, slots[:0], max_det)
        scores = scores.flatten()[kept]
        found = {"boxes": boxes[kept // shared], "scores": scores, "labels": kept % num_classes}
        detections.append(Detections(**found, num_invalid=num_invalid))
    return with_masks(preds.refine["mask"], detections) if "mask" in preds.refine else detections


def _best_class_only(scores: Tensor) -> Tensor:
    """Scores [R, C] with all but the (first) best of each row set to 0."""
    best = scores.argmax(dim=1, keepdim=True)
    return torch.zeros_like(scores).scatter_(1, best, scores.gather(1, best))


def _best_first(scores: Tensor, threshold: float) -> Iterator[Tensor]:
    """Positions in the flat ``scores`` [R, C] above the threshold in chunks, best first, equal scores by position.

    A pool holds the scores in ``floor < score <= ceiling``, so that the order is total; the next one starts where it
    ends. Fewer than ``FIRST_POOL`` rows, 8 times more in each further pool, have a score above the floor.
    """
    best = scores.amax(dim=1)
    pool, chunk, ceiling, floor = FIRST_POOL, CHUNK, float("inf"), float("inf")
    while floor > threshold:
        floor = max(float(best.topk(pool).values[-1]), threshold) if len(best) > pool else threshold
        rows = (best > floor).nonzero().squeeze(1)
        values = scores.index_select(0, rows).flatten()
        within = ((values > floor) & (values <= ceiling)).nonzero().squeeze(1)
        within = within[values[within].argsort(descending=True, stable=True)]
        num_classes = scores.shape[1]
        yield from (rows[within // num_classes] * num_classes + within % num_classes).split(chunk)
        ceiling, pool, chunk = floor, pool * 8, LARGEST_CHUNK


def _suppress(chunks: Iterable[Tensor], conflicts: Callable, kept: Tensor, max_det: int) -> Tensor:
    """``kept`` and the best candidates that are in conflict with none kept before them, at most ``max_det`` in all."""
    for chunk in chunks:
        if len(chunk) > CHUNK:
            free = torch.ones(len(chunk), dtype=torch.bool, device=chunk.device)
            free[conflicts(chunk, kept, len(kept))[0]] = False
            kept = _suppress(chunk[free].split(CHUNK), conflicts, kept, max_det)
        else:
            rows = torch.cat([kept, chunk])
            worse, better = conflicts(chunk, rows, len(kept) - 1)
            kept = rows[_survivors(len(rows), worse + len(kept), better)]
        if len(kept) >= max_det:
            break
    return kept[:max_det]


def _survivors(num: int, worse: Tensor, better: Tensor) -> Tensor:
    """Greedy suppression without a loop over rows: bool [num] from the pairs in conflict, ``worse`` > ``better``.

    A row survives if no survivor is in conflict with it and better. Repeating this for all rows at once settles at
    least one more row each time and ends at the only solution: after as many steps as the longest chain, about ten.
    """
    alive = torch.ones(num, dtype=torch.bool, device=worse.device)
    while True:
        settled = torch.ones_like(alive)
        settled[worse[alive[better]]] = False
        if torch.equal(settled, alive):
            return alive
        alive = settled

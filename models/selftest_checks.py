"""Questions to the real network, data and recipe, each with an answer in words: what a self-test asks.

Letters: B images, N objects, P slots, K rows of an assignment, L heads, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from models.assigners import build_targets
from models.learn_by_heart import Story
from models.losses import TrainStep, compute_loss
from models.postprocess import postprocess
from models.structures import Assignment, Predictions
from utils.boxes import paired_iou
from utils.metrics import DetectionMetrics, Evaluation
from utils.structures import Batch, Detections, Record, Targets

GOOD, BAD, UNSURE = "good", "bad", "unsure"
WORDS = {GOOD: "yes", BAD: "no", UNSURE: "look"}
ENOUGH_STEPS = 100  # after which a network that has learned nothing never will
LEARNS = 0.3  # mAP50 by heart, of a network whose mAP is not zero for want of learning
TINY = 4.0  # pixels of the input: no head sees smaller objects well
LOUD = 30.0  # a logit whose sigmoid is 1


@dataclass(frozen=True, kw_only=True)
class Check:
    """A question and what came of it."""

    question: str
    state: str  # GOOD, BAD or UNSURE
    answer: str
    cure: str = ""
    rows: Sequence[Sequence[str]] = ()  # a table: its first row is the head

    def __str__(self) -> str:
        cure = f"\n{'':57}{self.cure}" if self.cure else ""
        return f"{self.question:<50} {WORDS[self.state]:<5} {self.answer}{cure}"


# ------------------------------------------------------------------------------------------------------------- the data


def check_classes(names: Sequence[str], train: Sequence[Record], val: Sequence[Record]) -> Check:
    """Is every class that is measured also shown, and is there anything to measure?"""
    counts = [_counts(records, len(names)) for records in (train, val)]
    empty = sum(record.ignore.all() for record in train) / max(len(train), 1)
    rows = [("class", "boxes to learn", "boxes to measure")]
    rows += [(name, str(shown), str(measured)) for name, shown, measured in zip(names, *counts)]
    for what, found in zip(("training", "validation"), counts):
        if not found.sum():
            cure = "check the labels' folder and the class names of the data file"
            return _check(CLASSES, BAD, f"the {what} pictures have no object at all", cure, rows)
    unseen = [name for name, shown, measured in zip(names, *counts) if measured and not shown]
    if unseen:
        found = f"measured but never shown: {_some(unseen)}"
        return _check(CLASSES, BAD if len(unseen) == (counts[1] > 0).sum() else UNSURE, found, "split anew", rows)
    if empty > 0.5:
        found = f"{empty:.0%} of the training pictures have no object"
        return _check(CLASSES, UNSURE, found, "right if nothing is on them; else their labels are not found", rows)
    found = f"{counts[0].sum()} boxes to learn, {counts[1].sum()} to measure, {(counts[1] > 0).sum()} classes in both"
    return _check(CLASSES, GOOD, found, rows=rows)


def check_sizes(records: Sequence[Record], size: tuple[int, int]) -> Check:
    """Do the labels have sizes and places that objects have, letterboxed into an input of ``size`` (H, W)?"""
    kept = [record.boxes[~record.ignore] for record in records]
    scale = np.concatenate([np.full(len(boxes), min(np.divide(size, r.size))) for boxes, r in zip(kept, records)])
    relative = np.concatenate([boxes / np.tile(r.size[::-1], 2) for boxes, r in zip(kept, records)])
    boxes = np.concatenate(kept)
    shortest = (boxes[:, 2:] - boxes[:, :2]).min(axis=1) * scale
    tiny = float((shortest < TINY).mean())
    whole = float(((relative[:, 2:] - relative[:, :2]) > 0.98).all(axis=1).mean())
    spread = (relative[:, :2] + relative[:, 2:]).std(axis=0).max() / 2 if len(boxes) > 4 else 1.0
    low, middle, high = np.quantile(shortest, (0.05, 0.5, 0.95))
    found = f"at {size[1]} x {size[0]} the shorter side of a box is {low:.0f} .. {middle:.0f} .. {high:.0f} pixels"
    if tiny > 0.9:
        return _check(SIZES, BAD, f"{found}: {tiny:.0%} are below {TINY:g}", "normalised twice? or a larger --img-size")
    if whole > 0.9:
        return _check(SIZES, BAD, f"{whole:.0%} of the boxes cover the whole picture", "were they read in other units?")
    if spread < 0.01:
        return _check(SIZES, BAD, "all boxes have their middle at the same place", "look at the label files")
    if tiny > 0.2:
        return _check(SIZES, UNSURE, f"{found}: {tiny:.0%} are below {TINY:g}", "a larger --img-size")
    return _check(SIZES, GOOD, found)


def check_way(batches: Sequence[Batch], records: Sequence[Record], names: Sequence[str]) -> Check:
    """The labels as the network sees them, handed back as its predictions: all of them must be right."""
    score = _score(names, ((_truth(batch, row), batch, row) for batch in batches for row in range(len(batch))), records)
    found = f"ground truth as predictions scores mAP50-95 {score.map:.3f}"
    crowded = sum(len(record.labels) > 100 for record in records)
    if score.map >= 0.999:
        return _check(WAY, GOOD, found)
    if crowded:
        return _check(WAY, UNSURE, found, f"{crowded} pictures have more than 100 objects, and COCO counts 100")
    return _check(WAY, BAD, found, "please report it: labels must survive the way to the network and back")


# ---------------------------------------------------------------------------------------------------------- the network


def check_ceiling(step: TrainStep, batches: Sequence[Batch], records: Sequence[Record], names: Sequence[str]) -> Check:
    """What a network would score that says exactly what its targets ask of it: assigner, box code and suppression."""
    model, found, alone, num = step.model, [], 0, 0
    for batch in batches:
        ready = batch.to(_device(model))
        preds = _said(model, ready.images)
        if preds.refine:
            return _check(CEILING, UNSURE, "not asked: this network has two stages")
        rows = build_targets(preds, ready.targets, step.criterion.assigner).compact()
        alone += len(ready.targets) - len(rows.target.unique())
        num += len(ready.targets)
        perfect = postprocess(
            perfect_predictions(preds, ready.targets, rows, model.heads), conf_thres=0.001, iou_thres=0.6,
            size=tuple(batch.images.shape[2:]),
        )  # fmt: skip
        found += [(detections, batch, row) for row, detections in enumerate(perfect)]
    score = _score(names, found, records)
    answer = f"a network that says what it is taught scores mAP50 {score.map50:.3f}, mAP50-95 {score.map:.3f}"
    answer += f"; nobody answers for {alone} of {num} objects" if alone else ""
    cure = "python -m models.lint --anchors DATA, a larger --img-size; objects that overlap a lot suppress each other"
    state = BAD if not score.map50 >= 0.5 else UNSURE if score.map50 < 0.95 else GOOD
    return _check(CEILING, state, answer, "" if state == GOOD else cure)


def perfect_predictions(
    preds: Predictions, targets: Targets, rows: Assignment, heads: Sequence[nn.Module]
) -> Predictions:
    """The predictions that an assignment asks for, as near as each head's box code comes; the nearer the surer."""
    boxes = targets.boxes[rows.target].to(preds.boxes.dtype)
    said, level = torch.empty_like(boxes), preds.priors.level[rows.prior]
    for number, head in enumerate(heads):
        mine = level == number
        where = [part[rows.prior[mine]] for part in (preds.priors.center, preds.priors.size, preds.priors.stride)]
        said[mine] = head.coder.decode(head.coder.encode(boxes[mine], *where), *where)
    at = rows.image, rows.prior
    obj, cls = torch.full_like(preds.obj, -LOUD), torch.full_like(preds.cls, -LOUD)
    obj[at] = paired_iou(said, boxes).clamp(0.01, 1 - 1e-6).logit().to(obj.dtype)
    cls[(*at, targets.labels[rows.target])] = LOUD
    all_boxes = preds.boxes.detach().clone()
    all_boxes[at] = said
    return replace(preds, boxes=all_boxes, obj=obj, cls=cls, quality=None)


def check_gradient(step: TrainStep, batch: Batch) -> Check:
    """Does every head learn something from a batch? Norms of the gradient at its raw map, by loss term."""
    model, ready = step.model, batch.to(_device(step.model))
    step.train()
    step.zero_grad(set_to_none=True)
    outputs, size = model(ready.images.to(_dtype(model)) / 255), tuple(batch.images.shape[2:])
    terms = compute_loss(outputs, ready.targets, model, step.criterion, size)
    maps = [raw if isinstance(raw, Tensor) else raw[0] for raw in outputs]
    norms = np.array([_norms(term, maps) for term in terms.values()]).reshape(len(terms), len(maps)).T  # [L, terms]
    sum(terms.values()).backward()
    positives = _positives(step, ready, len(maps))
    rows = [("head", "stride", "objects' slots", *terms, "learns")]
    for number, head in enumerate(model.heads):
        stride = max(1, round(size[0] / maps[number].shape[2]))
        place = f"[{head.section.type}] {model.cfg.path}:{head.section.line}"
        moved = "yes" if np.isfinite(norms[number]).all() and norms[number].sum() else "no"
        rows.append((place, str(stride), positives[number], *(f"{norm:.3g}" for norm in norms[number]), moved))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    still = sum(parameter.grad is None or not parameter.grad.any() for parameter in weights)
    step.zero_grad(set_to_none=True)
    if not np.isfinite(norms).all():
        return _check(GRADIENT, BAD, "the gradient of a head is no number", "start from other --weights", rows)
    deaf = [row[0] for row in rows[1:] if row[-1] == "no"]
    if deaf:
        return _check(GRADIENT, BAD, f"no gradient reaches {_some(deaf)}", "another loss; see the recipe", rows)
    if not weights:
        return _check(GRADIENT, BAD, "every layer is frozen", "a smaller --freeze", rows)
    answer = f"all {len(maps)} heads; {len(weights) - still} of {len(weights)} tensors of the network move"
    silent = [row[0] for row in rows[1:] if row[2] == "0"]
    if silent:
        answer += f"; of these pictures no object is {_some(silent)}'s"
    return _check(GRADIENT, GOOD, answer, rows=rows)


def check_story(story: Story) -> Check:
    """Can it learn a few pictures by heart?"""
    num, score, (first, last) = len(story.losses), story.scores[-1][1], (story.losses[0], story.losses[-1])
    found = f"{len(story.batch)} pictures, {num} steps, {story.seconds:.0f} s: mAP50 {score:.3f} on them"
    found += f", loss {first:.3g} -> {last:.3g}"
    if story.is_learned:
        return _check(HEART, GOOD, found)
    if num < ENOUGH_STEPS and np.isfinite(last) and last < first:
        return _check(HEART, UNSURE, found, f"too slow here for {ENOUGH_STEPS} steps: a GPU, or a smaller --img-size")
    if score >= LEARNS:
        return _check(HEART, UNSURE, found, "it learns, if slowly: a larger network may do better")
    cure = "look at the pictures below: do the boxes lie on the objects, is the same thing labelled the same way?"
    return _check(HEART, BAD, found, cure)


# ------------------------------------------------------------------------------------------------------------ the parts

CLASSES = "Is what is measured also shown?"
SIZES = "Do the labels look like objects?"
WAY = "Do labels survive the way to the network and back?"
CEILING = "Could a perfect network score?"
GRADIENT = "Does every head learn?"
HEART = "Can it learn a few pictures by heart?"


def _said(model: nn.Module, images: Tensor) -> Predictions:
    model.eval()
    with torch.no_grad():
        return model.predict(images.to(_dtype(model)) / 255)


def _positives(step: TrainStep, ready: Batch, num_heads: int) -> list[str]:
    """Of each head, how many of its slots answer for an object; a second stage has none."""
    preds = _said(step.model, ready.images)
    rows = build_targets(preds, ready.targets, step.criterion.assigner).compact()
    counts = torch.bincount(preds.priors.level[rows.prior], minlength=len(preds.priors.grids)).tolist()
    return [*map(str, counts), *["-"] * (num_heads - len(counts))]


def _norms(term: Tensor, maps: Sequence[Tensor]) -> list[float]:
    if not term.requires_grad:
        return [0.0] * len(maps)
    grads = torch.autograd.grad(term, maps, retain_graph=True, allow_unused=True)
    return [0.0 if grad is None else grad.float().norm().item() for grad in grads]


def _truth(batch: Batch, row: int) -> Detections:
    mine = batch.targets.image == row
    labels = batch.targets.labels[mine]
    return Detections(boxes=batch.targets.boxes[mine], scores=torch.ones(len(labels)), labels=labels)


def _score(names: Sequence[str], found, records: Sequence[Record]) -> Evaluation:
    """Evaluate (detections in pixels of the input, batch, row) against the records."""
    metrics = DetectionMetrics(list(names))
    for detections, batch, row in found:
        info = batch.infos[row]
        metrics.update(detections.cpu().to_original(info), records[info.id])
    return metrics.compute()


def _check(question: str, state: str, answer: str, cure: str = "", rows: Sequence = ()) -> Check:
    return Check(question=question, state=state, answer=answer, cure=cure, rows=rows)


def _counts(records: Sequence[Record], num_classes: int) -> np.ndarray:
    labels = [record.labels[~record.ignore] for record in records]
    return np.bincount(np.concatenate([np.zeros(0, np.int64), *labels]), minlength=num_classes)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype

"""A few pictures, learned by heart: a network that cannot do that will not learn from a long training either."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn, optim

from models.losses import TrainStep
from models.predictor import Predictor
from utils.metrics import DetectionMetrics
from utils.structures import Batch, Detections, Record

LOOK_EVERY = 10  # steps
LEARNING_RATE = 2e-3  # of AdamW: enough for any network with batch norms
BN_MOMENTUM = 0.2  # so that what batch norms measure follows within a few dozen steps
CLIP_NORM = 10.0
BY_HEART = 0.9  # mAP50 on pictures that were shown again and again


@dataclass(kw_only=True)
class Story:
    """What happened. Detections are in pixels of the input, best first."""

    batch: Batch
    losses: list[float] = field(default_factory=list)  # a step each
    scores: list[tuple[int, float]] = field(default_factory=list)  # (step, mAP50)
    seconds: float = 0.0
    before: list[Detections] = field(default_factory=list)
    after: list[Detections] = field(default_factory=list)

    @property
    def is_learned(self) -> bool:
        return self.scores[-1][1] >= BY_HEART


def learn_by_heart(step: TrainStep, batch: Batch, names: Sequence[str], *, seconds: float) -> Story:
    """Teach a copy of the network one batch, until it knows it or the time is up.

    AdamW at one rate in float32, all layers free, whatever recipe and flags say: the question is whether network,
    labels and loss fit together.
    """
    step, story = copy.deepcopy(step).requires_grad_(True), Story(batch=batch)
    ready = batch.to(next(step.parameters()).device)
    predictor = Predictor(step.model, conf_thres=0.001, iou_thres=0.6)
    for module in step.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = BN_MOMENTUM
    optimizer = optim.AdamW(step.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    story.before, start = predictor(batch.images), time.perf_counter()
    while not story.scores or (not story.is_learned and story.seconds < seconds):
        step.train()
        total = sum(step(ready.images, ready.targets).values())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(step.parameters(), CLIP_NORM)
        optimizer.step()
        story.losses.append(total.item())
        story.seconds = time.perf_counter() - start
        if len(story.losses) % LOOK_EVERY == 0 or story.seconds >= seconds:
            story.after = predictor(batch.images)
            story.scores.append((len(story.losses), map50(story.after, batch, names)))
    return story


def map50(found: Sequence[Detections], batch: Batch, names: Sequence[str]) -> float:
    """Of detections in pixels of the input, against the batch's own targets; nan where it has no object."""
    metrics = DetectionMetrics(list(names))
    for row, detections in enumerate(found):
        mine = batch.targets.image == row
        boxes = batch.targets.boxes[mine].numpy()
        nobody = np.zeros(len(boxes), bool)
        record = Record(
            path=batch.infos[row].path,
            size=tuple(batch.images.shape[2:]),
            boxes=boxes,
            labels=batch.targets.labels[mine].numpy(),
            ignore=nobody,
            crowd=nobody,
            area=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        )
        metrics.update(detections.cpu(), record)
    return metrics.compute().map50

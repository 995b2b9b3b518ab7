"""Several looks at the same pictures, merged: test-time augmentation, ensembles, and both at once.

A view is one network looking at the batch in one size, mirrored or not. What all views found is merged by weighted box
fusion (Solovyev et al., 2021) of the library ``ensemble-boxes`` (MIT), no part of Matchbox's requirements: boxes of one
class that overlap become their average, weighted by score, and its score is the mean over all views, 0 where one found
nothing.

Letters: B images, C channels, H W height and width of the batch, n detections of a picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.predictor import Predictor
from utils.errors import UserError
from utils.structures import Detections
from utils.timing import Timer

OVERLAP = 0.55  # IoU from which boxes of two views are one object: the paper's
LOOKS = ((1.0, False), (1.0, True), (0.83, False), (1.2, False))  # of --augment: (scale of the input, mirrored)


@dataclass(frozen=True, kw_only=True)
class View:
    """``view(images) -> list[Detections]``, images uint8 [B, C, H, W] and boxes in their pixels, not the network's."""

    predict: Predictor
    scale: tuple[float, float] = (1.0, 1.0)  # of height and width, before they become multiples of the stride
    mirrored: bool = False

    def __call__(self, images: Tensor) -> list[Detections]:
        stride = self.predict.model.stride
        size = [max(round(side * scale / stride), 1) * stride for side, scale in zip(images.shape[2:], self.scale)]
        seen = _resized(images.to(self.predict.device, non_blocking=True), size)
        found = self.predict(seen.flip(3) if self.mirrored else seen)
        ratio = [images.shape[3] / size[1], images.shape[2] / size[0]] * 2
        return [replace(one, boxes=self._undone(one.boxes, size[1]) * one.boxes.new_tensor(ratio)) for one in found]

    def _undone(self, boxes: Tensor, width: int) -> Tensor:
        if not self.mirrored:
            return boxes
        left, top, right, bottom = boxes.unbind(1)
        return torch.stack([width - right, top, width - left, bottom], dim=1)


class Fusion:
    """``fusion(images) -> list[Detections]``: a `Predictor` made of views; its detections are on the CPU.

    Args:
        conf_thres: least score of what is merged. The views should look with less: a mean is lower than its largest.
        max_det: at most so many boxes per picture.
        agnostic, iou_thres: what is merged suppresses what overlaps it more, of whatever class.
        where: the flag that errors name.

    ``timer.seconds`` are those of all views together, and "fusion".

    Raises:
        UserError: the library is not installed, or a network has masks, which cannot be averaged so.
    """

    def __init__(
        self, views: Sequence[View], *, conf_thres: float, iou_thres: float, max_det: int, agnostic: bool, where: str
    ):
        if any(view.predict.model.cfg.has_masks for view in views):
            raise UserError(where, "networks with a [mask] cannot be merged", "look once, with one network")
        self.views, self.conf_thres, self.max_det = tuple(views), conf_thres, max_det
        self.rival_overlap = iou_thres if agnostic else None
        self.merge = _weighted_boxes_fusion(where)
        self.timer = Timer(views[0].predict.device)
        for view in views:
            view.predict.timer = self.timer

    def __call__(self, images: Tensor) -> list[Detections]:
        looks = [[one.cpu() for one in view(images)] for view in self.views]
        with self.timer("fusion"):
            return [self._merged(found, tuple(images.shape[2:])) for found in zip(*looks, strict=True)]

    def _merged(self, found: Sequence[Detections], size: tuple[int, int]) -> Detections:
        """What the views found in one picture, whose canvas is of ``size`` (H, W)."""
        sides = np.array([size[1], size[0]] * 2, np.float64)  # the library takes boxes relative to the picture
        boxes = [(one.boxes.double().numpy() / sides).clip(0, 1) for one in found]
        inside = [(each[:, :2] < each[:, 2:]).all(axis=1) for each in boxes]
        merged, scores, labels = self.merge(
            [each[rows] for each, rows in zip(boxes, inside)],
            [one.scores.double().numpy()[rows] for one, rows in zip(found, inside)],
            [one.labels.numpy()[rows] for one, rows in zip(found, inside)],
            iou_thr=OVERLAP,
        )
        sure = np.flatnonzero(scores > self.conf_thres)  # the library sorts
        detections = Detections(
            boxes=torch.from_numpy(merged[sure] * sides).to(found[0].boxes.dtype),
            scores=torch.from_numpy(scores[sure]).to(found[0].scores.dtype),
            labels=torch.from_numpy(labels[sure]).long(),
            num_invalid=sum(one.num_invalid for one in found),
        )
        if self.rival_overlap is not None:
            from torchvision.ops import nms  # as slow to import as torch

            detections = detections[nms(detections.boxes, detections.scores, self.rival_overlap)]
        return detections[: self.max_det]


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """uint8 [B, C, H, W] of another size, bilinear, all pixels read."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)


def _weighted_boxes_fusion(where: str) -> Callable:
    """(boxes, scores, labels: each a list with an array per view) -> merged boxes, scores, labels, best first."""
    try:
        from ensemble_boxes import weighted_boxes_fusion
    except ImportError as error:
        hint = "pip install ensemble-boxes"
        raise UserError(where, f"needs the package ensemble-boxes: {error}", hint) from error
    return weighted_boxes_fusion

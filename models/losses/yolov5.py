"""The YOLOv5 loss: the YOLO loss with levels of unequal weight, summed over the images of a step.

Letters: B images, P slots, K rows of the assignment, C classes, L levels (heads).
"""

from functools import partial

import torch
from torch import Tensor

from models.losses.functional import bce, bce_blur, focal, quality_focal
from models.losses.yolo import YoloLoss, objectness_targets
from models.structures import Assignment, Grid, Predictions
from utils.distributed import all_reduce_mean
from utils.errors import nearest
from utils.structures import Targets

MODULATIONS = {"focal": focal, "quality_focal": quality_focal, "bce_blur": bce_blur}
BALANCE = {3: (4.0, 1.0, 0.4)}  # by the number of levels, finest first
OTHER_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)  # as many as there are levels; further ones like the last
MEMORY = 0.9999  # share of its old weight that a level keeps in a step of autobalance


class Yolov5Loss(YoloLoss):
    """Box, objectness and class loss of YOLOv5; the defaults are its published ones for training from scratch.

    The three terms are those of ``YoloLoss`` (the same means per level and over all processes). What differs:

    * the objectness of a level counts by its ``balance``, finest level first: 4, 1, 0.4 for three, else as many as
      there are of 4, 1, 0.25, 0.06, 0.02. With ``autobalance`` the weights follow the losses: after each training step
      ``w = 0.9999 * w + 0.0001 / obj loss of the level``, then all are divided by the one of the stride-16 level (or
      the nearest to it: the peer raises where there is none). The state is a buffer and travels in checkpoints;
    * gains are written for 3 levels, 80 classes and 640 x 640 pixels. The peer's trainer rescales them; here that
      happens in ``scaled_gains`` and nowhere else;
    * ``sums_images``: the gradient of a step is that of the sum over its images (64 of them), not of the mean. The peer
      multiplies the loss by the batch size and adds up the gradients of the accumulated batches; here the terms stay
      means, comparable between batch sizes, and ``utils.trainer`` multiplies.

    Args:
        num_classes, heads: of the network; only the number of heads matters.
        iou, box, obj, cls, cls_pw, obj_pw, gr, label_smoothing: as in ``YoloLoss``.
        fl_gamma: 0 is plain BCE; above, BCE is modulated by ``focal`` or ``quality_focal`` with this exponent.
        modulation: focal, quality_focal or bce_blur, for obj and cls.
        duplicates: which of several rows on one slot names its objectness target: the ``last`` or, as with the peer's
            ``sort_obj_iou``, the one of ``highest`` IoU.
        autobalance: let the weights of the levels follow their losses.

    Raises:
        ValueError: a value out of range, naming it.

    Source: ultralytics/yolov5 v7.0, ``ComputeLoss`` and ``train.py``. Deviations: the image's area replaces the square
    of its longer side in the objectness gain; at a loss that is 0 or not finite autobalance leaves a weight as it is.
    """

    sums_images = True

    def __init__(
        self,
        *,
        num_classes: int,
        heads: tuple,
        iou: str = "ciou",
        box: float = 0.05,
        obj: float = 1.0,
        cls: float = 0.5,
        cls_pw: float = 1.0,
        obj_pw: float = 1.0,
        fl_gamma: float = 0.0,
        modulation: str = "focal",
        gr: float = 1.0,
        label_smoothing: float = 0.0,
        duplicates: str = "last",
        autobalance: bool = False,
    ):
        super().__init__(
            num_classes=num_classes,
            iou=iou,
            box=box,
            obj=obj,
            cls=cls,
            cls_pw=cls_pw,
            obj_pw=obj_pw,
            fl_gamma=fl_gamma,
            gr=gr,
            label_smoothing=label_smoothing,
        )
        if duplicates not in DUPLICATES:
            raise ValueError(f"duplicates is '{duplicates}', {nearest(duplicates, DUPLICATES)}")
        self.objectness_targets = DUPLICATES[duplicates]
        self.score = _score(modulation, fl_gamma)
        self.autobalance = autobalance
        first = BALANCE.get(len(heads), OTHER_BALANCE + OTHER_BALANCE[-1:] * len(heads))[: len(heads)]
        # float64: a step changes a weight by a ten-thousandth
        self.register_buffer("balance", torch.tensor(first, dtype=torch.float64), persistent=autobalance)

    def forward(self, preds: Predictions, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
        """Scalars ``box``, ``obj``, ``cls``, weighted, means over the images; the total is their sum."""
        levels = self.per_level(preds, targets, assignment)
        grids, strides = preds.priors.grids, _strides(preds)
        ranks = _ranks(grids)
        weights = torch.stack([self.balance[rank] for rank in ranks]).to(levels["obj"].dtype)
        if self.autobalance and self.training:
            self._rebalance(ranks, all_reduce_mean(levels["obj"]), strides)
        levels["obj"] = levels["obj"] * weights
        area = strides[0].prod() * (grids[0].rows * grids[0].columns)
        gains = self.scaled_gains(len(grids), area)
        return {name: gain * levels[name].sum() for name, gain in gains.items()}

    def scaled_gains(self, num_levels: int, area: Tensor) -> dict[str, float | Tensor]:
        """The gains of a network of ``num_levels`` heads on images of ``area`` px^2.

        The more levels are summed, the less each may weigh; the more cells an image has, the smaller the share of them
        that holds an object, and with it the mean objectness loss. (``cls`` already carries classes / 80.)
        """
        per_level = 3 / num_levels
        gains = {name: gain * per_level for name, gain in self.gains.items()}
        return gains | {"obj": gains["obj"] * area / 640**2}

    @torch.no_grad()
    def _rebalance(self, ranks: list[int], losses: Tensor, strides: Tensor) -> None:
        """Move the weights one step; ``losses`` [L] and ``strides`` [L, 2] in the order of the heads."""
        order = sorted(range(len(ranks)), key=ranks.__getitem__)  # heads, finest first
        losses = torch.stack([losses[level] for level in order]).to(self.balance.dtype)
        moved = MEMORY * self.balance + (1 - MEMORY) / losses
        moved = torch.where((losses > 0) & losses.isfinite(), moved, self.balance)
        nearest_16 = (strides.amax(1).log2() - 4).abs()
        base = torch.stack([nearest_16[level] for level in order]).argmin(0, keepdim=True)
        self.balance.copy_(moved / moved.gather(0, base))


def _score(modulation: str, fl_gamma: float):
    if modulation not in MODULATIONS:
        raise ValueError(f"modulation is '{modulation}', {nearest(modulation, MODULATIONS)}")
    if modulation == "bce_blur":
        if fl_gamma > 0:
            raise ValueError(f"fl_gamma is {fl_gamma}, but bce_blur has no exponent, expected 0")
        return bce_blur
    if modulation == "quality_focal" and fl_gamma == 0:
        raise ValueError("fl_gamma is 0, which is plain BCE; quality_focal expects more")
    return partial(MODULATIONS[modulation], gamma=fl_gamma) if fl_gamma > 0 else bce


def _ranks(grids: tuple[Grid, ...]) -> list[int]:
    """Place of each level from the finest to the coarsest, whatever order the cfg has them in."""
    order = sorted(range(len(grids)), key=lambda level: -grids[level].rows * grids[level].columns)
    return [order.index(level) for level in range(len(grids))]


def _strides(preds: Predictions) -> Tensor:
    """Cell width and height [L, 2] of every level, in pixels."""
    return torch.stack([preds.priors.stride[grid.start] for grid in preds.priors.grids])


def highest_objectness_targets(assignment: Assignment, strength: Tensor) -> Tensor:
    """Targets [B, P]: the largest strength [K] of the rows with weight on a slot, 0 where there is none."""
    shape = assignment.ignore.shape
    slot = assignment.image * shape[1] + assignment.prior
    strength = strength * (assignment.weight > 0)
    return strength.new_zeros(shape.numel()).scatter_reduce(0, slot, strength, "amax").view(shape)


DUPLICATES = {"last": objectness_targets, "highest": highest_objectness_targets}

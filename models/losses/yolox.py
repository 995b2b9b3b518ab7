"""The YOLOX loss: box, objectness and class terms, each summed and divided by the number of positives; late an L1.

Letters: B images, P slots, K rows of the assignment, C classes.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.coders import CornerOffsetExp
from models.losses.functional import bce, smooth_targets
from models.losses.yolo import objectness_targets
from models.structures import Assignment, Predictions, Priors
from utils.boxes import at_least_float32, paired_giou, paired_iou
from utils.distributed import all_reduce_mean
from utils.errors import nearest
from utils.structures import Targets

BOX_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of boxes [K, 4] and [K, 4]
    "iou_squared": lambda boxes, wanted: 1 - paired_iou(boxes, wanted).square(),
    "giou": lambda boxes, wanted: 1 - paired_giou(boxes, wanted),
}


class YoloxLoss(nn.Module):
    """Four terms, each a sum over its rows or slots, divided by the number of positives of the whole batch.

    * box: 1 - IoU^2 or 1 - GIoU;
    * obj: BCE of every slot that is not ignored, towards 1 where it answers for an object and 0 elsewhere;
    * cls: BCE over classes, towards the IoU of box and object (without gradient) at the object's class, 0 elsewhere;
    * l1: |difference| of the box and the object, both in YOLOX's code (centre in cells, log of the size): of a
      ``[yolox]`` head these are its raw outputs. Only in the last ``l1_epochs``; 0 before. ``set_epoch`` says when.

    The number of positives is the sum of ``Assignment.weight``, averaged over all processes, at least 1.

    Args:
        num_classes: of the network.
        box_loss: which of ``BOX_LOSSES``.
        box, obj, cls, l1: gains.
        l1_epochs: how many epochs at the end have the L1 term; in YOLOX those without mosaic and mixup.

    Raises:
        ValueError: a value out of range, naming it.

    Source: YOLOX, ``YOLOXHead.get_losses`` and ``IOUloss``. Its GIoU of 0.1.0 subtracted the wrong area; ours is the
    later one. Its L1 target is ln(size + 1e-8), ours ln(size).
    """

    needs: ClassVar[tuple[str, ...]] = ("objectness",)

    def __init__(
        self,
        *,
        num_classes: int,
        box_loss: str = "iou_squared",
        box: float = 5.0,
        obj: float = 1.0,
        cls: float = 1.0,
        l1: float = 1.0,
        l1_epochs: int = 15,
    ):
        super().__init__()
        if box_loss not in BOX_LOSSES:
            raise ValueError(f"box_loss is '{box_loss}', {nearest(box_loss, BOX_LOSSES)}")
        for name, value in {"box": box, "obj": obj, "cls": cls, "l1": l1, "l1_epochs": l1_epochs}.items():
            if value < 0:
                raise ValueError(f"{name} is {value}, expected 0 or more")
        self.num_classes, self.box_loss = num_classes, BOX_LOSSES[box_loss]
        self.gains = {"box": box, "obj": obj, "cls": cls, "l1": l1}
        self.l1_epochs, self.with_l1 = l1_epochs, False

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Tell which epoch begins, counted from 0, of how many."""
        self.with_l1 = epoch >= epochs - self.l1_epochs

    def forward(self, preds: Predictions, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
        """Weighted scalars ``box``, ``obj``, ``cls``, ``l1``; the total is their sum."""
        image, prior, target = assignment.image, assignment.prior, assignment.target
        said = preds.read(image, prior)
        boxes = at_least_float32(said.boxes)
        wanted = targets.boxes[target].to(boxes.dtype)
        weight = assignment.weight.to(boxes.dtype)
        num_positives = all_reduce_mean(weight.sum()).clamp(min=1)

        iou = paired_iou(boxes.detach(), wanted)
        classes = smooth_targets(targets.labels[target], self.num_classes, 0.0, boxes.dtype) * iou[:, None]
        keep = (~assignment.ignore).to(boxes.dtype)
        late = coded_distance(preds.priors, prior, boxes, wanted) if self.with_l1 else torch.zeros_like(weight)
        terms = {
            "box": weight * self.box_loss(boxes, wanted),
            "obj": keep * bce(said.objectness, objectness_targets(assignment, torch.ones_like(weight))),
            "cls": weight * bce(said.cls, classes).sum(1),
            "l1": weight * late,
        }
        return {name: gain * terms[name].sum() / num_positives for name, gain in self.gains.items()}


def coded_distance(priors: Priors, prior: Tensor, boxes: Tensor, wanted: Tensor) -> Tensor:
    """Sum [K] of the four |differences| of two boxes [K, 4] in YOLOX's code, seen from the cell of slots ``prior``."""
    center, stride = priors.center[prior], priors.stride[prior]
    codes = (CornerOffsetExp().encode(some, center, stride, stride) for some in (boxes, wanted))
    return torch.sub(*codes).abs().sum(1)

"""The loss of Darknet's [yolo] layer, which is not written as a loss: its deltas, and what it prints.

Letters: B images, P slots, S slots of one head, K rows of the assignment, C classes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.assigners.best_anchor import best_overlap, is_confident
from models.losses.overlap_delta import overlap_delta
from models.losses.yolo import last_rows
from models.structures import Assignment, Grid, Predictions
from models.yolo_keys import YoloKeys
from utils.boxes import paired_giou, paired_iou, xyxy_to_xywh
from utils.structures import Targets


class Head(NamedTuple):
    """One head, and its rows of the assignment; those of other heads have weight 0."""

    key: YoloKeys
    grid: Grid
    preds: Predictions
    code: Callable  # boxes [K, 4] -> the raw outputs [K, 4] that give them in the rows' slots
    size: Tensor  # [4]: width, height, width, height of the image in pixels
    slot: Tensor  # int64 [K], picture * P + slot
    weight: Tensor  # [K]
    holds: Tensor  # bool [K]: weight above 0
    first: Tensor  # bool [K]: no earlier row on this slot
    labels: Tensor  # int64 [K]
    boxes: Tensor  # [K, 4] predicted by the slots
    truths: Tensor  # [K, 4] of the objects
    deltas: Tensor  # [K, 4] raw outputs of the slots
    anchors: Tensor  # [K, 2] of the slots
    multiplier: Tensor  # [K], by counters_per_class
    promoted: Tensor  # [K]: the IoU of a row by truth_thresh, else 0


class DarknetLoss(nn.Module):
    """Gradients of Darknet's ``[yolo]`` training, as the keys of each head's section ask for them; no recipe keys.

    Darknet defines deltas: minus the gradient with respect to the input of ``[yolo]``, that is to the logits, or with
    ``new_coords=1`` to their sigmoids. For many keys no loss has them as its gradient. So each term returned here has
    the *gradient* that Darknet uses and the *value* that it prints (the sum of squared deltas; for the IoU kinds
    ``iou_normalizer * mean(1 - IoU)``): what is shown is not what is minimised. Everything in a picture is summed,
    pictures are averaged. With O an output (sigmoid) and T its target, delta is

    * objectness: ``obj_normalizer * (T - O)``, T = 1 on a slot that answers for an object, else 0. With
      ``objectness_smooth`` T is the largest IoU with an object instead, where that is above ``ignore_thresh`` and a
      class above 0.25, also on slots that answer, which may so be pushed down; and IoU^2 on those by ``truth_thresh``;
    * class: T - O for every class. A second object on a slot changes its own class only: both are taught.
      ``label_smooth_eps`` e makes T 1 - e/2 and e/2, ``focal_loss`` multiplies. ``counters_per_class`` multiplies the
      object's class, objectness and box; only with it does ``cls_normalizer`` have an effect;
    * box, mse: ``iou_normalizer * (2 - w * h) * (T - O)`` for x, y in cells, and for the log (``new_coords``: half the
      root) of w, h in anchors; no sigmoid's derivative for x, y. w * h is the object's share of the image;
    * box, iou kinds: ``iou_normalizer * overlap_delta``, at most ``max_delta``;
    * deltas of several objects on a slot add up; with ``iou_thresh`` < 1 they are then divided by the number of its
      classes with a positive delta.

    Source: Darknet, ``yolo_layer.c`` (facts only). Deviations: ``delta_normalizer`` counts on every device (there on
    GPUs only); sizes are limited as in ``models.coders``; no gradient in ignore regions; rows of an assigner that
    weighs them count by their weight for box and class; with ``focal_loss``, ``label_smooth_eps`` has no effect.
    """

    needs = ("objectness", "[yolo] training keys")

    def __init__(self, *, heads: tuple):
        super().__init__()
        self.heads, self.keys = tuple(heads), [YoloKeys.read(head.section) for head in heads]
        for number, (head, key) in enumerate(zip(self.heads, self.keys)):
            multipliers = torch.tensor(key.multipliers or [1.0] * head.num_classes)
            self.register_buffer(f"multipliers{number}", multipliers, persistent=False)

    def forward(self, preds: Predictions, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
        """Scalars ``box``, ``obj``, ``cls``: Darknet's printed values with its gradients; means over the images."""
        image, prior = assignment.image, assignment.prior
        overlap, soft = self._overlaps(preds, targets)
        terms = dict.fromkeys(("box", "obj", "cls"), 0.0)
        for number, key in enumerate(self.keys):
            with torch.no_grad():
                head = self._head(number, preds, targets, assignment, overlap)
                cls, printed_cls, num_positive = _class_delta(head)
                box, printed_box = _box_delta(head, num_positive)
                obj, printed_obj = _objectness_delta(head, assignment, overlap, soft)
            for name, logits, delta, printed in (
                ("box", preds.deltas[image, prior], box, printed_box),
                ("obj", preds.obj[:, head.grid.slots], obj, printed_obj),
                ("cls", preds.cls[image, prior], cls, printed_cls),
            ):
                slope = -(key.delta_normalizer * delta * _input(key, logits)).sum()
                terms[name] = terms[name] + (printed + (slope - slope.detach())) / len(preds.obj)
        return terms

    def _overlaps(self, preds: Predictions, targets: Targets) -> tuple[Tensor, Tensor]:
        """Largest IoU [B, P] with an object, and the same where a class is confident; zeros where no key asks."""
        if not any(key.objectness_smooth or key.truth_thresh < 1 for key in self.keys):
            return torch.zeros_like(preds.obj), torch.zeros_like(preds.obj)
        overlap = best_overlap(preds, targets)
        return overlap, overlap * is_confident(preds)

    def _head(self, number: int, preds, targets, assignment, overlap) -> Head:
        image, prior, target = assignment.image, assignment.prior, assignment.target
        key, grid, priors = self.keys[number], preds.priors.grids[number], preds.priors
        stride = priors.stride[grid.start]
        size = torch.stack([stride[0] * grid.columns, stride[1] * grid.rows]).repeat(2)
        weight = (assignment.weight * (priors.level[prior] == number)).to(size.dtype)
        slot, holds = image * len(priors) + prior, weight > 0
        first = last_rows(slot.flip(0), holds.flip(0)).flip(0)
        iou = overlap[image, prior]
        return Head(
            key=key,
            grid=grid,
            preds=preds,
            code=partial(
                self.heads[number].coder.encode,
                center=priors.center[prior],
                size=priors.size[prior],
                stride=priors.stride[prior],
            ),
            size=size,
            slot=slot,
            weight=weight,
            holds=holds,
            first=first,
            labels=targets.labels[target],
            boxes=preds.boxes[image, prior],
            truths=targets.boxes[target].to(size.dtype),
            deltas=preds.deltas[image, prior],
            anchors=priors.size[prior],
            multiplier=getattr(self, f"multipliers{number}").to(size.dtype)[targets.labels[target]],
            promoted=torch.where(first & (iou > key.truth_thresh), iou, 0),
        )


def _input(key: YoloKeys, logits: Tensor) -> Tensor:
    """What the ``[yolo]`` layer is given: with new_coords the convolution before it has taken the sigmoid."""
    return logits.sigmoid() if key.new_coords else logits


def _objectness_delta(head: Head, assignment, overlap: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Deltas [B, S] of the objectness of a head's slots, and their printed value."""
    key, slots, shape = head.key, head.grid.slots, overlap.shape
    output, overlap, soft = head.preds.obj[:, slots].sigmoid(), overlap[:, slots], soft[:, slots]
    # of several rows on a slot the last one's multiplier counts; one by truth_thresh has none
    strength = torch.where(head.promoted > 0, 1, head.multiplier) * last_rows(head.slot, head.holds)
    strength = strength.new_zeros(shape.numel()).scatter_add(0, head.slot, strength).view(shape)[:, slots]
    raised = strength * (1 - output)
    if key.objectness_smooth:
        target = torch.where(soft > key.ignore_thresh, soft, 0)
        delta = torch.where(overlap > key.truth_thresh, overlap.square(), target) - output
        delta = torch.where((strength > 0) & (delta == 0), raised, delta)
    else:
        delta = torch.where(strength > 0, raised, -output)
    delta = key.obj_normalizer * torch.where(assignment.ignore[:, slots], 0, delta)
    return delta, _printed_share(key) * delta.square().sum()


def _class_delta(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Deltas [K, C] of the classes, their printed value, and how many of the classes of a row's slot [K] are positive.

    The first row of a slot sets every class; the last row of a slot and class decides on that one.
    """
    key, num_slots = head.key, head.preds.obj.numel()
    output = head.preds.cls.flatten(0, 1)[head.slot].sigmoid()
    own = head.labels[:, None]
    of_own = output.gather(1, own).squeeze(1)
    smooth = 0 if key.focal_loss else key.label_smooth_eps / 2
    scale = _focal_scale(of_own) if key.focal_loss else torch.ones_like(of_own)

    decided = head.multiplier * torch.where(head.first, scale, 1) * (1 - smooth - of_own)
    if key.multipliers is not None:
        decided = torch.where(head.first, key.cls_normalizer * decided, decided)
    if key.objectness_smooth:
        decided = torch.where(head.promoted > 0, head.multiplier * (head.promoted.square() - of_own), decided)
    # all rows of a slot see the other classes as its first row left them
    scale = scale.new_zeros(num_slots).scatter_add(0, head.slot, scale * head.first)[head.slot]
    others = scale[:, None] * (smooth - output)
    left = others.gather(1, own).squeeze(1)
    last = last_rows(head.slot * output.shape[1] + head.labels, head.holds)

    delta = (head.first[:, None] * others).scatter_add(1, own, (last * (decided - left))[:, None])
    printed = (head.first * others.square().sum(1) + last * (decided.square() - left.square())).sum()
    num_positive = head.first * (others > 0).sum(1) + last * ((decided > 0).long() - (left > 0).long())
    num_positive = num_positive.new_zeros(num_slots).scatter_add(0, head.slot, num_positive)[head.slot]
    return head.weight[:, None] * delta, _printed_share(key) * printed, num_positive


def _focal_scale(output: Tensor) -> Tensor:
    """Darknet's factor [K] of all classes' deltas, from the output of the true one: alpha 0.5, gamma 2."""
    output = output.clamp(min=1e-15)
    return -0.5 * (1 - output) * (2 * output * output.log() + output - 1)


def _box_delta(head: Head, num_positive: Tensor) -> tuple[Tensor, Tensor]:
    """Deltas [K, 4] of the boxes and their printed value."""
    key = head.key
    delta = (key.iou_normalizer * head.multiplier * head.weight)[:, None] * BOX_DELTAS[key.iou_loss](head)
    if key.iou_loss != "mse":
        delta = delta.clamp(-key.max_delta, key.max_delta)
    if key.iou_thresh < 1:
        delta = delta / num_positive.clamp(min=1)[:, None]
    if key.iou_loss == "mse":
        by_slot = delta.new_zeros(head.preds.obj.numel(), 4).index_add(0, head.slot, delta)
        return delta, by_slot.square().sum()
    counted = head.holds & (head.promoted == 0)
    iou = PRINTED_IOUS[key.iou_loss](head.boxes, head.truths)
    return delta, key.iou_normalizer * ((1 - iou) * counted).sum() / counted.sum().clamp(min=1)


def _mse_delta(head: Head) -> Tensor:
    """T - O of x, y in cells and of the coded w, h, times 2 - w * h."""
    boxes, truths = xyxy_to_xywh(head.boxes / head.size), xyxy_to_xywh(head.truths / head.size)
    columns_rows = head.size[:2] / head.preds.priors.stride[head.grid.start]
    center = (truths[:, :2] - boxes[:, :2]) * columns_rows
    size = _input(head.key, head.code(head.truths)[:, 2:]) - _input(head.key, head.deltas[:, 2:])
    return (2 - truths[:, 2:].prod(1, keepdim=True)) * torch.cat([center, size], dim=1)


def _iou_delta(head: Head) -> Tensor:
    """The overlap's delta; that of w and h times exp(raw) unless they are squares of sigmoids."""
    delta = overlap_delta(head.key.iou_loss, head.boxes / head.size, head.truths / head.size)
    if head.key.new_coords:
        return delta
    factor = (head.boxes[:, 2:] - head.boxes[:, :2]) / head.anchors
    return torch.cat([delta[:, :2], delta[:, 2:] * factor], dim=1)


def _printed_share(key: YoloKeys) -> float:
    return 1.0 if key.iou_loss == "mse" else key.obj_normalizer


BOX_DELTAS = {"mse": _mse_delta} | dict.fromkeys(("iou", "giou", "diou", "ciou"), _iou_delta)
PRINTED_IOUS = {"iou": paired_iou, "giou": paired_giou, "diou": paired_iou, "ciou": paired_iou}

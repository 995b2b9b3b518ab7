"""AutoAssign: how much a point counts for an object is learned, from where it stands and how well it predicts.

Letters: B images, N objects, P slots, C classes, K rows of the assignment.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.structures import Assignment, Predictions
from utils.boxes import at_least_float32, paired_giou, paired_iou
from utils.distributed import all_reduce_mean
from utils.structures import Targets

EPS = 1e-12
MOST = 100.0  # nats: what probability 0 costs, as in torch's BCE


class AutoAssignLoss(nn.Module):
    """Positive, negative and centre loss of AutoAssign; the defaults are its own.

    Per row, ``prior = weight * exp(-((point - centre) / stride - mean)^2 / (2 sigma^2))``, the product over x and y,
    with ``mean`` and ``sigma`` learned per class; ``confidence = sigmoid(cls of the object) * sigmoid(obj)``;
    ``p = confidence * exp(-box * (1 - GIoU))``.

    * pos: ``-log`` of the mean of p over the rows of an object, weighted by ``prior * exp(temperature * p)``; summed
      over objects, divided by their number (at least 1). An object without rows costs 100, without gradient;
    * neg: focal BCE against 0 of every slot and class, ``q^2 * -log(1 - q)`` with ``q = confidence * w``; divided by
      the sum of all priors (at least 1). w is 1 except for the class of an object on one of its rows: among these it
      falls from 1 at the worst box to 0 at the best, linearly in ``1 / (1 - IoU)``, with the IoU of whichever object
      of the picture the box fits best, and without gradient;
    * center: number of objects / sum of their priors, averaged over images; one without rows adds 0. It keeps the
      learned priors from shrinking away.

    Objectness is trained by neither a label nor a term of its own: it is a factor of every confidence (implicit).

    Numbers of objects and the sum of priors are averaged over all processes. Ignored slots have no negative loss. Of
    several rows on one slot and class the last one with weight sets w, on every device (the peer: on CPU). w is
    ill-conditioned where several boxes are perfect, but always in 0..1. Finite on every finite input.

    Args:
        num_classes: of the network; ``mean`` and ``sigma`` [C, 2] are learned.
        pos, neg, center: gains.
        box: how fast p falls with 1 - GIoU.
        temperature: of the confidence weighting.

    Raises:
        ValueError: a gain below 0.

    Source: Zhu et al. 2020, equations 2 to 9; mmdetection 3.3.0, ``AutoAssignHead``.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        num_classes: int,
        pos: float = 0.25,
        neg: float = 0.75,
        center: float = 0.75,
        box: float = 5.0,
        temperature: float = 3.0,
    ):
        super().__init__()
        for name, value in {"pos": pos, "neg": neg, "center": center, "box": box, "temperature": temperature}.items():
            if value < 0:
                raise ValueError(f"{name} is {value}, expected 0 or more")
        self.gains = {"pos": pos, "neg": neg, "center": center}
        self.box, self.temperature = box, temperature
        self.mean = nn.Parameter(torch.zeros(num_classes, 2))
        self.sigma = nn.Parameter(torch.ones(num_classes, 2))

    def forward(self, preds: Predictions, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
        """Weighted scalars ``pos``, ``neg``, ``center``; the total is their sum."""
        if assignment.weight.device.type == "cpu":
            assignment = assignment.compact()  # no sync to avoid there, and most rows of a table have no weight
        prior = self.center_prior(preds, targets, assignment)
        counts = torch.stack([prior.new_full((), len(targets)), prior.detach().sum()])
        num_objects, sum_priors = all_reduce_mean(counts).clamp(min=1).unbind()
        terms = {
            "pos": self._positive(preds, targets, assignment, prior).sum() / num_objects,
            "neg": self._negative(preds, targets, assignment).sum() / sum_priors,
            "center": self._center(targets, assignment, prior).mean(),
        }
        return {name: gain * terms[name] for name, gain in self.gains.items()}

    def center_prior(self, preds: Predictions, targets: Targets, assignment: Assignment) -> Tensor:
        """How much each row [K] counts for where its point stands, times its weight."""
        boxes = at_least_float32(targets.boxes)[assignment.target]
        priors, labels = preds.priors, targets.labels[assignment.target]
        offset = (priors.center[assignment.prior] - (boxes[:, :2] + boxes[:, 2:]) / 2) / priors.stride[assignment.prior]
        spread = (2 * self.sigma[labels].square()).clamp(min=EPS)
        # the product over x and y as a sum of exponents: the gradient of prod() asks the device whether a factor is 0
        prior = torch.exp(-((offset - self.mean[labels]).square() / spread).sum(-1)) * assignment.weight
        return prior.to(at_least_float32(preds.boxes).dtype)

    def _positive(self, preds: Predictions, targets: Targets, assignment: Assignment, prior: Tensor) -> Tensor:
        """Loss [N] of every object."""
        image, slot, target = assignment.image, assignment.prior, assignment.target
        obj, cls = at_least_float32(preds.obj[image, slot]), preds.cls[image, slot, targets.labels[target]]
        boxes = at_least_float32(preds.boxes[image, slot])
        giou = paired_giou(boxes, targets.boxes[target].to(boxes.dtype))
        p = obj.sigmoid() * at_least_float32(cls).sigmoid() * torch.exp(-self.box * (1 - giou))
        strength = torch.exp(self.temperature * p) * prior
        total = strength.new_zeros(len(targets)).index_add(0, target, strength)
        # of an object whose points all lie too far for float32, the gradient to its priors would be infinite
        strength = torch.where((total > EPS)[target], strength, strength.detach())
        share = strength / total.clamp(min=EPS)[target]
        return negative_log(p.new_zeros(len(targets)).index_add(0, target, p * share))

    def _negative(self, preds: Predictions, targets: Targets, assignment: Assignment) -> Tensor:
        """Loss [B, P, C] of every slot and class."""
        confidence = at_least_float32(preds.obj).sigmoid()[..., None] * at_least_float32(preds.cls).sigmoid()
        q = confidence * self._blame(preds, targets, assignment)
        return q.square() * negative_log(1 - q) * ~assignment.ignore[..., None]

    @torch.no_grad()
    def _blame(self, preds: Predictions, targets: Targets, assignment: Assignment) -> Tensor:
        """How much of a confidence [B, P, C] is wrong: 1, less where the box fits an object of that class well."""
        image, slot, target = assignment.image, assignment.prior, assignment.target
        taken = assignment.weight > 0
        fit = 1 / (1 - best_iou(preds, targets)[image, slot]).clamp(min=EPS)
        low = fit.new_full((len(targets),), math.inf)
        low = low.scatter_reduce(0, target, torch.where(taken, fit, math.inf), "amin")[target]
        high = fit.new_full((len(targets),), -math.inf)
        high = high.scatter_reduce(0, target, torch.where(taken, fit, -math.inf), "amax")[target]
        blame = 1 - (fit - low + EPS) / (high - low + EPS)

        shape = preds.cls.shape
        pair = (image * shape[1] + slot) * shape[2] + targets.labels[target]
        number = torch.where(taken, torch.arange(1, len(pair) + 1, device=pair.device), 0).to(torch.int32)
        last = torch.zeros(shape.numel(), dtype=torch.int32, device=pair.device).scatter_reduce(0, pair, number, "amax")
        wins = taken & (last[pair] == number)
        change = torch.where(wins, blame - 1, 0)
        return blame.new_ones(shape.numel()).scatter_add(0, pair, change).view(shape)

    def _center(self, targets: Targets, assignment: Assignment, prior: Tensor) -> Tensor:
        """Loss [B] of every image."""
        num_images = len(assignment.ignore)
        ones = torch.ones_like(targets.image, dtype=prior.dtype)
        num_objects = prior.new_zeros(num_images).index_add(0, targets.image, ones)
        sums = prior.new_zeros(num_images).index_add(0, assignment.image, prior)
        rows = prior.new_zeros(num_images).index_add(0, assignment.image, (assignment.weight > 0).to(prior.dtype))
        return torch.where(rows > 0, num_objects / sums.clamp(min=EPS), 0)


def best_iou(preds: Predictions, targets: Targets) -> Tensor:
    """IoU [B, P] of every predicted box with the object of its picture that it fits best; 0 without objects."""
    boxes = at_least_float32(preds.boxes)
    iou = paired_iou(boxes[targets.image], targets.boxes[:, None].to(boxes.dtype))  # [N, P]
    return iou.new_zeros(boxes.shape[:2]).scatter_reduce(0, targets.image[:, None].expand_as(iou), iou, "amax")


def negative_log(probability: Tensor) -> Tensor:
    """``-log`` of values in 0..1, at most 100; there and at 0 without gradient, where a plain log has infinity."""
    floor = torch.finfo(probability.dtype).tiny
    return torch.where(probability > floor, -probability.clamp(min=floor).log(), MOST).clamp(0, MOST)

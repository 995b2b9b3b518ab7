"""What several assigners decide about one batch, in numbers. For looking, not for training: it waits for the device.

Letters: B images, N objects, P slots, K rows of an assignment without those of weight 0, L levels, S assigners.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from models.assigners import ASSIGNERS, build_targets
from models.assigners.roi import Regions
from models.losses import Criterion, build_criterion
from models.structures import Assignment, Predictions, Priors
from utils.boxes import box_area
from utils.config import RECIPES, read_recipe
from utils.errors import UserError
from utils.structures import Targets

SIZES = {"small": 0.0, "medium": 32.0**2, "large": 96.0**2}  # from this area on, px^2 of the input (COCO's borders)


def build_criteria(model: nn.Module) -> tuple[dict[str, Criterion], dict[str, str]]:
    """Every assigner with the loss of its own recipe, and for those that this network cannot have, the reason.

    Of several recipes the first that fits. An assigner that no recipe names has its defaults and the yolo loss.
    """
    recipes = defaultdict(list)
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = read_recipe(path)
        recipes[recipe.assigner["name"]].append((recipe.assigner, recipe.loss, path))
    criteria, refused = {}, {}
    for name in ASSIGNERS:
        for assigner, loss, where in recipes[name] or [({"name": name}, {"name": "yolo"}, f"assigner {name}")]:
            try:
                criteria[name] = build_criterion(assigner, loss, model.num_classes, where, model.heads)
                break
            except UserError as error:
                refused.setdefault(name, str(error))
    return criteria, {name: reason for name, reason in refused.items() if name not in criteria}


def about(criterion: Criterion) -> str:
    """An assigner in one sentence: the first line of its file."""
    return (sys.modules[type(criterion.assigner).__module__].__doc__ or "").strip().split("\n")[0]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What each assigner (by name) decided about the same predictions and targets. All tensors are on the CPU."""

    assignments: Mapping[str, Assignment]  # compact
    targets: Targets
    priors: Priors
    # of a network in two stages: the proposals that its second stage learns from
    regions: Mapping[str, Regions] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.assignments)

    def per_object(self, name: str) -> np.ndarray:
        """How many slots answer for each object, int64 [N]."""
        return np.bincount(self.assignments[name].target, minlength=len(self.targets))

    def per_level(self, name: str) -> np.ndarray:
        """How many positives each head has, int64 [L]."""
        return np.bincount(self.priors.level[self.assignments[name].prior], minlength=len(self.priors.grids))

    def per_size(self, name: str) -> dict[str, float]:
        """Mean number of positives of the objects of each size; nan where there is no such object."""
        size, counts = size_of(self.targets.boxes), self.per_object(name)
        return {
            key: float(counts[size == row].mean()) if (size == row).any() else np.nan for row, key in enumerate(SIZES)
        }

    def alone(self, name: str) -> float:
        """Share of objects that nobody answers for."""
        return float((self.per_object(name) == 0).mean()) if len(self.targets) else np.nan

    def ignored(self, name: str) -> float:
        """Share of slots that are neither right nor wrong."""
        return self.assignments[name].ignore.double().mean().item()

    def agreement(self) -> np.ndarray:
        """[S, S]: of the pairs (slot, object) that either of two assigners has, the share that both have."""
        rows = [pairs(assignment) for assignment in self.assignments.values()]
        return np.array([[len(a & b) / len(a | b) if a | b else 1.0 for b in rows] for a in rows])

    def table(self) -> str:
        """The numbers as text, a line per assigner."""
        head = ("assigner", "positives", "per object", *SIZES, "nobody", "ignored")
        lines = [head]
        for name in self.names:
            counts = self.per_object(name)
            means = [counts.mean() if len(counts) else np.nan, *self.per_size(name).values()]
            cells = [*(f"{mean:.1f}" for mean in means), f"{self.alone(name):.0%}", f"{self.ignored(name):.0%}"]
            lines.append((name, f"{counts.sum()}", *("-" if cell.startswith("nan") else cell for cell in cells)))
        return "\n".join(f"{line[0]:<16}" + "".join(f"{cell:>11}" for cell in line[1:]) for line in lines)


def compare(preds: Predictions, targets: Targets, criteria: Mapping[str, Criterion]) -> Comparison:
    """Ask every assigner."""
    assignments = {
        name: _on_cpu(build_targets(preds, targets, criterion.assigner).compact())
        for name, criterion in criteria.items()
    }
    priors = preds.priors
    moved = {name: value.cpu() for name, value in vars(priors).items() if isinstance(value, Tensor)}
    regions = {
        name: _on_cpu(criterion.loss.regions(preds, targets)) for name, criterion in criteria.items() if preds.refine
    }
    priors = Priors(grids=priors.grids, **moved)
    return Comparison(assignments=assignments, targets=targets.to("cpu"), priors=priors, regions=regions)


def pairs(assignment: Assignment) -> set[tuple[int, int, int]]:
    """(image, slot, object) of every row."""
    return set(zip(assignment.image.tolist(), assignment.prior.tolist(), assignment.target.tolist()))


def size_of(boxes: Tensor) -> np.ndarray:
    """Which of ``SIZES`` each box [N, 4] has, int64 [N]."""
    return np.searchsorted(list(SIZES.values()), box_area(boxes).numpy(), side="right") - 1


def only(targets: Targets, image: int) -> Targets:
    """The objects and ignore regions of one picture, as a batch of one."""
    mine, ignored = targets.image == image, targets.ignore_image == image
    zeros = torch.zeros_like(targets.image[mine]), torch.zeros_like(targets.ignore_image[ignored])
    objects = zeros[0], targets.labels[mine], targets.boxes[mine]
    masks = None if targets.masks is None else targets.masks[mine]
    return Targets.of(*objects, zeros[1], targets.ignore_boxes[ignored], masks=masks)


def loss_shares(model: nn.Module, image: Tensor, targets: Targets, criterion: Criterion) -> dict[str, np.ndarray]:
    """Through whose slots each loss term pulls at the network: [n + 1] per term, its n objects and the background.

    A share is that of the summed absolute gradient with respect to the raw outputs of a slot. So it has one meaning for
    every loss, also where objects share a denominator and no single value belongs to one of them. A slot that answers
    for several objects is divided by weight. All zero where a term has no gradient.

    Args:
        image: float [1, C, H, W] in 0..1, of ``targets``.
    """
    with torch.no_grad():
        outputs = model(image)
    size = tuple(image.shape[-2:])
    parts = [head.decode(_leaf(raw), size) for head, raw in zip(model.heads, outputs)]
    preds = Predictions.cat(parts)
    parts = [part for part in parts if len(part.priors)]
    criterion = criterion.to(image.device).eval()
    assignment = build_targets(preds, targets, criterion.assigner)
    rows = _on_cpu(assignment.compact())
    on_slot = torch.bincount(rows.prior, rows.weight, minlength=len(preds.priors))
    raws = [tensor for part in parts for tensor in (part.deltas, part.obj, part.cls)]
    shares = {}
    for name, term in criterion.loss(preds, targets, assignment).items():
        grads = [None] * len(raws)
        if term.requires_grad:
            grads = torch.autograd.grad(term, raws, retain_graph=True, allow_unused=True)
        pull = torch.cat([_pull(grads[3 * level : 3 * level + 3], part) for level, part in enumerate(parts)]).cpu()
        mine = torch.bincount(rows.target, pull[rows.prior] * rows.weight / on_slot[rows.prior], minlength=len(targets))
        whole = torch.cat([mine, (pull.sum() - mine.sum()).clamp(min=0)[None]])
        shares[name] = (whole / whole.sum().clamp(min=torch.finfo(whole.dtype).tiny)).numpy()
    return shares


def _leaf(raw: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """A map to ask for the gradient of; the pyramid of a second stage, which has no slots, as it is."""
    return raw if isinstance(raw, tuple) else raw.float().requires_grad_()


def _pull(grads, part: Predictions) -> Tensor:
    """Summed absolute gradient [P] of one head's slots; None is no gradient."""
    total = torch.zeros(part.obj.shape[1], dtype=torch.float64, device=part.obj.device)
    for grad in grads:
        if grad is not None:
            total += grad[0].double().abs().flatten(1).sum(1) if grad.ndim > 2 else grad[0].double().abs()
    return total


def _on_cpu(rows: Assignment | Regions) -> Assignment | Regions:
    return type(rows)(**{name: value.cpu() for name, value in vars(rows).items()})

"""Laws of training for inputs drawn at random: losses and gradients are finite, whatever a network says."""

import itertools
import math
import random

import pytest
import torch

from models.assigners import ASSIGNERS
from models.losses import LOSSES, build_criterion
from tests.models.yolov3_case import ANCHORS, decode, make_heads, make_raws, make_targets

SIZE = (96, 128)
SLOTS = [name for name, loss in LOSSES.items() if "proposals" not in getattr(loss, "needs", ())]
PAIRS = [pytest.param(pair, id=" ".join(pair)) for pair in itertools.product(ASSIGNERS, SLOTS)]
DRAWS = 12  # of logits and targets, for each pair


def some_logits(draw: random.Random, raws: list[torch.Tensor]) -> list[torch.Tensor]:
    """In +-1e4: evenly, by magnitude, all the same, or only the two ends."""
    generator = torch.Generator().manual_seed(draw.randrange(2**32))

    def fill(raw):
        share, sign = torch.rand(raw.shape, generator=generator), torch.randn(raw.shape, generator=generator).sign()
        return {
            "even": 1e4 * share * sign,
            "magnitude": 10 ** (12 * share - 8) * sign,
            "ends": 1e4 * sign,
            "same": torch.full_like(raw, 1e4 * (2 * draw.random() - 1)),
        }[draw.choice(["even", "magnitude", "ends", "same"])]

    return [fill(raw.detach()).to(raw.dtype).requires_grad_() for raw in raws]


def some_objects(draw: random.Random) -> list[tuple]:
    """Legal targets: none, many, of a thousandth of a pixel, of the whole picture, one on the other, at the border."""
    height, width = SIZE
    rows = []
    for _ in range(draw.choice([0, 0, 1, 5, 40])):
        w, h = (min(side, 10 ** draw.uniform(-3, math.log10(side))) for side in (width, height))
        x, y = draw.choice([0.0, draw.uniform(0, width - w), width - w]), draw.choice([0.0, height - h])
        rows.append((draw.randrange(2), draw.randrange(3), x, y, x + w, y + h))
    return rows + rows[: draw.randrange(2)]


@pytest.mark.parametrize("pair", PAIRS)
def test_property_11_losses_are_finite_whatever_the_network_says(pair):
    heads = make_heads(num_classes=3)
    criterion = build_criterion({"name": pair[0]}, {"name": pair[1]}, 3, "test.yaml", heads)
    draw = random.Random(" ".join(pair))
    for number in range(DRAWS):
        raws, targets = some_logits(draw, make_raws(dtype=torch.float32)), make_targets(some_objects(draw))
        criterion.zero_grad()
        terms = criterion(decode(raws, ANCHORS, SIZE), targets)
        assert all(term.isfinite() for term in terms.values()), (number, terms)
        sum(terms.values()).backward()
        assert all(raw.grad is None or raw.grad.isfinite().all() for raw in raws), number
        assert all(own.grad is None or own.grad.isfinite().all() for own in criterion.parameters()), number

"""Whatever finite numbers a network says, in -1e4..1e4: loss and gradient are finite, every loss and assigner."""

import pytest
import torch

from models.assigners import ASSIGNERS
from models.cfg import parse_cfg
from models.darknet import Darknet
from models.losses import LOSSES, build_criterion, compute_loss
from tests.models.test_every_pair import HEADS, NET, REFUSED, needs
from tests.models.two_stage_case import OBJECTS as OBJECTS_OF_TWO_STAGES
from tests.models.two_stage_case import SIZE, make_criterion, make_images, make_network
from tests.models.two_stage_case import make_targets as two_stage_targets
from tests.models.yolov3_case import OBJECTS, make_targets

SCALE = 1e4
EXTREMES = {
    "all high": lambda shape, draw: torch.full(shape, SCALE),
    "all low": lambda shape, draw: torch.full(shape, -SCALE),
    "signs": lambda shape, draw: SCALE * (torch.randint(0, 2, shape, generator=draw) * 2 - 1),
    "any": lambda shape, draw: SCALE * (torch.rand(shape, generator=draw) * 2 - 1),
    "some": lambda shape, draw: (
        torch.randn(shape, generator=draw) * torch.where(torch.rand(shape, generator=draw) < 0.05, SCALE, 1.0)
    ),
    "zero": lambda shape, draw: torch.zeros(shape),
}
TARGETS = {
    "objects": lambda: make_targets(OBJECTS),
    "none": lambda: make_targets([]),
    "ignored": lambda: make_targets(OBJECTS, ignore=[(0, 0, 0, 64, 96)]),
    "tiny": lambda: make_targets([(0, 1, 10, 10, 10.01, 10.01), (1, 0, 0, 0, 128, 96)]),
}


@pytest.fixture(scope="module", params=HEADS)
def network(request):
    torch.manual_seed(0)
    model = Darknet(parse_cfg(NET + HEADS[request.param], "my.cfg"))
    return request.param, model, [output.shape for output in model(torch.zeros(2, 3, 96, 128))]


def assert_finite(terms, leaves, case):
    assert all(term.isfinite() for term in terms.values()), (case, terms)
    for gradient in torch.autograd.grad(sum(terms.values()), leaves, allow_unused=True):
        assert gradient is None or gradient.isfinite().all(), case


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_losses_of_extreme_logits_are_finite(network, assigner, loss):
    kind, model, shapes = network
    if needs(assigner, loss) & REFUSED[kind]:
        return  # refused: test_every_pair
    criterion = build_criterion({"name": assigner}, {"name": loss}, model.num_classes, heads=model.heads)
    draw = torch.Generator().manual_seed(5)
    for extreme, make in EXTREMES.items():
        for objects, targets in TARGETS.items():
            raws = [make(shape, draw).float().requires_grad_() for shape in shapes]
            assert_finite(compute_loss(raws, targets(), model, criterion, (96, 128)), raws, (extreme, objects))


@pytest.mark.parametrize("extreme", EXTREMES)
def test_two_stages(extreme):
    """The first stage's maps are extreme; the pyramid, which the second one reads, is in -1..1."""
    model, draw = make_network(), torch.Generator().manual_seed(5)
    criterion = make_criterion(model)
    with torch.no_grad():
        shapes = model(make_images())
    for objects in (OBJECTS_OF_TWO_STAGES, []):
        outputs, leaves = [], []
        for output in shapes:
            parts = output if isinstance(output, tuple) else (output,)
            scale = 1 / SCALE if isinstance(output, tuple) else 1
            made = [(EXTREMES[extreme](part.shape, draw).float() * scale).requires_grad_() for part in parts]
            leaves += made
            outputs.append(tuple(made) if isinstance(output, tuple) else made[0])
        assert_finite(compute_loss(outputs, two_stage_targets(objects), model, criterion, SIZE), leaves, objects)

"""Raw maps read slot by slot: the values and gradients of decoding everything, for every head."""

import pytest
import torch

from models.raw_predictions import RawPredictions
from models.structures import Predictions
from tests.models.test_heads import SECTIONS, _head, _raw

SIZE = (64, 96)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def rows(num_slots: int, num: int = 12):
    """Pictures and slots of all levels, some of them twice."""
    generator = torch.Generator().manual_seed(1)
    image, slot = torch.randint(2, (num,), generator=generator), torch.randint(num_slots, (num,), generator=generator)
    return torch.cat([image, image[:2]]), torch.cat([slot, slot[:2]])


@pytest.fixture(params=SECTIONS)
def heads(request):
    """Two heads of a kind, at strides 16 and 32; the second reaches farther."""
    section = SECTIONS[request.param]
    return _head(request.param), _head(request.param, section.replace("scale_x_y=1.1", "scale_x_y=1.3"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reading_slots_equals_decoding_all(heads, layout, dtype):
    raws = [_raw(head, rows=rows, columns=columns, dtype=dtype) for head, (rows, columns) in zip(heads, GRIDS)]
    raws = [raw.contiguous(memory_format=LAYOUTS[layout]).requires_grad_() for raw in raws]
    lazy = RawPredictions(heads, raws, SIZE)
    full = Predictions.cat([head.decode(raw, SIZE) for head, raw in zip(heads, raws)])
    place = rows(len(full.priors))
    assert torch.equal(lazy.obj, full.obj) and torch.equal(lazy.boxes, full.boxes)
    readings = lazy.read(*place), full.read(*place)
    for name, said, expected in zip(readings[0]._fields, *readings):
        torch.testing.assert_close(said, expected, rtol=1e-6, atol=1e-5, msg=name)
    mine, theirs = (
        torch.autograd.grad(sum((part * torch.linspace(1, 2, part.numel()).view_as(part)).sum() for part in said), raws)
        for said in readings
    )
    torch.testing.assert_close(mine, theirs)
    for gradient, raw in zip(mine, raws):
        assert gradient.stride() == raw.stride(), "in the layout of the network: nobody has to copy it"


GRIDS = ((4, 6), (2, 3))


def test_half_maps_are_read_in_float32():
    head = _head("yolo")
    raw = _raw(head, dtype=torch.float32).to(torch.bfloat16).requires_grad_()
    said = RawPredictions([head], [raw], SIZE).read(*rows(48))
    expected = RawPredictions([head], [raw.float()], SIZE).read(*rows(48))
    assert all(part.dtype == torch.float32 and torch.equal(part, other) for part, other in zip(said, expected))
    sum(part.sum() for part in said).backward()
    assert raw.grad.dtype == torch.bfloat16


def test_no_slot_is_a_reading_too():
    head = _head("yolo")
    raw = _raw(head).requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    said = RawPredictions([head], [raw], SIZE).read(none, none)
    assert said.boxes.shape == (0, 4) and said.cls.shape == (0, 3)
    said.objectness.sum().backward()
    gradient = head.values(raw.grad)
    assert (gradient[..., 4] == 1).all() and gradient.sum() == gradient[..., 4].numel()


def test_an_assigner_that_looks_first_does_not_cost_the_loss_its_gradient():
    head = _head("yolo")
    preds = RawPredictions([head], [_raw(head).requires_grad_()], SIZE)
    with torch.no_grad():
        preds.boxes, preds.obj  # noqa: B018
    assert preds.boxes.requires_grad and preds.obj.requires_grad


def test_other_names_are_no_field():
    with pytest.raises(AttributeError, match="masks"):
        RawPredictions([], [], SIZE).masks  # noqa: B018

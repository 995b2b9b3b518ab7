"""Box codes: inverse pairs, equal to the peers' own numbers, finite whatever the network says."""

import math

import numpy as np
import pytest
import torch

from models.coders import CODERS, AnchorDeltas, CornerOffsetExp, Distances, SigmoidExp, SigmoidSquare

ALL = [
    SigmoidExp(),
    SigmoidExp(1.2),
    SigmoidSquare(),
    SigmoidSquare(1.05),
    CornerOffsetExp(),
    Distances(),
    AnchorDeltas(),
    AnchorDeltas((10.0, 10.0, 5.0, 5.0)),
]


def _priors(num: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    stride = torch.tensor([16.0, 8.0], dtype=dtype).expand(num, 2)
    cells = torch.randint(0, 20, (num, 2), generator=generator)
    size = torch.rand(num, 2, generator=generator, dtype=dtype) * 80 + 8
    return (cells + 0.5) * stride, size, stride


def test_every_code_is_covered():
    assert set(CODERS.values()) == {type(coder) for coder in ALL}


@pytest.mark.parametrize("coder", ALL, ids=repr)
def test_decode_undoes_encode(coder):
    """Law: decode(encode(boxes)) == boxes for boxes within every code's reach, broadcast over a batch."""
    center, size, stride = _priors(500)
    generator = torch.Generator().manual_seed(1)
    middle = center + (torch.rand(3, 500, 2, generator=generator, dtype=torch.float64) - 0.5) * stride * 0.99
    extent = size * (torch.rand(3, 500, 2, generator=generator, dtype=torch.float64) * 3 + 0.2)
    extent = torch.maximum(extent, 2 * (middle - center).abs())  # distances need the point inside the box
    boxes = torch.cat([middle - extent / 2, middle + extent / 2], dim=-1)
    inside = (extent < 4 * size).all(-1)
    decoded = coder.decode(coder.encode(boxes, center, size, stride), center, size, stride)
    assert decoded.dtype == torch.float64 and inside.float().mean() > 0.9
    torch.testing.assert_close(decoded[inside], boxes[inside], rtol=0, atol=1e-7)


@pytest.mark.parametrize("coder", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_for_extreme_outputs_and_degenerate_boxes(coder, dtype):
    center, size, stride = _priors(7, dtype=dtype)
    extreme = torch.tensor([-1e4, -100.0, -7.0, 0.0, 7.0, 100.0, 1e4], dtype=dtype)
    deltas = extreme[:, None].expand(7, 4).clone().requires_grad_()
    boxes = coder.decode(deltas, center, size, stride)
    boxes.sum().backward()
    assert boxes.dtype == dtype
    assert boxes.isfinite().all() and deltas.grad.isfinite().all()
    zero_sized = torch.cat([center, center], dim=-1)
    far_away = torch.cat([center + 1e4, center + 3e4], dim=-1)
    for odd in (zero_sized, far_away):
        assert coder.encode(odd, center, size, stride).isfinite().all()


def test_gradient_is_zero_beyond_the_size_limit():
    center, size, stride = _priors(1)
    deltas = torch.tensor([[0.0, 0.0, 6.9, 7.0]], dtype=torch.float64, requires_grad=True)
    boxes = SigmoidExp().decode(deltas, center, size, stride)
    assert (boxes[0, 3] - boxes[0, 1]).item() == pytest.approx(1000 * size[0, 1].item())
    boxes[0, 2:].sum().backward()
    assert deltas.grad[0, 2] > 0 and deltas.grad[0, 3] == 0


def test_against_the_published_formulas():
    """Each code written out once more, cell by cell, as its paper or peer gives it."""
    column, row, stride, anchor = 3, 5, 8.0, (20.0, 36.0)
    raw = (0.3, -0.7, 0.2, -0.4)
    priors = [
        torch.tensor(v, dtype=torch.float64)
        for v in (((column + 0.5) * stride, (row + 0.5) * stride), anchor, (stride, stride))
    ]
    cells = [
        torch.tensor(v, dtype=torch.float64)
        for v in (((column + 0.5) * stride, (row + 0.5) * stride), (stride,) * 2, (stride,) * 2)
    ]
    deltas = torch.tensor(raw, dtype=torch.float64)

    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    def xyxy(cx, cy, w, h):
        return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]

    def check(coder, expected, at=priors):
        np.testing.assert_allclose(coder.decode(deltas, *at).numpy(), expected, rtol=1e-12)

    x, y, w, h = raw
    s = 1.1
    check(
        SigmoidExp(s),
        xyxy(
            (column + sigmoid(x) * s - (s - 1) / 2) * stride,
            (row + sigmoid(y) * s - (s - 1) / 2) * stride,
            math.exp(w) * anchor[0],
            math.exp(h) * anchor[1],
        ),
    )
    check(
        CODERS["yolov5"](),
        xyxy(
            (2 * sigmoid(x) - 0.5 + column) * stride,
            (2 * sigmoid(y) - 0.5 + row) * stride,
            (2 * sigmoid(w)) ** 2 * anchor[0],
            (2 * sigmoid(h)) ** 2 * anchor[1],
        ),
    )
    yolox = xyxy((x + column) * stride, (y + row) * stride, math.exp(w) * stride, math.exp(h) * stride)
    check(CornerOffsetExp(), yolox, cells)
    middle = ((column + 0.5) * stride, (row + 0.5) * stride)
    check(Distances(), [middle[0] - x * stride, middle[1], middle[0] + w * stride, middle[1]])


@pytest.mark.golden_case("functional/smooth_l1_box2box.npz")
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10, 10, 5, 5)])
def test_rcnn_deltas_equal_the_peer(case, weights):
    cases = np.load(case, allow_pickle=False)
    source, target = torch.from_numpy(cases["src_boxes"]), torch.from_numpy(cases["target_boxes"])
    center, size = (source[:, :2] + source[:, 2:]) / 2, source[:, 2:] - source[:, :2]
    coder, prefix = AnchorDeltas(tuple(map(float, weights))), "w{}_{}_{}_{}/".format(*weights)
    encoded = coder.encode(target, center, size, size)
    np.testing.assert_allclose(encoded.numpy(), cases[prefix + "get_deltas"], rtol=1e-5, atol=1e-5)
    deltas = torch.from_numpy(cases["deltas_in"]).requires_grad_()
    boxes = coder.decode(deltas, center, size, size)
    expected = cases[prefix + "apply_deltas"]
    np.testing.assert_allclose(boxes.detach().numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    boxes.sum().backward()
    gradient = cases[prefix + "apply_deltas@grad_deltas"]
    np.testing.assert_allclose(deltas.grad.numpy(), gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())
    per_class = torch.from_numpy(cases["deltas_in_3_classes"]).view(50, 3, 4)
    boxes = coder.decode(per_class, center[:, None], size[:, None], size[:, None]).flatten(1)
    expected = cases[prefix + "apply_deltas_3_classes"]
    np.testing.assert_allclose(boxes.numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())

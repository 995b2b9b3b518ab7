"""Heads: Darknet's own outputs, slot order, and what training and export need of a decode."""

import copy

import numpy as np
import pytest
import torch

from models.cfg import parse_cfg
from models.graph import build_graph
from models.heads import HEADS, GaussianYoloHead, RegionHead, YoloHead, softmax_logits
from models.section import CfgError
from models.structures import Predictions
from utils.boxes import xyxy_to_xywh

SECTIONS = {
    "yolo": "[yolo]\nmask=0,2\nanchors=10,14, 23,27, 37,58\nclasses=3\nnum=3\nscale_x_y=1.1",
    "new_coords": "[yolo]\nmask=0,2\nanchors=10,14, 23,27, 37,58\nclasses=3\nnum=3\nscale_x_y=2\nnew_coords=1",
    "Gaussian_yolo": "[Gaussian_yolo]\nmask=0,2\nanchors=10,14, 23,27, 37,58\nclasses=3\nnum=3\nscale_x_y=1.1",
    "region": "[region]\nanchors=0.6,0.9, 2.3,3.6\nclasses=3\nnum=2\nsoftmax=1",
}
FILTERS = {"yolo": 16, "new_coords": 16, "Gaussian_yolo": 24, "region": 16}


def _head(kind: str, section: str | None = None):
    activation = "logistic" if kind == "new_coords" else "linear"
    text = f"[net]\nwidth=96\nheight=64\nchannels=3\n[convolutional]\nfilters={FILTERS[kind]}\nsize=16\nstride=16\n"
    spec = build_graph(parse_cfg(f"{text}activation={activation}\n{section or SECTIONS[kind]}\n")).layers[-1]
    return HEADS[spec.section.type].from_spec(spec)


def _raw(head, *, images=2, rows=4, columns=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels = head.num_anchors * head.num_values
    return torch.randn(images, channels, rows, columns, generator=generator, dtype=dtype)


def _slowly(head, raw, size):
    """Darknet's rules for each slot on its own: rows of x1 y1 x2 y2, objectness, class probabilities, quality."""
    images, _, rows, columns = raw.shape
    stride_x, stride_y = size[1] / columns, size[0] / rows
    gaussian, region = isinstance(head, GaussianYoloHead), isinstance(head, RegionHead)
    scale, square = head.coder.scale_x_y, head.section.flag("new_coords")
    at = (0, 2, 4, 6) if gaussian else (0, 1, 2, 3)
    result = []
    for image in range(images):
        for anchor, (width, height) in enumerate(head.anchor_table):
            if region:
                width, height = width * stride_x, height * stride_y
            for row in range(rows):
                for column in range(columns):
                    first = anchor * head.num_values
                    logits = raw[image, first : first + head.num_values, row, column].double().numpy()
                    probability = 1 / (1 + np.exp(-logits))
                    cx = (probability[at[0]] * scale - (scale - 1) / 2 + column) * stride_x
                    cy = (probability[at[1]] * scale - (scale - 1) / 2 + row) * stride_y
                    if square:
                        w, h = (2 * probability[at[2]]) ** 2 * width, (2 * probability[at[3]]) ** 2 * height
                    else:
                        w, h = np.exp(logits[at[2]]) * width, np.exp(logits[at[3]]) * height
                    classes = probability[head.num_box_values :]
                    if region:
                        classes = np.exp(logits[5:]) / np.exp(logits[5:]).sum()
                    quality = 1 - probability[1:8:2].mean() if gaussian else 1.0
                    box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
                    result.append([*box, probability[head.objectness], *classes, quality])
    return torch.tensor(np.array(result)).view(images, -1, 4 + 1 + head.num_classes + 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", SECTIONS)
def test_decode_equals_darknets_rules_slot_by_slot(kind, layout):
    head, size = _head(kind), (64, 96)
    raw = _raw(head).contiguous(memory_format=layout)
    preds, expected = head.decode(raw, size), _slowly(head, raw, size)
    torch.testing.assert_close(preds.boxes, expected[..., :4], rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(preds.obj.sigmoid(), expected[..., 4])
    torch.testing.assert_close(preds.cls.sigmoid(), expected[..., 5:-1])
    if preds.quality is None:
        assert (expected[..., -1] == 1).all()
    else:
        torch.testing.assert_close(preds.quality, expected[..., -1])
    assert preds.boxes.dtype == preds.priors.center.dtype == torch.float64


@pytest.mark.parametrize("kind", SECTIONS)
def test_priors_name_the_slots(kind):
    head = _head(kind)
    priors = head.priors((4, 6), (64, 90))
    (grid,) = priors.grids
    assert len(priors) == grid.count == 48 and (grid.start, grid.anchors, grid.rows, grid.columns) == (0, 2, 4, 6)
    slot = 24 + 2 * 6 + 5  # anchor 1, row 2, column 5
    assert priors.center[slot].tolist() == [5.5 * 15, 2.5 * 16] and priors.stride[slot].tolist() == [15, 16]
    expected = head.anchors[1] * (priors.stride[slot] if kind == "region" else 1)
    torch.testing.assert_close(priors.size[slot], expected)
    assert priors.anchor[slot] == 1 and priors.center.dtype == torch.float32
    assert head.priors((4, 6), (64, 90)).center is priors.center, "kept between calls"


def test_heads_of_a_network_are_joined_in_order():
    head = _head("yolo")
    raws = [_raw(head), _raw(head, rows=2, columns=3, seed=1)]
    preds = Predictions.cat([head.decode(raw, (64, 96)) for raw in raws])
    assert [grid.start for grid in preds.priors.grids] == [0, 48] and preds.boxes.shape == (2, 60, 4)
    torch.testing.assert_close(preds.boxes[:, 48:], _slowly(head, raws[1], (64, 96))[..., :4])
    assert preds.priors.level[48:].eq(1).all()


@pytest.mark.parametrize("kind", SECTIONS)
def test_gradient_reaches_every_value_of_the_map(kind):
    head = _head(kind)
    raw = _raw(head, images=1, rows=1, columns=2, dtype=torch.float64).requires_grad_()

    def decoded(raw):
        preds = head.decode(raw, (16, 32))
        return [preds.boxes, preds.obj, preds.cls] + ([] if preds.quality is None else [preds.quality])

    assert torch.autograd.gradcheck(decoded, (raw,))
    sum(part.square().sum() for part in decoded(raw)).backward()
    assert (raw.grad != 0).all()


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_are_computed_in_float32(kind, dtype):
    head = _head(kind)
    raw = _raw(head, dtype=dtype) * 4
    preds, wide = head.decode(raw, (64, 96)), head.decode(raw.float(), (64, 96))
    assert preds.boxes.dtype == preds.cls.dtype == torch.float32
    assert torch.equal(preds.boxes, wide.boxes) and torch.equal(preds.cls, wide.cls)


def test_training_may_use_priors_that_inference_has_made():
    head = _head("yolo")
    with torch.inference_mode():
        head.decode(_raw(head, rows=3, columns=3), (33, 33))
    raw = _raw(head, rows=3, columns=3).requires_grad_()
    head.decode(raw, (33, 33)).boxes.square().sum().backward()
    assert raw.grad.isfinite().all()


def test_softmax_logits_are_exact_where_probabilities_saturate():
    logits = torch.tensor([[50.0, 0.0, -50.0], [1000.0, -1000.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    logits.requires_grad_()
    found = softmax_logits(logits)
    torch.testing.assert_close(found.sigmoid(), logits.softmax(-1), rtol=1e-12, atol=0)
    # log(1 - p) of the winner is where log(p / (1 - p)) would have lost everything
    assert found[0, 0].item() == pytest.approx(50.0) and found[1, 0].item() == pytest.approx(1000.0)
    (found.tanh() * torch.arange(3)).sum().backward()
    assert logits.grad.isfinite().all()
    assert softmax_logits(torch.zeros(2, 1)).sigmoid().tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("kind", SECTIONS)
def test_bias_is_rare_objects_and_rare_classes(kind):
    head = _head(kind)
    bias = torch.zeros(head.num_anchors * head.num_values)
    head.init_bias(bias)
    preds = head.decode(bias.view(1, -1, 1, 1), (16, 16))
    torch.testing.assert_close(preds.obj, torch.full_like(preds.obj, -4.5))
    expected = 1 / 3 if kind == "region" else torch.tensor(0.6 / 2.01).log().sigmoid().item()
    torch.testing.assert_close(preds.cls.sigmoid(), torch.full_like(preds.cls, expected))
    assert (preds.deltas == 0).all()


def test_heads_bring_nothing_into_checkpoints_and_can_be_copied():
    head = _head("yolo")
    assert not head.state_dict() and not list(head.parameters())
    assert head.mask == (0, 2) and head.all_anchors.shape == (3, 2) and head.anchors.tolist() == [[10, 14], [37, 58]]
    raw = _raw(head)
    assert torch.equal(copy.deepcopy(head).decode(raw, (64, 96)).boxes, head.decode(raw, (64, 96)).boxes)
    assert head(raw) is raw


@pytest.mark.parametrize(
    ("kind", "old", "new", "expected"),
    [
        ("region", "softmax=1", "softmax=1\ntree=data/9k.tree", r"<text>:\d+: a tree of classes"),
        ("region", "softmax=1", "softmax=0", r"<text>:\d+: \[region\] needs softmax=1, found 0"),
        ("Gaussian_yolo", "num=3", "num=3\nyolo_point=left_top", r"<text>:\d+: yolo_point=left_top"),
        ("yolo", "mask=0,2", "mask=0,3", r"<text>:\d+: mask"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(kind, old, new, expected):
    with pytest.raises(CfgError, match=expected):
        _head(kind, SECTIONS[kind].replace(old, new))


@pytest.mark.golden_case("darknet/micro/yolo_*.npz")
def test_decode_equals_darknets_layer_output(case):
    """The recorded layer output holds the box in cells and anchors; ours is undone to that."""
    cases = np.load(case, allow_pickle=False)
    graph = build_graph(parse_cfg(str(cases["cfg"])))
    head = YoloHead.from_spec(graph.layers[-1])
    before, after = (torch.from_numpy(cases[f"layer{index}"]).double() for index in (2, 3))
    square = head.section.flag("new_coords")
    size = cases["input"].shape[1:]
    preds = head.decode((before.logit() if square else before)[None], size)
    expected = after.view(head.num_anchors, head.num_values, -1).transpose(1, 2).flatten(0, 1)
    boxes, priors = xyxy_to_xywh(preds.boxes[0]), preds.priors
    corner = priors.center - priors.stride / 2
    torch.testing.assert_close((boxes[:, :2] - corner) / priors.stride, expected[:, :2], rtol=0, atol=1e-5)
    sizes = (2 * expected[:, 2:4]).square() if square else expected[:, 2:4].exp()
    torch.testing.assert_close(boxes[:, 2:] / priors.size, sizes, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(preds.obj[0].sigmoid(), expected[:, 4], rtol=0, atol=1e-5)
    torch.testing.assert_close(preds.cls[0].sigmoid(), expected[:, 5:], rtol=0, atol=1e-5)

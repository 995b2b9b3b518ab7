"""Darknet's training beyond the recorded cases: all keys against the rules written out cell by cell, and laws."""

import math

import pytest
import torch

from models.assigners import build_targets
from models.assigners.best_anchor import BestAnchor
from models.assigners.wh_iou import WhIoU
from models.coders import SigmoidExp, SigmoidSquare
from models.losses.darknet import DarknetLoss
from models.losses.overlap_delta import overlap_delta
from models.structures import Predictions
from tests.models.yolov3_case import ANCHORS, OBJECTS, make_heads, make_raws, make_targets
from utils.boxes import paired_ciou, paired_diou, paired_giou, paired_iou, xywh_to_xyxy

HEIGHT, WIDTH = SIZE = (96, 128)
TABLE = [pair for sizes in ANCHORS for pair in sizes]
# two objects in one slot, twice the same, one on the border, tiny ones, one the slots of seed 0 overlap well
ROWS = [*OBJECTS, (0, 0, 10, 10, 60, 70), (1, 2, 64, 32, 96, 64), (1, 0, 2, 3, 120, 90)]


def run(keys, raws=None, rows=ROWS, ignore=(), assigner=None):
    """(terms, gradients per head [B, A, h, w, 5 + C] of the sum over the pictures, assignment)."""
    coder = SigmoidSquare(2.0) if keys.get("new_coords") else SigmoidExp(keys.get("scale_x_y", 1.0))
    raws = make_raws(scale=1.5) if raws is None else raws
    heads = make_heads(num_classes=raws[0].shape[-1] - 5, coder=coder, **keys)
    maps = [raw.permute(0, 1, 4, 2, 3).flatten(1, 2) for raw in raws]
    preds = Predictions.cat([head.decode(raw, SIZE) for head, raw in zip(heads, maps)])
    targets = make_targets(rows, ignore)
    assignment = build_targets(preds, targets, assigner or BestAnchor(heads=heads))
    terms = DarknetLoss(heads=heads)(preds, targets, assignment)
    (sum(terms.values()) * len(preds.obj)).backward()
    return terms, [raw.grad for raw in raws], assignment


# --------------------------------------------------------------------------------------- the rules, cell by cell


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def iou_of(box1, box2):
    """Of (centre x, centre y, width, height)."""
    shared = 1.0
    for axis in (0, 1):
        low = max(box1[axis] - box1[axis + 2] / 2, box2[axis] - box2[axis + 2] / 2)
        high = min(box1[axis] + box1[axis + 2] / 2, box2[axis] + box2[axis + 2] / 2)
        shared *= max(high - low, 0)
    return shared / (box1[2] * box1[3] + box2[2] * box2[3] - shared)


def deltas_by_loops(raw, level, keys, rows=ROWS):
    """Deltas of one head as nested lists, written in the order in which Darknet writes them; iou_loss mse."""
    num_images, num_anchors, height, width, num_values = raw.shape
    num_classes, raw = num_values - 5, raw.tolist()
    mask = [3 * level, 3 * level + 1, 3 * level + 2]
    smooth, eps = keys.get("objectness_smooth", 0), keys.get("label_smooth_eps", 0)
    counters = [float(c) for c in keys["counters_per_class"].split(",")] if "counters_per_class" in keys else None
    factors = [min(max(counters) / c, keys.get("max_delta", math.inf)) for c in counters] if counters else None
    obj_norm, iou_norm = keys.get("obj_normalizer", 1), keys.get("iou_normalizer", 0.75)
    deltas = {}

    def of_class(out, delta, label):
        if delta[5 + label]:
            delta[5 + label] = (1 - eps / 2 - out[5 + label]) * (factors[label] if factors else 1)
            return
        if keys.get("focal_loss"):
            true = out[5 + label]
            scale = -0.5 * (1 - true) * (2 * true * math.log(true) + true - 1)
            for c in range(num_classes):
                delta[5 + c] = scale * ((c == label) - out[5 + c])
            return
        for c in range(num_classes):
            delta[5 + c] = (1 - eps / 2 if c == label else eps / 2) - out[5 + c]
            if factors and c == label:
                delta[5 + c] *= factors[c] * keys.get("cls_normalizer", 1)

    def of_box(out, delta, logits, place, anchor, truth, factor):
        goal = [truth[0] * width - place[0], truth[1] * height - place[1]]
        goal += [math.log(truth[2] * WIDTH / anchor[0]), math.log(truth[3] * HEIGHT / anchor[1])]
        for i, found in enumerate([out[0], out[1], logits[2], logits[3]]):
            delta[i] += (2 - truth[2] * truth[3]) * iou_norm * factor * (goal[i] - found)

    for image in range(num_images):
        truths = [
            (label, ((x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT))
            for which, label, x1, y1, x2, y2 in rows
            if which == image
        ]
        outputs = {}
        for a in range(num_anchors):
            for r in range(height):
                for c in range(width):
                    logits, anchor = raw[image][a][r][c], TABLE[mask[a]]
                    out = outputs[a, r, c] = [sigmoid(x) if i not in (2, 3) else x for i, x in enumerate(logits)]
                    delta = deltas[image, a, r, c] = [0.0] * num_values
                    size = [math.exp(logits[2]) * anchor[0] / WIDTH, math.exp(logits[3]) * anchor[1] / HEIGHT]
                    box = [(c + out[0]) / width, (r + out[1]) / height, *size]
                    ious = [iou_of(box, truth) for _, truth in truths]
                    best = max(ious, default=0)
                    matched = best if any(score > 0.25 for score in out[5:]) else 0
                    delta[4] = obj_norm * (0 - out[4])
                    if matched > keys.get("ignore_thresh", 0.5):
                        delta[4] = max(delta[4], obj_norm * (matched - out[4])) if smooth else 0
                    if best > keys.get("truth_thresh", 1):
                        label, truth = truths[ious.index(best)]
                        delta[4] = obj_norm * ((best**2 if smooth else 1) - out[4])
                        of_class(out, delta, label)
                        factor = factors[label] if factors else 1
                        if smooth:
                            delta[5 + label] = factor * (best**2 - out[5 + label])
                        of_box(out, delta, logits, (c, r), anchor, truth, factor)
        for label, truth in truths:
            alike = [iou_of((0, 0, w / WIDTH, h / HEIGHT), (0, 0, *truth[2:])) for w, h in TABLE]
            best = alike.index(max(alike))
            for n in [best, *(n for n in mask if n != best and alike[n] > keys.get("iou_thresh", 1))]:
                if n not in mask:
                    continue
                column, row = min(int(truth[0] * width), width - 1), min(int(truth[1] * height), height - 1)
                place = mask.index(n), row, column
                out, delta = outputs[place], deltas[(image, *place)]
                factor = factors[label] if factors else 1
                of_box(out, delta, raw[image][place[0]][row][column], (column, row), TABLE[n], truth, factor)
                raised = factor * obj_norm * (1 - out[4])
                if not smooth or delta[4] == 0:
                    delta[4] = raised
                of_class(out, delta, label)
        if keys.get("iou_thresh", 1) < 1:
            for place in outputs:
                delta = deltas[(image, *place)]
                if num_positive := sum(d > 0 for d in delta[5:]):
                    delta[:4] = [d / num_positive for d in delta[:4]]
    return deltas


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"ignore_thresh": 0.3},
        {"ignore_thresh": 0.2, "truth_thresh": 0.4},
        {"iou_thresh": 0.2},
        {"objectness_smooth": 1, "ignore_thresh": 0.3, "obj_normalizer": 0.4},
        {"objectness_smooth": 1, "ignore_thresh": 0.2, "truth_thresh": 0.35, "iou_thresh": 0.3},
        {"label_smooth_eps": 0.2, "iou_thresh": 0.3},
        {"focal_loss": 1, "iou_thresh": 0.3},
        {"counters_per_class": "100,10,1", "max_delta": 20, "cls_normalizer": 0.5, "truth_thresh": 0.4},
        {"counters_per_class": "5,10,1", "objectness_smooth": 1, "truth_thresh": 0.4, "cls_normalizer": 2},
    ],
)
def test_equals_the_rules_written_out(keys):
    raws = make_raws(scale=1.5)
    terms, gradients, _ = run(keys, raws)
    total = {"box": 0.0, "obj": 0.0, "cls": 0.0}
    for level, (raw, gradient) in enumerate(zip(raws, gradients)):
        expected = torch.zeros_like(gradient)
        for place, delta in deltas_by_loops(raw.detach(), level, keys).items():
            expected[place] = -torch.tensor(delta, dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
        for name, part in {"box": expected[..., :4], "obj": expected[..., 4], "cls": expected[..., 5:]}.items():
            total[name] += part.square().sum().item()
    for name, value in total.items():  # what is printed is the sum of squared deltas
        assert terms[name].item() * len(raws[0]) == pytest.approx(value, rel=1e-9)


# ------------------------------------------------------------------------------------------------------------ boxes

OVERLAPS = {"iou": paired_iou, "giou": paired_giou, "diou": paired_diou, "ciou": paired_ciou}


def pairs(num=200):
    generator = torch.Generator().manual_seed(4)
    boxes = torch.rand(2, num, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.1
    return xywh_to_xyxy(boxes[0]), xywh_to_xyxy(boxes[1])


def slope_of(overlap, boxes, truths):
    center = ((boxes[:, :2] + boxes[:, 2:]) / 2).requires_grad_()
    size = (boxes[:, 2:] - boxes[:, :2]).requires_grad_()
    overlap(xywh_to_xyxy(torch.cat([center, size], dim=1)), truths).sum().backward()
    return torch.cat([center.grad, size.grad], dim=1)


@pytest.mark.parametrize("kind", ["iou", "giou"])
def test_overlap_delta_is_the_slope_and_twice_it_for_sizes(kind):
    boxes, truths = pairs()
    slope, delta = slope_of(OVERLAPS[kind], boxes, truths), overlap_delta(kind, boxes, truths)
    torch.testing.assert_close(delta, slope * torch.tensor([1.0, 1, 2, 2], dtype=torch.float64))
    apart = paired_iou(boxes, truths) == 0
    assert apart.any() and (delta[apart] == 0).all() == (kind == "iou")


@pytest.mark.parametrize("kind", ["diou", "ciou"])
def test_boxes_that_do_not_meet_approach(kind):
    boxes, truths = pairs()
    apart = paired_iou(boxes, truths) == 0
    moved = boxes + 0.01 * overlap_delta(kind, boxes, truths)[:, :2].repeat(1, 2)
    gap = lambda boxes: ((boxes[:, :2] + boxes[:, 2:] - truths[:, :2] - truths[:, 2:]) / 2).norm(dim=1)  # noqa: E731
    assert apart.any() and (gap(moved) < gap(boxes))[apart].all()


@pytest.mark.parametrize("kind", OVERLAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_boxes_have_finite_deltas(kind, dtype):
    boxes = torch.tensor(
        [[0.2, 0.2, 0.2, 0.2], [0, 0, 1, 1], [0.1, 0.1, 0.3, 0.1], [-900, -900, 900, 900], [0.5, 0.5, 0.5, 0.6]],
        dtype=dtype,
    )
    for truths in (boxes, boxes.flip(0), boxes[:1].expand_as(boxes)):
        assert overlap_delta(kind, boxes, truths).isfinite().all()


@pytest.mark.parametrize("kind", OVERLAPS)
@pytest.mark.parametrize("new_coords", [0, 1])
def test_every_kind_of_box_delta_moves_boxes_towards_their_objects(kind, new_coords):
    raws = [raw.detach().requires_grad_() for raw in make_raws(scale=0.5)]
    keys = {"iou_loss": kind, "new_coords": new_coords, "iou_normalizer": 1, "max_delta": 5}
    rows = [(0, 0, 20, 20, 50, 55)]
    shown = []
    for _ in range(30):
        for raw in raws:
            raw.grad = None
        terms, gradients, _ = run(keys, raws, rows)
        shown.append(terms["box"].item())
        assert all((gradient.abs() <= 5).all() for gradient in gradients)
        with torch.no_grad():
            for raw, gradient in zip(raws, gradients):
                raw -= 0.1 * gradient
    assert shown[-1] < 0.5 * shown[0]


# ------------------------------------------------------------------------------------------------------------- laws


def test_shown_is_not_what_is_minimised():
    """v3's deltas are the gradient of cross-entropy, the value shown is the sum of their squares: the docs' example."""
    raws = make_raws()
    terms, gradients, assignment = run({"ignore_thresh": 0.99}, raws, [])
    logits = torch.cat([raw[..., 4].flatten() for raw in raws])
    cross_entropy = torch.nn.functional.softplus(logits).sum()  # of "no object" everywhere
    slopes = torch.autograd.grad(cross_entropy, raws)
    for gradient, slope in zip(gradients, slopes):
        torch.testing.assert_close(gradient, slope)
    assert terms["obj"].item() * 2 == pytest.approx(logits.sigmoid().square().sum().item())
    assert not assignment.ignore.any()


def test_a_step_is_the_mean_of_its_pictures():
    """Splitting a batch and averaging gives the same gradient: Darknet's rates fit every batch and accumulation."""
    whole = make_raws()
    _, gradients, _ = run({}, whole)
    for image in (0, 1):
        part = [raw.detach()[image : image + 1].clone().requires_grad_() for raw in whole]
        rows = [(0, *row[1:]) for row in ROWS if row[0] == image]
        _, alone, _ = run({}, part, rows)
        for ours, theirs in zip(gradients, alone):
            torch.testing.assert_close(ours[image : image + 1], theirs)


def test_an_overlapping_slot_is_forgiven_only_if_it_is_sure_of_a_class():
    raws = [torch.full_like(raw, -4) for raw in make_raws()]
    raws[0][0, 0, 1, 1] = torch.tensor([0.0, 0, 0, 0, 0, 1, -9, -9])  # predicts (48, 48), 62 x 45
    raws[0][0, 1, 1, 1] = torch.tensor([0.0, 0, 0, 0, 0, -2, -9, -9])  # 59 x 119 there, of no class above 0.25
    raws = [raw.requires_grad_() for raw in raws]
    rows = [(0, 1, 10, 8, 90, 88)]  # its best anchor is the third one
    _, gradients, assignment = run({"ignore_thresh": 0.4}, raws, rows)
    assert assignment.ignore.sum() == 1
    assert gradients[0][0, 0, 1, 1, 4] == 0 and gradients[0][0, 1, 1, 1, 4] != 0


def test_every_object_has_an_anchor_and_only_one():
    _, _, assignment = run({})
    assert sorted(assignment.compact().target.tolist()) == list(range(len(ROWS)))
    _, _, assignment = run({"iou_thresh": 0.2})
    assert len(assignment.compact().target) > len(ROWS)
    _, _, assignment = run({}, rows=[(0, 0, 30, 30, 30, 30)])
    assert len(assignment.compact().target) == 0, "an object without area has no shape"


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_kinds_of_iou_thresh_differ_by_what_they_take_off(kind):
    number = len(run({"iou_thresh": 0.4, "iou_thresh_kind": kind})[2].compact().target)
    plain = len(run({"iou_thresh": 0.4})[2].compact().target)
    assert number == plain if kind in ("iou", "diou") else number <= plain  # on one centre there is no distance


def test_objectness_smooth_can_push_a_positive_down():
    """A slot that answers for an object but whose box is bad keeps a negative delta: Darknet's rule 5."""
    rows = [(0, 0, 20, 20, 50, 55)]
    for smooth, sign in ((0, -1), (1, 1)):
        raws = [torch.full_like(raw, 1.5).requires_grad_() for raw in make_raws()]
        _, gradients, assignment = run({"objectness_smooth": smooth, "ignore_thresh": 0.9}, raws, rows)
        image, prior = assignment.compact().image, assignment.compact().prior
        gradient = torch.cat([part[..., 4].flatten(1) for part in gradients], dim=1)[image, prior]
        assert (gradient.sign() == sign).all() and len(gradient) == 1


def test_other_assigners_and_ignore_regions():
    region = (1, 60, 30, 100, 70)
    for assigner in (None, WhIoU()):
        _, gradients, assignment = run({"objectness_smooth": 1, "iou_loss": "ciou"}, ignore=[region], assigner=assigner)
        gradient = torch.cat([part.flatten(1, 3) for part in gradients], dim=1)
        assert assignment.ignore.any() and (gradient[assignment.ignore] == 0).all()
        assert all(part.isfinite().all() for part in gradients)

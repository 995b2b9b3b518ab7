"""YOLOv5 beyond its golden cases: the assigner's rule written out, the laws of its loss, the answers of the docs."""

import pytest
import torch

from models.assigners import build_targets
from models.assigners.ratio import Ratio
from models.assigners.wh_iou import WhIoU
from models.losses import Criterion
from models.losses.functional import bce, bce_blur
from models.losses.yolo import YoloLoss
from models.losses.yolov5 import Yolov5Loss
from tests.models.yolov3_case import ANCHORS, OBJECTS, decode, make_heads, make_raws, make_targets
from tests.utils.tiny import tiny_batch, tiny_step
from utils.boxes import paired_ciou
from utils.optim import Optim
from utils.run import PRECISIONS
from utils.structures import Targets
from utils.trainer import Trainer

SIZE = (96, 128)
HEADS = make_heads()


def loss_of(heads=HEADS, **keys) -> Yolov5Loss:
    return Yolov5Loss(num_classes=3, heads=heads, **keys)


def terms_of(loss, raws=None, targets=None, assigner=Ratio(), anchors=ANCHORS):  # noqa: B008
    raws = make_raws() if raws is None else raws
    preds = decode(raws, anchors, SIZE)
    targets = make_targets(OBJECTS) if targets is None else targets
    return loss(preds, targets, build_targets(preds, targets, assigner))


# ------------------------------------------------------------------------------------------------------------ assigner


def ratio_by_loops(preds, targets, anchor_t):
    """The rule written out: (image, prior, target) in the order head, place, anchor, object."""
    found = []
    for grid in preds.priors.grids:
        cell = SIZE[1] / grid.columns
        for place in ("own", "left", "up", "right", "down"):
            for anchor in range(grid.anchors):
                width, height = preds.priors.size[grid.start + anchor * grid.rows * grid.columns].tolist()
                for number, (x1, y1, x2, y2) in enumerate(targets.boxes.tolist()):
                    factors = [(x2 - x1) / width, (y2 - y1) / height]
                    if max(max(f, 1 / f) for f in factors) >= anchor_t:
                        continue
                    x, y = (x1 + x2) / 2 / cell, (y1 + y2) / 2 / cell
                    takes, x, y = {
                        "own": (True, x, y),
                        "left": (x % 1 < 0.5 and x > 1, x - 0.5, y),
                        "up": (y % 1 < 0.5 and y > 1, x, y - 0.5),
                        "right": ((grid.columns - x) % 1 < 0.5 and grid.columns - x > 1, x + 0.5, y),
                        "down": ((grid.rows - y) % 1 < 0.5 and grid.rows - y > 1, x, y + 0.5),
                    }[place]
                    if takes:
                        column, row = min(max(int(x), 0), grid.columns - 1), min(max(int(y), 0), grid.rows - 1)
                        slot = grid.start + (anchor * grid.rows + row) * grid.columns + column
                        found.append((targets.image[number].item(), slot, number))
    return found


def triples(assignment):
    rows = assignment.compact()
    return list(zip(rows.image.tolist(), rows.prior.tolist(), rows.target.tolist()))


@pytest.mark.parametrize("anchor_t", [1.5, 4.0])
def test_ratio_equals_its_rule_written_out(anchor_t):
    generator = torch.Generator().manual_seed(2)
    low = (torch.rand(60, 2, generator=generator) * 90 * 4).round() / 4  # quarters: exact halves of cells occur
    boxes = torch.cat([low, low + (torch.rand(60, 2, generator=generator) * 80).round() + 1], dim=1)
    targets = Targets.of(torch.arange(60) // 30, torch.zeros(60, dtype=torch.int64), boxes)
    preds = decode(make_raws(dtype=torch.float32), ANCHORS, SIZE)
    ours = triples(build_targets(preds, targets, Ratio(anchor_t=anchor_t)))
    assert ours == ratio_by_loops(preds, targets, anchor_t) and len(ours) > 100


def test_an_object_takes_the_cells_it_leans_to():
    preds = decode(make_raws(dtype=torch.float32), ANCHORS[:1], SIZE)  # 4 x 3 cells of 32 pixels
    grid = preds.priors.grids[0]

    def taken(x, y):
        targets = make_targets([(0, 0, x - 31, y - 22, x + 31, y + 22)])
        rows = build_targets(preds, targets, Ratio(anchor_t=1.1)).compact()
        return [(int(slot) % grid.columns, int(slot) // grid.columns % grid.rows) for slot in rows.prior]

    assert taken(40, 40) == [(1, 1), (0, 1), (1, 0)]  # in the upper left quarter of its cell
    assert taken(60, 56) == [(1, 1), (2, 1), (1, 2)]  # in the lower right one
    assert taken(48, 48) == [(1, 1)]  # in the very middle
    assert taken(8, 8) == [(0, 0)]  # the image ends left and above
    assert taken(120, 88) == [(3, 2)]
    assert taken(64, 48) == [(2, 1), (1, 1), (2, 1)]  # on the border between two cells: its own counts twice


def test_more_places_and_a_wider_shape_rule_give_more_positives_than_yolov3():
    preds, targets = decode(make_raws(), ANCHORS, SIZE), make_targets(OBJECTS)
    three, five = (len(build_targets(preds, targets, rule).compact().image) for rule in (WhIoU(), Ratio()))
    assert five > 2 * three


def test_a_factor_of_one_or_less_matches_nothing_and_is_refused():
    with pytest.raises(ValueError, match=r"anchor_t is 1\.0"):
        Ratio(anchor_t=1.0)


# ---------------------------------------------------------------------------------------------------------------- loss


def test_gains_are_rescaled_once():
    """box * 3/nl, cls * nc/80 * 3/nl, obj * (area / 640^2) * 3/nl: what the peer's trainer does before training."""
    plain = YoloLoss(num_classes=3, iou="ciou", box=0.05, obj=1.0, cls=0.5)
    for anchors in (ANCHORS, ANCHORS[:2], ANCHORS[:1]):
        raws = make_raws()[: len(anchors)]
        ours = terms_of(loss_of(make_heads(anchors)), raws, anchors=anchors)
        preds, targets = decode(raws, anchors, SIZE), make_targets(OBJECTS)
        levels = plain.per_level(preds, targets, build_targets(preds, targets, Ratio()))
        share = 3 / len(anchors)
        balance = {3: [0.4, 1.0, 4.0], 2: [1.0, 4.0], 1: [4.0]}[len(anchors)]  # these heads run from coarse to fine
        obj = sum(weight * term.item() for weight, term in zip(balance, levels["obj"]))
        assert ours["box"].item() == pytest.approx(0.05 * share * levels["box"].sum().item(), rel=1e-9)
        assert ours["cls"].item() == pytest.approx(0.5 * 3 / 80 * share * levels["cls"].sum().item(), rel=1e-9)
        assert ours["obj"].item() == pytest.approx(share * SIZE[0] * SIZE[1] / 640**2 * obj, rel=1e-9)


def test_the_order_of_the_heads_does_not_matter():
    raws, targets = make_raws(), make_targets(OBJECTS[:1] + OBJECTS[3:])
    plain, turned = loss_of(autobalance=True), loss_of(autobalance=True)
    ours = terms_of(plain, raws, targets)
    other = terms_of(turned, raws[::-1], targets, anchors=ANCHORS[::-1])
    for name in ours:
        assert ours[name].item() == pytest.approx(other[name].item(), rel=1e-12)
    assert torch.equal(plain.balance, turned.balance) and not torch.equal(plain.balance, loss_of().balance)


def test_five_heads_and_more_have_weights():
    assert loss_of(HEADS * 2).balance.tolist() == [4.0, 1.0, 0.25, 0.06, 0.02, 0.02]


def test_balance_travels_in_checkpoints_and_moves_in_training_only():
    loss = loss_of(autobalance=True)
    terms_of(loss)
    moved = loss.state_dict()["balance"]
    assert moved.tolist() != [4.0, 1.0, 0.4] and moved[1] == 1  # the level of stride 16 is the unit
    other = loss_of(autobalance=True)
    other.load_state_dict({"balance": moved.clone()})
    other.eval()
    terms_of(other)
    assert torch.equal(other.balance, moved)
    assert "balance" not in loss_of().state_dict()


@pytest.mark.parametrize("value", [-1e4, float("nan")])
def test_balance_survives_a_loss_of_zero_or_none(value):
    loss = loss_of(autobalance=True)
    terms_of(loss, [torch.full_like(raw, value) for raw in make_raws()], make_targets([]))
    assert loss.balance.tolist() == [4.0, 1.0, 0.4]


def test_without_a_stride_of_16_the_nearest_is_the_unit():
    loss = loss_of(make_heads(ANCHORS[::2]), autobalance=True)  # strides 32 and 8
    terms_of(loss, make_raws()[::2], anchors=ANCHORS[::2])
    assert (loss.balance == 1).sum() == 1


def test_highest_overlap_names_the_target_whatever_the_order():
    swapped = [OBJECTS[i] for i in (0, 2, 1, 3, 4, 5, 6)]  # objects 1 and 2 meet in the same slots
    by_order = [terms_of(loss_of(), targets=make_targets(rows))["obj"].item() for rows in (OBJECTS, swapped)]
    assert by_order[0] != pytest.approx(by_order[1], rel=1e-9)
    loss = loss_of(duplicates="highest")
    by_iou = [terms_of(loss, targets=make_targets(rows))["obj"].item() for rows in (OBJECTS, swapped)]
    assert by_iou[0] == pytest.approx(by_iou[1], rel=1e-12)

    preds, targets = decode(make_raws(), ANCHORS, SIZE), make_targets(OBJECTS)
    rows = build_targets(preds, targets, Ratio()).compact()
    strength = paired_ciou(preds.boxes[rows.image, rows.prior], targets.boxes[rows.target]).detach().clamp(min=0)
    expected = torch.zeros_like(preds.obj)
    for image, prior, value in zip(rows.image, rows.prior, strength):
        expected[image, prior] = max(expected[image, prior], value)
    assert torch.equal(loss.objectness_targets(rows, strength), expected)


@pytest.mark.parametrize("keys", [{"fl_gamma": 1.5}, {"fl_gamma": 1.5, "modulation": "quality_focal"}])
def test_modulations_are_the_functions_of_their_name(keys):
    plain, modulated = terms_of(loss_of()), terms_of(loss_of(**keys))
    assert modulated["box"] == plain["box"] and modulated["obj"] < plain["obj"] and modulated["cls"] < plain["cls"]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"modulation": "focla"}, "did you mean 'focal'"),
        ({"modulation": "bce_blur", "fl_gamma": 1.5}, "bce_blur has no exponent"),
        ({"modulation": "quality_focal"}, "quality_focal expects more"),
        ({"duplicates": "first"}, "known: highest, last"),
        ({"box": -1}, "box is -1"),
    ],
)
def test_values_out_of_range_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        loss_of(**keys)


# ------------------------------------------------------------------------------------------- the questions answered


def step_gradient(loss, *, batch_size, num_images=8):
    """Gradient of one optimiser step over ``num_images`` pictures, taken ``batch_size`` at a time."""
    step = tiny_step()
    # all objects have one shape and here one slot per anchor: each picture has the same number of rows
    step.criterion = Criterion(WhIoU(), loss(num_classes=2, heads=tuple(step.model.heads)))
    teacher = Trainer(
        step,
        optim=Optim(
            optimizer="sgd", lr0=1.0, momentum=0.0, weight_decay=0.0, warmup_epochs=0.0, nominal_batch=num_images
        ),
        device=torch.device("cpu"),
        precision=PRECISIONS["float32"],
        num_batches=num_images // batch_size,
        batch_size=batch_size,
        epochs=1,
    )
    teacher._move = lambda *_: None  # leave the gradient where it is
    teacher.train_epoch([tiny_batch(range(i, i + batch_size)) for i in range(0, num_images, batch_size)])
    return torch.cat([parameter.grad.flatten() for parameter in step.model.parameters()])


def test_a_step_follows_the_sum_over_its_images_however_they_are_split():
    """The gradient of a step of 8 is the same for batches of 8, 4 and 2, and eight times that of a mean over images."""
    whole = step_gradient(Yolov5Loss, batch_size=8)
    for batch_size in (4, 2):
        torch.testing.assert_close(step_gradient(Yolov5Loss, batch_size=batch_size), whole, rtol=1e-4, atol=1e-6)

    class Mean(Yolov5Loss):
        sums_images = False

    torch.testing.assert_close(whole, 8 * step_gradient(Mean, batch_size=8), rtol=1e-5, atol=1e-6)


def test_gr_is_how_far_objectness_follows_the_overlap():
    """With gr = 1 the target of a slot is the IoU of its own box, with 0 it is 1, between them the blend."""
    preds, targets = decode(make_raws(), ANCHORS, SIZE), make_targets(OBJECTS[:1])
    rows = build_targets(preds, targets, Ratio()).compact()
    iou = paired_ciou(preds.boxes[rows.image, rows.prior], targets.boxes[rows.target]).detach().clamp(min=0)
    for gr in (0.0, 0.25, 1.0):
        seen = []
        loss = loss_of(gr=gr)
        loss.score = lambda logits, wanted, pos_weight, seen=seen: seen.append(wanted) or bce(logits, wanted)
        loss(preds, targets, rows)
        torch.testing.assert_close(seen[0][rows.image, rows.prior], 1 - gr + gr * iou)


def test_gr_1_makes_the_score_say_how_well_the_box_fits():
    """Objectness is right when it equals its target: the IoU for gr = 1, certainty for gr = 0 however bad the box."""
    logits = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    for iou, gr, best in ((0.3, 1.0, 0.3), (0.9, 1.0, 0.9), (0.3, 0.0, 1.0), (0.9, 0.0, 1.0)):
        losses = bce(logits, torch.full_like(logits, 1 - gr + gr * iou))
        assert logits[losses.argmin()].sigmoid().item() == pytest.approx(best, abs=2e-3)


def test_bce_blur_forgives_confident_positives_without_a_label():
    """False positives are protected (they may be objects nobody drew), missed objects are not."""
    sure, unsure = torch.tensor(8.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    no, yes = torch.zeros_like(sure), torch.ones_like(sure)
    share = lambda logit, target: (bce_blur(logit, target) / bce(logit, target)).item()  # noqa: E731
    assert share(sure, no) < 0.01  # the network insists, the label says no: hardly any loss
    assert share(unsure, no) > 0.99  # an ordinary mistake counts in full
    assert share(-sure, yes) == pytest.approx(1)  # an object that is missed counts in full
    # and beyond a point the loss of an unlabelled positive falls again: the network is no longer pulled back
    logits = torch.tensor([1.0, 6.0], dtype=torch.float64, requires_grad=True)
    bce_blur(logits, torch.zeros_like(logits)).sum().backward()
    assert logits.grad[0] > 0 > logits.grad[1]


def test_worked_example():
    """The numbers of docs/assigners/yolov5.md: an object of 40 x 50 pixels around (41, 55)."""
    preds = decode([raw[:1] for raw in make_raws()], ANCHORS, SIZE)
    targets = make_targets([(0, 0, 21, 30, 61, 80)])
    found = {}
    for _, slot, _ in triples(build_targets(preds, targets, Ratio())):
        level = int(preds.priors.level[slot])
        grid = preds.priors.grids[level]
        anchor, place = divmod(slot - grid.start, grid.rows * grid.columns)
        found.setdefault(level, {}).setdefault(anchor, set()).add((place % grid.columns, place // grid.columns))
    assert found == {
        0: {anchor: {(1, 1), (0, 1), (1, 2)} for anchor in (0, 1, 2)},  # (62, 45), (59, 119), (116, 90) at stride 32
        1: {anchor: {(2, 3), (3, 3), (2, 2)} for anchor in (0, 1, 2)},  # (30, 61), (45, 20), (33, 23) at stride 16
        2: {
            anchor: {(5, 6), (4, 6), (5, 7)} for anchor in (1, 2)
        },  # (16, 30), (23, 29) at stride 8; 40 is four times 10
    }

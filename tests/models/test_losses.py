"""Element-wise losses, the YOLO loss against a slow loop, its laws, and the criterion around it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models.losses.yolo as yolo_module
from models.assigners import build_targets
from models.assigners.wh_iou import WhIoU
from models.losses import Criterion, TrainStep, build_criterion, compute_loss
from models.losses.functional import bce, bce_blur, focal, quality_focal, smooth_targets
from models.losses.yolo import YoloLoss
from models.structures import Assignment
from tests.models.yolov3_case import ANCHORS, OBJECTS, decode, make_heads, make_raws, make_targets
from utils.boxes import IOUS
from utils.config import Located
from utils.errors import UserError

SIZE = (96, 128)
CRITERION = Criterion(WhIoU(), YoloLoss(num_classes=3))


def run(raws, targets, criterion=CRITERION, size=SIZE):
    """Terms of the loss; gradients are in ``raws`` afterwards."""
    for raw in raws:
        raw.grad = None
    terms = criterion(decode(raws, ANCHORS, size), targets)
    sum(terms.values()).backward()
    return terms


# ------------------------------------------------------------------------------------------------------ element-wise

ELEMENTWISE = {
    "bce": bce,
    "bce_pw1.7": lambda x, y: bce(x, y, pos_weight=1.7),
    "bceblur_alpha0.05": bce_blur,
    "bceblur_alpha0.5": lambda x, y: bce_blur(x, y, alpha=0.5),
    "focal_g1.5_a0.25": focal,
    "focal_g2.0_a0.5": lambda x, y: focal(x, y, 2.0, 0.5),
    "focal_pw1.7_g1.5_a0.25": lambda x, y: focal(x, y, pos_weight=1.7),
    "focal_pw1.7_g2.0_a0.5": lambda x, y: focal(x, y, 2.0, 0.5, pos_weight=1.7),
    "qfocal_g1.5_a0.25": quality_focal,
    "qfocal_g2.0_a0.5": lambda x, y: quality_focal(x, y, 2.0, 0.5),
}
REDUCTIONS = {"_none": lambda x: x, "_sum": torch.sum, "_mean": torch.mean, "": torch.mean}


@pytest.mark.golden_case("functional/elementwise_losses.npz")
@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elementwise_losses_equal_yolov5(case, name, dtype):
    data = np.load(case)
    compared = 0
    for kind in ("hard", "soft"):
        for suffix, reduce in REDUCTIONS.items():
            key = f"{name}{suffix}_{kind}"
            if key not in data.files:
                continue
            logits = torch.tensor(data["pred"]).to(dtype).requires_grad_()
            value = reduce(ELEMENTWISE[name](logits, torch.tensor(data[kind]).to(dtype)))
            value.sum().backward()
            np.testing.assert_allclose(value.detach(), data[key], rtol=1e-5, atol=2e-6, err_msg=key)
            np.testing.assert_allclose(logits.grad, data[f"{key}@grad"], rtol=1e-5, atol=2e-6, err_msg=key)
            compared += 1
    assert compared >= 2


@pytest.mark.golden_case("functional/elementwise_losses.npz")
def test_smooth_targets_equal_yolov5(case):
    data = np.load(case)
    for eps, (positive, negative) in zip(data["smooth_BCE_eps"], data["smooth_BCE_cp_cn"]):
        targets = smooth_targets(torch.tensor([1, 0]), 3, float(eps), torch.float64)
        expected = [[negative, positive, negative], [positive, negative, negative]]
        np.testing.assert_allclose(targets, expected, rtol=1e-12)


@pytest.mark.golden_case("functional/smooth_l1_box2box.npz")
@pytest.mark.parametrize("beta", [0.0, 0.11, 1.0])
def test_torch_smooth_l1_is_exact_at_every_beta(case, beta):
    """Why functional.py has none of its own."""
    data = np.load(case)
    for reduction in ("none", "sum", "mean"):
        deltas = torch.tensor(data["input"], requires_grad=True)
        value = F.smooth_l1_loss(deltas, torch.tensor(data["target"]), beta=beta, reduction=reduction)
        value.sum().backward()
        key = f"smooth_l1_beta{beta}_{reduction}"
        np.testing.assert_allclose(value.detach(), data[key], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(deltas.grad, data[f"{key}@grad"], rtol=1e-6, atol=1e-7)


SATURATED = {
    **ELEMENTWISE,
    "focal_g0.5": lambda x, y: focal(x, y, 0.5),
    "qfocal_g0.5": lambda x, y: quality_focal(x, y, 0.5),
}


@pytest.mark.parametrize("name", SATURATED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_saturated_logits_are_finite_with_gradients(name, dtype):
    logits = torch.tensor([-1e4, -100, -20, -1, 0, 1, 20, 100, 1e4], dtype=dtype)[:, None].repeat(1, 5)
    logits.requires_grad_()
    targets = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=dtype).expand_as(logits)
    value = SATURATED[name](logits, targets)
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()
    assert value.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("name", SATURATED)
def test_elementwise_gradcheck(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(12, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: SATURATED[name](x, targets), (logits,))


# --------------------------------------------------------------------------------------------------- the slow oracle


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_bce(x, y, pos_weight, gamma):
    value = -pos_weight * y * math.log(sigmoid(x)) - (1 - y) * math.log(1 - sigmoid(x))
    if gamma == 0:
        return value
    p = y * sigmoid(x) + (1 - y) * (1 - sigmoid(x))
    return value * (y * 0.25 + (1 - y) * 0.75) * (1 - p) ** gamma


def slow_giou(a, b):
    area = lambda x1, y1, x2, y2: max(x2 - x1, 0) * max(y2 - y1, 0)  # noqa: E731
    inter = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    hull = area(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    union = area(*a) + area(*b) - inter
    return inter / union - (hull - union) / hull


def slow_loss(raws, targets, *, iou_t=0.2, box=3.54, obj=64.3, cls=37.4, cls_pw=1, obj_pw=1, fl_gamma=0, gr=1, eps=0):
    """The whole YOLOv3 recipe, one number at a time: matching, decoding and the three losses."""
    totals = {"box": 0.0, "obj": 0.0, "cls": 0.0}
    for raw, anchors in zip(raws, ANCHORS):
        raw = raw.detach().tolist()
        num_images, rows, columns, num_classes = len(raw), len(raw[0][0]), len(raw[0][0][0]), len(raw[0][0][0][0]) - 5
        stride_x, stride_y = SIZE[1] / columns, SIZE[0] / rows
        objectness, boxes, classes = {}, [], []
        for anchor, (width, height) in enumerate(anchors):
            for image, label, (x1, y1, x2, y2) in zip(
                targets.image.tolist(), targets.labels.tolist(), targets.boxes.tolist()
            ):
                shared = min(width, x2 - x1) * min(height, y2 - y1)
                if shared / (width * height + (x2 - x1) * (y2 - y1) - shared) <= iou_t:
                    continue
                i = min(int((x1 + x2) / 2 / stride_x), columns - 1)
                k = min(int((y1 + y2) / 2 / stride_y), rows - 1)
                x, y, w, h, _, *logits = raw[image][anchor][k][i]
                x, y = (sigmoid(x) + i) * stride_x, (sigmoid(y) + k) * stride_y
                w, h = min(math.exp(w), 1000) * width / 2, min(math.exp(h), 1000) * height / 2
                giou = slow_giou((x - w, y - h, x + w, y + h), (x1, y1, x2, y2))
                boxes.append(1 - giou)
                objectness[image, anchor, k, i] = (1 - gr) + gr * max(giou, 0)
                wanted = [1 - eps / 2 if c == label else eps / 2 for c in range(num_classes)]
                classes += [slow_bce(z, y, cls_pw, fl_gamma) for z, y in zip(logits, wanted)]
        slots = [
            slow_bce(raw[b][a][k][i][4], objectness.get((b, a, k, i), 0), obj_pw, fl_gamma)
            for b in range(num_images)
            for a in range(len(anchors))
            for k in range(rows)
            for i in range(columns)
        ]
        totals["obj"] += obj * sum(slots) / len(slots)
        if boxes:
            totals["box"] += box * sum(boxes) / len(boxes)
            totals["cls"] += cls * num_classes / 80 * sum(classes) / len(classes) if num_classes > 1 else 0
    return totals


@pytest.mark.parametrize(
    "hyp",
    [
        {},
        {"fl_gamma": 1.5, "gr": 0.5, "cls_pw": 1.3, "obj_pw": 0.7},
        {"iou_t": 0.4, "eps": 0.1, "gr": 0.0, "box": 0.05, "obj": 1.0, "cls": 0.5},
    ],
)
@pytest.mark.parametrize("num_classes", [1, 3])
def test_equals_the_recipe_written_out(hyp, num_classes):
    raws = make_raws(num_classes=num_classes)
    targets = make_targets([(image, label % num_classes, *box) for image, label, *box in OBJECTS])
    keys = {"label_smoothing" if key == "eps" else key: value for key, value in hyp.items() if key != "iou_t"}
    criterion = Criterion(WhIoU(iou_t=hyp.get("iou_t", 0.2)), YoloLoss(num_classes=num_classes, **keys))
    terms = run(raws, targets, criterion)
    expected = slow_loss(raws, targets, **hyp)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert expected["obj"] > 0 and expected["box"] > 0


# -------------------------------------------------------------------------------------------------------------- laws


def test_gradcheck():
    size, boxes = (32, 32), [(0, 0, 2, 3, 30, 29), (0, 2, 4, 4, 20, 30), (1, 1, 10, 10, 24, 30)]
    raws, targets = make_raws(size=size, scale=0.5), make_targets(boxes)
    # gr = 0: the objectness target is a detached IoU, which finite differences would see moving
    criterion = Criterion(WhIoU(), YoloLoss(num_classes=3, gr=0.0, fl_gamma=0.5, label_smoothing=0.1, obj_pw=2.0))
    preds = decode(raws, ANCHORS, size)
    assert len(build_targets(preds, targets, WhIoU()).compact().image) >= 3
    function = lambda *raws: sum(criterion(decode(raws, ANCHORS, size), targets).values())  # noqa: E731
    assert torch.autograd.gradcheck(function, raws)


@pytest.mark.parametrize("iou", IOUS)
def test_every_iou_trains_and_float32_equals_float64(iou):
    criterion = Criterion(WhIoU(), YoloLoss(num_classes=3, iou=iou))
    single, double = make_raws(dtype=torch.float32), make_raws()
    ours, wide = (run(raws, make_targets(OBJECTS), criterion) for raws in (single, double))
    for name in ours:
        assert ours[name].dtype == torch.float32 and wide[name].dtype == torch.float64
        assert ours[name].item() == pytest.approx(wide[name].item(), rel=2e-6)
    for a, b in zip(single, double):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max()


def test_no_object_leaves_only_objectness():
    raws = make_raws()
    terms = run(raws, make_targets([]))
    assert terms["box"] == 0 and terms["cls"] == 0 and terms["obj"] > 0
    for raw in raws:
        assert (raw.grad[..., :4] == 0).all() and (raw.grad[..., 5:] == 0).all() and (raw.grad[..., 4] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_level_without_rows_adds_nothing_and_no_nan(dtype):
    raws = make_raws(dtype=dtype)
    terms = run(raws, make_targets([(0, 1, 40, 40, 50, 52)]))  # only the anchors of stride 8 are this small
    assert all(value.isfinite() for value in terms.values()) and terms["box"] > 0
    assert all(raw.grad.isfinite().all() for raw in raws)
    assert (raws[0].grad[..., :4] == 0).all() and (raws[2].grad[..., :4] != 0).any()


def test_last_row_names_the_objectness_target():
    """Objects 1 and 2 meet in the same slots: swapping them changes the objectness target and nothing else."""
    swapped = [OBJECTS[i] for i in (0, 2, 1, 3, 4, 5, 6)]
    plain, other = run(make_raws(), make_targets(OBJECTS)), run(make_raws(), make_targets(swapped))
    assert plain["box"].item() == pytest.approx(other["box"].item(), rel=1e-12)
    assert plain["cls"].item() == pytest.approx(other["cls"].item(), rel=1e-12)
    assert plain["obj"].item() != pytest.approx(other["obj"].item(), rel=1e-9)


def test_rows_of_weight_zero_count_for_nothing():
    preds, targets = decode(make_raws(), ANCHORS, SIZE), make_targets(OBJECTS)
    table = build_targets(preds, targets, WhIoU())
    full, compact = (YoloLoss(num_classes=3)(preds, targets, rows) for rows in (table, table.compact()))
    assert len(table.image) > len(table.compact().image)
    for name in full:
        assert full[name].item() == pytest.approx(compact[name].item(), rel=1e-12)


def test_weights_make_means_weighted():
    preds, targets = decode(make_raws(), ANCHORS, SIZE), make_targets([OBJECTS[0], OBJECTS[6]])
    slot, rows = preds.priors.grids[2].start, torch.tensor([0, 1])
    ignore = torch.zeros(preds.obj.shape, dtype=torch.bool)

    def box_term(weight):
        assignment = Assignment(image=rows, prior=slot + rows, target=rows, weight=torch.tensor(weight), ignore=ignore)
        return YoloLoss(num_classes=3)(preds, targets, assignment)["box"].item()

    first, second = box_term([1.0, 0.0]), box_term([0.0, 1.0])
    assert box_term([3.0, 1.0]) == pytest.approx((3 * first + second) / 4, rel=1e-9)
    assert box_term([0.5, 0.0]) == pytest.approx(first, rel=1e-9)
    assert box_term([0.0, 0.0]) == 0


def test_ignored_slots_have_exactly_zero_gradient_and_leave_the_mean():
    raws, region = make_raws(), (0, 0, 0, 64, 96)
    terms = run(raws, make_targets([], ignore=[region]))
    expected = 0
    for raw in raws:
        columns = raw.shape[3] // 2
        assert (raw.grad[0, :, :, :columns] == 0).all()
        assert (raw.grad[0, :, :, columns:, 4] != 0).all() and (raw.grad[1, ..., 4] != 0).all()
        seen = torch.cat([raw[0, :, :, columns:, 4].flatten(), raw[1, ..., 4].flatten()])
        expected += 64.3 * F.softplus(seen).mean().item()
    assert terms["obj"].item() == pytest.approx(expected, rel=1e-9)


def test_everything_ignored_is_zero_not_nan():
    raws = make_raws()
    terms = run(raws, make_targets([], ignore=[(0, 0, 0, 128, 96), (1, 0, 0, 128, 96)]))
    assert sum(terms.values()) == 0 and all((raw.grad == 0).all() for raw in raws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e4, -1e4])
@pytest.mark.parametrize("iou", IOUS)
@pytest.mark.parametrize("fl_gamma", [0.0, 0.5])
def test_extreme_outputs_are_finite(dtype, value, iou, fl_gamma):
    raws = [torch.full_like(raw, value).requires_grad_() for raw in make_raws(dtype=dtype)]
    criterion = Criterion(WhIoU(), YoloLoss(num_classes=3, iou=iou, fl_gamma=fl_gamma))
    terms = run(raws, make_targets(OBJECTS), criterion)
    assert all(term.isfinite() for term in terms.values())
    assert all(raw.grad.isfinite().all() for raw in raws)


def test_shuffled_targets_change_the_loss_only_through_duplicates():
    rows = [row for number, row in enumerate(OBJECTS) if number != 2]  # without the two that share slots
    order = [3, 0, 5, 2, 1, 4]
    plain, shuffled = run(make_raws(), make_targets(rows)), run(make_raws(), make_targets([rows[i] for i in order]))
    for name in plain:
        assert plain[name].item() == pytest.approx(shuffled[name].item(), rel=1e-12)


def test_nothing_looks_at_a_value():
    """Forward and backward on the meta device, where ``.item()``, nonzero and boolean masks raise."""
    raws = [raw.detach().to("meta").requires_grad_() for raw in make_raws(dtype=torch.float32)]
    run(raws, make_targets(OBJECTS, ignore=[(0, 0, 0, 9, 9)]).to("meta"))
    assert all(raw.grad.shape == raw.shape for raw in raws)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu_is_repeatable_and_does_not_sync():
    targets = make_targets(OBJECTS, ignore=[(1, 0, 0, 64, 96)])
    expected = make_raws(dtype=torch.float32)
    run(expected, targets)
    raws = [raw.detach().cuda().requires_grad_() for raw in expected]
    on_device, grads = targets.to("cuda"), []
    run(raws, on_device)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(raws, on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        grads.append([raw.grad.cpu() for raw in raws])
    assert all(torch.equal(a, b) for later in grads[1:] for a, b in zip(grads[0], later))
    for ours, raw in zip(grads[0], expected):
        assert (ours - raw.grad).abs().max() <= 1e-5 * raw.grad.abs().max()


def test_two_processes_equal_one_with_both_batches(monkeypatch):
    """Normalisers are averaged over processes, so the mean of their gradients is the gradient of the whole."""
    ignore = [(1, 0, 0, 64, 96)]
    whole = make_raws()
    run(whole, make_targets(OBJECTS[:6], ignore=ignore))
    halves = []
    for image in (0, 1):
        rows = make_targets(
            [(0, *row[1:]) for row in OBJECTS[:6] if row[0] == image], [(0, *r[1:]) for r in ignore if r[0] == image]
        )
        halves.append(([raw.detach()[image : image + 1].clone().requires_grad_() for raw in whole], rows))

    counts = []
    monkeypatch.setattr(yolo_module, "all_reduce_mean", lambda tensor: counts.append(tensor) or tensor)
    for raws, rows in halves:
        run(raws, rows)
    assert not torch.equal(*counts), "the case is meant to be uneven"
    mean = sum(counts) / 2
    monkeypatch.setattr(yolo_module, "all_reduce_mean", lambda tensor: mean)
    for raws, rows in halves:
        run(raws, rows)
    for level, raw in enumerate(whole):
        # DistributedDataParallel divides the sum of the gradients by the number of processes
        torch.testing.assert_close(torch.cat([raws[level].grad / 2 for raws, _ in halves]), raw.grad)


# --------------------------------------------------------------------------------------------------------- criterion


class TinyModel(torch.nn.Module):
    """One head of stride 32 behind one convolution."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3 * (5 + num_classes), 32, stride=32)
        self.heads = make_heads(ANCHORS[:1], num_classes)
        self.seen = None

    def forward(self, images):
        self.seen = images
        return [self.conv(images)]


def test_train_step_takes_uint8_or_float_and_keeps_the_memory_format():
    torch.manual_seed(0)
    step = TrainStep(TinyModel(), CRITERION)
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8).to(memory_format=torch.channels_last)
    targets = make_targets(OBJECTS)
    terms = step(images, targets)
    assert step.model.seen.dtype == torch.float32 and step.model.seen.max() <= 1
    assert step.model.seen.is_contiguous(memory_format=torch.channels_last)
    same = step(images.float() / 255, targets)
    assert all(torch.equal(terms[name], same[name]) for name in terms)
    sum(terms.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in step.parameters())
    wide = TrainStep(TinyModel().double(), CRITERION)(images, targets)
    assert all(value.dtype == torch.float64 for value in wide.values())


def test_loss_is_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    model, images, targets = TinyModel(), torch.rand(2, 3, *SIZE), make_targets(OBJECTS)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images)
        assert outputs[0].dtype == torch.bfloat16
        terms = compute_loss(outputs, targets, model, CRITERION, SIZE)
    expected = compute_loss([outputs[0].float()], targets, model, CRITERION, SIZE)
    assert all(torch.equal(value, expected[name]) and value.dtype == torch.float32 for name, value in terms.items())


RECIPE = {"assigner": {"name": "wh_iou", "iou_t": "0.3"}, "loss": {"name": "yolo", "iou": "ciou", "cls": 40}}


def test_build_criterion_scales_the_class_gain_to_the_data():
    criterion = build_criterion(RECIPE["assigner"], RECIPE["loss"], 20)
    assert criterion.assigner == WhIoU(iou_t=0.3)
    assert criterion.loss.gains == {"box": 3.54, "obj": 64.3, "cls": 10.0} and criterion.loss.iou is IOUS["ciou"]


@pytest.mark.parametrize(
    "section, change, message",
    [
        ("assigner", {"name": "wh_iuo"}, "unknown assigner 'wh_iuo' (did you mean 'wh_iou'?)"),
        ("loss", {"name": "yol"}, "unknown loss 'yol' (did you mean 'yolo'?)"),
        ("loss", {"name": None}, "unknown loss 'None'"),
        ("assigner", {"anchor_t": 4}, "unknown key 'anchor_t'"),
        ("loss", {"fl_gama": 1.5}, "unknown key 'fl_gama', did you mean 'fl_gamma'?"),
        ("loss", {"iou": "gio"}, "did you mean 'giou'?"),
        ("loss", {"gr": 1.5}, "gr is 1.5, expected 0 to 1"),
        ("loss", {"obj": -1}, "obj is -1.0, expected 0 or more"),
        ("loss", {"cls_pw": 0}, "cls_pw is 0.0, expected more than 0"),
        ("loss", {"box": "big"}, "expected a number, found 'big'"),
        ("loss", {"num_classes": 80}, "num_classes comes from the data"),
        ("assigner", {"iou_t": 1.0}, "iou_t is 1.0"),
    ],
)
def test_bad_recipes_are_refused_with_their_place(section, change, message):
    sections = {name: {**values, **(change if name == section else {})} for name, values in RECIPE.items()}
    with pytest.raises(UserError) as error:
        build_criterion(sections["assigner"], sections["loss"], 20, "hyp.yaml")
    assert message in str(error.value) and str(error.value).startswith("hyp.yaml") and "\n" not in str(error.value)


def test_bad_recipe_names_the_line_it_knows():
    loss = Located({"name": "yolo", "giou": 3.54}, places={"name": "hyp.yaml:4", "giou": "hyp.yaml:9"})
    with pytest.raises(UserError, match=r"^hyp\.yaml:9: unknown key 'giou'"):
        build_criterion(RECIPE["assigner"], loss, 20, "hyp.yaml")

"""The YOLOX loss and its laws, the [yolox] head, and the networks: published parameters and FLOPs."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

from models.assigners import build_targets
from models.assigners.simota import SimOTA
from models.assigners.wh_iou import WhIoU
from models.cfg import adapt_classes, parse_cfg, read_cfg
from models.darknet import Darknet
from models.graph import build_graph
from models.losses import Criterion, TrainStep
from models.losses.yolox import YoloxLoss
from models.section import CfgError
from models.structures import Assignment
from tests.models import yolov3_case
from tests.models.yolov3_case import OBJECTS, make_targets
from tests.models.yolox_case import decode, make_raws
from utils.boxes import box_iou

SIZE, CFG = (96, 128), Path(__file__).resolve().parents[2] / "cfg"
TARGETS = make_targets(OBJECTS)


def loss_of(l1_epochs=1, **options):
    loss = YoloxLoss(num_classes=3, l1_epochs=l1_epochs, **options)
    loss.set_epoch(0, 1)
    return loss


def run(raws, targets=TARGETS, loss=None, assigner=None):
    """Terms of the loss; gradients are in ``raws`` afterwards."""
    for raw in raws:
        raw.grad = None
    terms = Criterion(assigner or SimOTA(), loss or loss_of())(decode(raws, SIZE), targets)
    sum(terms.values()).backward()
    return terms


# ---------------------------------------------------------------------------------------------------------- the loss


def test_terms_equal_the_rule_written_out():
    raws = make_raws(dtype=torch.float64)
    terms, preds = run(raws, loss=loss_of(box_loss="giou")), decode(raws, SIZE)
    rows = build_targets(preds, TARGETS, SimOTA()).compact()
    num, slots = len(rows.image), list(zip(rows.image.tolist(), rows.prior.tolist(), rows.target.tolist()))
    expected = dict.fromkeys(terms, 0.0)
    objectness = torch.zeros_like(preds.obj)
    for image, slot, target in slots:
        box, wanted = preds.boxes[image, slot][None], TARGETS.boxes[target][None].double()
        onehot = F.one_hot(TARGETS.labels[target], 3) * box_iou(box, wanted)[0]
        objectness[image, slot] = 1
        stride, corner = preds.priors.stride[slot], preds.priors.center[slot] - preds.priors.stride[slot] / 2
        code = torch.cat([(wanted[0, :2] + wanted[0, 2:]) / 2 - corner, wanted[0, 2:] - wanted[0, :2]])
        code = torch.cat([code[:2] / stride, (code[2:] / stride).log()])
        expected["box"] += 5 * torchvision.ops.generalized_box_iou_loss(box, wanted, eps=0).item() / num
        logits = preds.cls[image, slot]
        expected["cls"] += F.binary_cross_entropy_with_logits(logits, onehot, reduction="sum").item() / num
        expected["l1"] += F.l1_loss(preds.deltas[image, slot], code, reduction="sum").item() / num
    summed = F.binary_cross_entropy_with_logits(preds.obj, objectness, reduction="sum")
    expected["obj"] = summed.item() / num
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-9)


def test_class_targets_are_the_iou():
    """Why multiply by the IoU: the class probability that costs least is how well the box fits, so that the score
    (class x objectness) ranks boxes by fit, which NMS and AP read it as."""
    raws = make_raws(dtype=torch.float64)
    preds = decode([raw.detach() for raw in raws], SIZE)
    rows = build_targets(preds, TARGETS, SimOTA()).compact()
    fit = box_iou(preds.boxes[rows.image, rows.prior], TARGETS.boxes[rows.target].double()).diagonal()
    logits = torch.full_like(preds.cls, -40.0)
    logits[rows.image, rows.prior, TARGETS.labels[rows.target]] = fit.logit()
    logits.requires_grad_()
    best = loss_of()(preds.__class__(**{**vars(preds), "cls": logits}), TARGETS, rows)
    best["cls"].backward()
    assert logits.grad.abs().max() < 1e-12 and fit.min() < 0.5


def test_l1_belongs_to_the_last_epochs():
    loss = YoloxLoss(num_classes=3, l1_epochs=2)
    with_l1 = []
    for epoch in range(5):
        loss.set_epoch(epoch, 5)
        terms = run(make_raws(), loss=loss)
        with_l1.append(terms["l1"].item() > 0)
        assert set(terms) == {"box", "obj", "cls", "l1"}, "the same columns in every epoch"
    assert with_l1 == [False, False, False, True, True]
    assert run(make_raws(), loss=YoloxLoss(num_classes=3))["l1"] == 0, "nobody said which epoch"


def test_the_trainer_says_which_epoch_begins(monkeypatch):
    from tests.utils.tiny import tiny_batch, tiny_step
    from utils.optim import Optim
    from utils.run import Precision
    from utils.trainer import Trainer

    step, told = tiny_step(), []
    monkeypatch.setattr(step.criterion.loss, "set_epoch", lambda *epoch: told.append(epoch), raising=False)
    options = {"optim": Optim(), "device": torch.device("cpu"), "precision": Precision("float32", None, False)}
    trainer = Trainer(step, num_batches=1, batch_size=2, epochs=3, **options)
    for _ in range(2):
        trainer.train_epoch([tiny_batch([0, 1])])
        trainer.end_epoch()
    assert told == [(0, 3), (1, 3)]


def test_ignored_slots_have_exactly_zero_gradient():
    raws, region = make_raws(), (0, 0, 0, 64, 96)
    run(raws, make_targets([], ignore=[region]))
    for raw in raws:
        columns = raw.shape[3] // 2
        assert (raw.grad[0, :, :, :columns] == 0).all()
        assert (raw.grad[0, 4, :, columns:] != 0).all() and (raw.grad[1, 4] != 0).all()


@pytest.mark.parametrize("ignore", [[], [(0, 0, 0, 128, 96), (1, 0, 0, 128, 96)]])
def test_no_object_is_finite(ignore):
    terms = run(make_raws(), make_targets([], ignore=ignore))
    assert all(term.isfinite() for term in terms.values())
    assert terms["box"] == terms["cls"] == terms["l1"] == 0 and (terms["obj"] > 0) == (not ignore)


@pytest.mark.parametrize("value", [1e4, -1e4])
@pytest.mark.parametrize("box_loss", ["iou_squared", "giou"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_outputs_are_finite(value, box_loss, dtype):
    raws = [torch.full_like(raw, value).requires_grad_() for raw in make_raws(dtype=dtype)]
    terms = run(raws, make_targets([*OBJECTS, (0, 0, 30, 30, 30, 30)]), loss_of(box_loss=box_loss))
    assert all(term.isfinite() for term in terms.values()) and all(raw.grad.isfinite().all() for raw in raws)


def test_weights_count_as_rows_do():
    """A row of weight 2 is a row twice; a row of weight 0 is none."""
    preds = decode(make_raws(dtype=torch.float64), SIZE)
    rows = {"image": [0, 0, 1], "prior": [3, 40, 7], "target": [0, 1, 5]}

    def terms(weight, pick):
        columns = {name: torch.tensor([column[i] for i in pick]) for name, column in rows.items()}
        ignore = torch.zeros_like(preds.obj, dtype=torch.bool)
        assignment = Assignment(**columns, weight=torch.tensor(weight), ignore=ignore)
        return {name: term.item() for name, term in loss_of()(preds, TARGETS, assignment).items()}

    assert terms([2.0, 1.0, 0.0], [0, 1, 2]) == pytest.approx(terms([1.0, 1.0, 1.0], [0, 1, 0]), rel=1e-12)


def test_forward_and_backward_look_at_no_value():
    raws = [raw.detach().to("meta").requires_grad_() for raw in make_raws()]
    run(raws, make_targets(OBJECTS, ignore=[(0, 0, 0, 9, 9)]).to("meta"))
    assert all(raw.grad.shape == raw.shape for raw in raws)


@pytest.mark.parametrize("assigner", [SimOTA(), WhIoU()])
def test_trains_heads_with_anchors_too(assigner):
    raws = yolov3_case.make_raws()
    preds = yolov3_case.decode(raws, yolov3_case.ANCHORS, SIZE)
    terms = Criterion(assigner, loss_of())(preds, TARGETS)
    sum(terms.values()).backward()
    assert all(term > 0 and term.isfinite() for term in terms.values())
    assert all(raw.grad.isfinite().all() and (raw.grad != 0).any() for raw in raws)


@pytest.mark.parametrize("bad", [{"box_loss": "iou"}, {"cls": -1.0}, {"l1_epochs": -1}])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        YoloxLoss(num_classes=3, **bad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu_and_does_not_sync():
    targets, expected = make_targets(OBJECTS, ignore=[(1, 0, 0, 64, 96)]), make_raws()
    run(expected, targets)
    raws, on_device = [raw.detach().cuda().requires_grad_() for raw in expected], targets.to("cuda")
    run(raws, on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(raws, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, raw in zip(raws, expected):
        assert (ours.grad.cpu() - raw.grad).abs().max() <= 1e-5 * raw.grad.abs().max()


# ---------------------------------------------------------------------------------------------------------- the head

HEAD = """[net]
width=64
height=32
channels=3
[convolutional]
filters=8
size=3
stride=8
pad=1
activation=swish
[convolutional]
filters=3
activation=linear
[route]
layers=-2
[convolutional]
filters=4
activation=linear
[route]
layers=-4
[convolutional]
filters=1
activation=linear
[yolox]
from=-3,-1,-5
classes=3
"""


def test_head_joins_its_three_layers_as_boxes_objectness_classes():
    torch.manual_seed(0)
    model = Darknet(parse_cfg(HEAD)).eval()
    images = torch.rand(2, 3, 32, 64)
    outputs, raw = model.layer_outputs(images), model(images)[0]
    assert torch.equal(raw, torch.cat([outputs[3], outputs[5], outputs[1]], dim=1)) and raw.shape == (2, 8, 4, 8)
    preds = model.predict(images)
    assert torch.equal(preds.obj, outputs[5].flatten(1)) and torch.equal(preds.cls, outputs[1].flatten(2).mT)
    x, y, log_w, log_h = outputs[3][1, :, 2, 5].tolist()  # row 2, column 5
    center, size = torch.tensor([5 + x, 2 + y]) * 8, torch.tensor([log_w, log_h]).exp() * 8
    torch.testing.assert_close(preds.boxes[1, 2 * 8 + 5], torch.cat([center - size / 2, center + size / 2]))
    assert (preds.priors.size == 8).all() and "anchors" not in model.heads[0].offers


def test_a_new_head_says_one_percent():
    model = Darknet(parse_cfg(HEAD))
    for layer, num in ((5, 1), (1, 3)):
        assert model.layers[layer].conv.bias.sigmoid().tolist() == pytest.approx([0.01] * num)
    assert (model.layers[3].conv.bias == 0).all()


def test_classes_follow_the_data():
    cfg, changes = adapt_classes(parse_cfg(HEAD, "my.cfg"), 7)
    assert changes == ["my.cfg:12 filters 3 -> 7", "my.cfg:26 classes 3 -> 7"]
    assert Darknet(cfg).num_classes == 7


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("from=-3,-1,-5", "from=-3,-1", "my.cfg:25: from names 2 layers, .* reads 3"),
        ("from=-3,-1,-5", "from=-3,-1,2000", "my.cfg:25: .* points forward"),
        ("from=-3,-1,-5", "from=-1,-3,-5", r"my.cfg:22: filters=1, \[yolox\] line 24 needs 4"),
        ("filters=4\n", "filters=4\nsize=2\nstride=2\n", "my.cfg:27: the maps of a head differ"),
        ("from=-3,-1,-5\n", "", r"my.cfg:24: \[yolox\] lacks 'from'"),
    ],
)
def test_mistakes_are_named_at_their_line(old, new, message):
    text = HEAD.replace(old, new, 1)
    with pytest.raises(CfgError, match=message):
        build_graph(parse_cfg(text, "my.cfg"))


def test_anchors_are_noticed_and_not_read():
    problems = build_graph(parse_cfg(HEAD + "anchors=1,2\n")).problems
    assert any(problem.message == "unknown key 'anchors' in [yolox]" for problem in problems)


# ------------------------------------------------------------------------------------------------------ the networks

PUBLISHED = {  # M parameters, G FLOPs at the cfg's size: YOLOX's model zoo
    "yolox-nano": (0.91, 1.08),
    "yolox-tiny": (5.06, 6.45),
    "yolox-s": (8.97, 26.8),
    "yolox-darknet53": (63.72, 185.3),
}


def counted_as_published(spec) -> int:
    """YOLOX's counter, beside two per multiply-add: four per normalised value, two per value of a leaky ReLU."""
    section, values = spec.section, spec.shape[0] * spec.shape[1] * spec.shape[2]
    extra = 4 * section.flag("batch_normalize") + 2 * (section.str("activation", "") == "leaky")
    return spec.flops + extra * values * (section.type == "convolutional")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_equal_the_published(name):
    graph = build_graph(read_cfg(CFG / f"{name}.cfg"))
    params, flops = PUBLISHED[name]
    assert graph.strides == (8, 16, 32)
    assert round(sum(spec.params for spec in graph.layers) / 1e6, 2) == params
    digits = len(str(flops).split(".")[1])
    assert round(sum(map(counted_as_published, graph.layers)) / 1e9, digits) == flops


def test_nano_learns():
    """Forward, loss and a step on the whole network: what it said of one picture costs less afterwards."""
    torch.manual_seed(0)
    cfg, _ = adapt_classes(read_cfg(CFG / "yolox-nano.cfg"), 3)
    step = TrainStep(Darknet(cfg), Criterion(SimOTA(), YoloxLoss(num_classes=3)))
    images, targets = torch.rand(2, 3, 96, 128), make_targets(OBJECTS)
    optimizer, losses = torch.optim.Adam(step.parameters(), lr=2e-3), []
    for _ in range(30):
        loss = sum(step(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses[-3:]) < 0.9 * losses[0]
    assert all(p.grad is not None for p in step.parameters())

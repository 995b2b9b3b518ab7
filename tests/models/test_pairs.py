"""Every assigner with every loss: what makes sense trains, what cannot is refused at the line of the cfg."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.assigners import ASSIGNERS, build_targets
from models.cfg import parse_cfg, read_cfg
from models.darknet import Darknet
from models.losses import LOSSES, build_criterion
from models.section import CfgError
from tests.models.yolov3_case import ANCHORS, OBJECTS, decode, make_heads, make_raws, make_targets
from tests.utils.tiny import tiny_batch, tiny_step
from utils.boxes import paired_iou
from utils.config import RECIPES, read_recipe
from utils.errors import UserError
from utils.run import PRECISIONS
from utils.structures import Targets
from utils.trainer import Trainer

CFG = Path(__file__).resolve().parents[2] / "cfg"
SIZE = (96, 128)
REGION = (1, 20, 10, 70, 60)  # holds objects 5 and 6
SLOTS = [name for name, loss in LOSSES.items() if "proposals" not in getattr(loss, "needs", ())]  # of one stage
PAIRS = [pytest.param(pair, id=" ".join(pair)) for pair in itertools.product(ASSIGNERS, SLOTS)]


@pytest.fixture(params=PAIRS)
def pair(request):
    return request.param


def make_criterion(pair, device="cpu", num_classes=3, **keys):
    """The pair with its defaults on the three heads of the made-up batches."""
    heads = tuple(head.to(device) for head in make_heads(num_classes=num_classes, **keys))
    return build_criterion({"name": pair[0]}, {"name": pair[1]}, num_classes, "test.yaml", heads).to(device)


def run(criterion, raws, targets):
    """(predictions, terms); gradients [B, P, 5 + C] are collected by ``gradients``."""
    preds = decode(raws, ANCHORS, SIZE)
    terms = criterion(preds, targets)
    sum(terms.values()).backward()
    return preds, terms


def gradients(raws):
    return torch.cat([raw.grad.flatten(1, 3) for raw in raws], dim=1)


def test_trains_and_ignored_slots_have_exactly_zero_gradient(pair):
    criterion, raws = make_criterion(pair), make_raws(dtype=torch.float32)
    targets = make_targets(OBJECTS, ignore=[REGION])
    preds, terms = run(criterion, raws, targets)
    assert all(term.isfinite() and term.shape == () for term in terms.values())
    gradient = gradients(raws)
    assert gradient.isfinite().all()
    ignore = build_targets(preds, targets, criterion.assigner).ignore
    assert ignore[1].any() and (gradient[ignore] == 0).all()
    assert (gradient[..., :4] != 0).any() and (gradient[..., 5:] != 0).any()


@pytest.mark.parametrize("objects", [[], [row for row in OBJECTS if row[0] == 1], [OBJECTS[0]] * 3])
def test_no_object_no_object_in_one_picture_and_duplicates_are_finite(pair, objects):
    raws = make_raws(dtype=torch.float32)
    _, terms = run(make_criterion(pair), raws, make_targets(objects))
    assert all(term.isfinite() for term in terms.values()) and gradients(raws).isfinite().all()


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_outputs_are_finite(pair, value):
    raws = [torch.full_like(raw, value).requires_grad_() for raw in make_raws(dtype=torch.float32)]
    _, terms = run(make_criterion(pair), raws, make_targets(OBJECTS))
    assert all(term.isfinite() for term in terms.values()) and gradients(raws).isfinite().all()


def test_one_class(pair):
    raws = make_raws(num_classes=1, dtype=torch.float32)
    rows = [(image, 0, *box) for image, _, *box in OBJECTS]
    _, terms = run(make_criterion(pair, num_classes=1), raws, make_targets(rows))
    assert all(term.isfinite() for term in terms.values()) and gradients(raws).isfinite().all()


def test_outputs_that_are_no_numbers_end_in_a_loss_that_is_none(pair):
    """The trainer reads it there, names the step and leaves it out; nothing crashes before."""
    raws = [torch.full_like(raw, float("nan")).requires_grad_() for raw in make_raws(dtype=torch.float32)]
    _, terms = run(make_criterion(pair), raws, make_targets(OBJECTS))
    assert not sum(terms.values()).isfinite()


def test_forward_and_backward_look_at_no_value(pair):
    """On the meta device ``.item()``, nonzero and boolean masks raise; on a GPU each would wait for it."""
    raws = [raw.detach().to("meta").requires_grad_() for raw in make_raws(dtype=torch.float32)]
    run(make_criterion(pair, "meta"), raws, make_targets(OBJECTS, ignore=[REGION]).to("meta"))
    assert all(raw.grad.shape == raw.shape for raw in raws)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu_without_a_sync(pair):
    targets = make_targets(OBJECTS, ignore=[REGION])
    expected = make_raws(dtype=torch.float32)
    run(make_criterion(pair), expected, targets)
    criterion, on_device = make_criterion(pair, "cuda"), targets.to("cuda")
    for mode in ("default", "error"):  # the first call may load kernels
        raws = [raw.detach().cuda().requires_grad_() for raw in expected]
        torch.cuda.set_sync_debug_mode(mode)
        try:
            run(criterion, raws, on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(raws, expected):
        assert (ours.grad.cpu() - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()


# -------------------------------------------------------------------------------------------------------- refusals

HEAD = """[net]
width=64
height=64
channels=3

[convolutional]
filters={filters}
size=1
stride=32
activation=linear

{head}
classes=3
num=3
anchors=12,12, 24,12, 30,30
"""
YOLO, GAUSSIAN, REGION_HEAD = ("[yolo]", 24), ("[Gaussian_yolo]", 36), ("[region]\nsoftmax=1", 24)


@pytest.mark.parametrize("head, filters", [GAUSSIAN, REGION_HEAD])
def test_a_head_that_cannot_is_refused_at_its_line(head, filters):
    model = Darknet(parse_cfg(HEAD.format(head=head, filters=filters), "tiny.cfg"))
    with pytest.raises(CfgError, match=r"^tiny.cfg:12: loss 'darknet' needs \[yolo\] training keys, which \["):
        build_criterion({"name": "best_anchor"}, {"name": "darknet"}, 3, "x.yaml", model.heads)


@pytest.mark.parametrize("name", [name for name, kind in ASSIGNERS.items() if "anchors" in getattr(kind, "needs", ())])
def test_anchors_are_missed_in_anchor_free_heads(name):
    model = Darknet(read_cfg(CFG / "yolox-nano.cfg"))
    with pytest.raises(
        CfgError, match=rf"yolox-nano.cfg:\d+: assigner '{name}' needs anchors, which \[yolox\] does not"
    ):
        build_criterion({"name": name}, {"name": "yolox"}, 80, "x.yaml", model.heads)


@pytest.mark.parametrize("head, filters", [YOLO, GAUSSIAN, REGION_HEAD])
@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_every_head_with_anchors_trains_with_every_assigner(head, filters, assigner):
    model = Darknet(parse_cfg(HEAD.format(head=head, filters=filters)))
    criterion = build_criterion({"name": assigner}, {"name": "yolo"}, 3, "x.yaml", model.heads)
    targets = make_targets([(0, 1, 10, 10, 24, 22), (1, 2, 30, 30, 62, 60)])
    terms = criterion(model.decode(model(torch.rand(2, 3, 64, 64)), (64, 64)), targets)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "keys, line",
    [
        ({"counters_per_class": "10,20"}, "counters_per_class has 2 values, expected 3 above 0"),
        ({"counters_per_class": "10,20,0"}, "counters_per_class has 3 values, expected 3 above 0"),
        ({"iou_loss": "ciuo"}, "iou_loss=ciuo"),
        ({"ignore_thresh": "half"}, "ignore_thresh=half: not a finite number"),
    ],
)
def test_bad_keys_of_a_section_are_named_at_their_line(keys, line):
    with pytest.raises(CfgError, match=rf"test.cfg:8: {line}"):
        make_criterion(("best_anchor", "darknet"), **keys)


@pytest.mark.parametrize("section", ["assigner", "loss"])
def test_what_the_cfg_says_is_no_recipe_key(section):
    sections = {"assigner": {"name": "best_anchor"}, "loss": {"name": "darknet"}}
    sections[section]["heads"] = 3
    with pytest.raises(UserError, match="heads comes from the cfg, not from a recipe"):
        build_criterion(sections["assigner"], sections["loss"], 3, "x.yaml", make_heads())


def test_objects_of_pictures_far_apart_are_seen_alike():
    """More objects than are compared at once, pictures without any between them."""
    rows = [(image, 0, x, 10, x + 20, 40) for image in (0, 5) for x in range(0, 100, 2)]
    targets, raws = make_targets(rows), make_raws(num_images=6, dtype=torch.float32)
    preds = decode(raws, ANCHORS, SIZE)
    best_anchor = ASSIGNERS["best_anchor"](heads=make_heads(ignore_thresh=0.3, truth_thresh=0.4))
    assignment = build_targets(preds, targets, best_anchor)
    alone = decode([raw[5:] for raw in raws], ANCHORS, SIZE)
    picture = Targets.of(torch.zeros(50, dtype=torch.int64), targets.labels[50:], targets.boxes[50:])
    expected = build_targets(alone, picture, best_anchor)
    assert torch.equal(assignment.ignore[5], expected.ignore[0])
    ours, theirs = assignment.compact(), expected.compact()
    mine = ours.image == 5
    assert torch.equal(ours.prior[mine], theirs.prior) and torch.equal(ours.target[mine] - 50, theirs.target)


@torch.no_grad()
def overlap_of(model, batch) -> float:
    """Mean over the objects of the best IoU that any slot of their picture predicts."""
    preds = model.eval().predict(batch.images / 255)
    return paired_iou(preds.boxes[batch.targets.image], batch.targets.boxes[:, None]).amax(1).mean().item()


# two-stage needs proposals: tests/test_stages.py trains with it
@pytest.mark.parametrize("name", sorted({path.stem for path in RECIPES.glob("*.yaml")} - {"two-stage"}))
def test_every_recipe_teaches_a_head_with_anchors(name):
    """With its own rates and gains, in a hundred small steps, boxes come to fit their objects better."""
    recipe, step, batch = read_recipe(name), tiny_step(), tiny_batch(range(8))
    step.criterion = build_criterion(recipe.assigner, recipe.loss, 2, name, step.model.heads)
    optim = replace(recipe.optim, nominal_batch=8, warmup_epochs=0.0)
    options = {"device": torch.device("cpu"), "precision": PRECISIONS["float32"], "optim": optim}
    trainer = Trainer(step, num_batches=1, batch_size=8, epochs=100, **options)
    before = overlap_of(step.model, batch)
    for _ in range(100):
        trainer.train_epoch([batch])
        trainer.end_epoch()
    after = overlap_of(step.model, batch)
    assert after > before

"""AutoAssign: equal to mmdetection, and what its priors, weights and normalisers do."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import models.losses.autoassign as module
from models.assigners import ASSIGNERS, build_targets
from models.assigners.inside_box import InsideBox
from models.cfg import adapt_classes, parse_cfg, read_cfg
from models.darknet import Darknet
from models.darknet_weights import read_weights, write_weights
from models.graph import build_graph
from models.losses import build_criterion, compute_loss
from models.losses.autoassign import AutoAssignLoss, negative_log
from models.section import CfgError
from models.structures import Predictions
from tests.models.points_case import fcos_priors, predictions, targets_of
from tests.models.yolov3_case import OBJECTS, make_targets
from utils.config import read_recipe
from utils.structures import Targets

CFG = Path(__file__).resolve().parents[2] / "cfg"
SIZE, STRIDES = (96, 128), (8, 16, 32)


class Golden:
    """One file of golden/autoassign; raw maps are leaves."""

    def __init__(self, path, dtype=torch.float32, device="cpu"):
        data = self.data = dict(np.load(path))
        strides = data["strides"].tolist()
        self.raws = {
            f"{kind}{level}": torch.tensor(data[f"{kind}{level}"], dtype=dtype, device=device).requires_grad_()
            for kind in ("cls", "box", "obj")
            for level in range(len(strides))
        }
        num_images, num_classes = data["cls0"].shape[:2]
        priors = fcos_priors(strides, SIZE, offset=0, dtype=dtype)
        self.priors = type(priors)(
            grids=priors.grids, **{k: v.to(device) for k, v in vars(priors).items() if isinstance(v, torch.Tensor)}
        )
        boxes, cls, obj = (
            torch.cat([self.raws[f"{kind}{level}"].flatten(2) for level in range(len(strides))], dim=2).transpose(1, 2)
            for kind in ("box", "cls", "obj")
        )
        # the file's distances are behind the head's relu: the coder would apply its own once more
        corners = torch.cat([self.priors.center - boxes[..., :2], self.priors.center + boxes[..., 2:]], dim=-1)
        self.preds = predictions(self.priors, cls, corners, obj.squeeze(-1))
        self.targets = targets_of(data, num_images=num_images).to(device)
        self.loss = AutoAssignLoss(num_classes=num_classes).to(device, dtype)
        with torch.no_grad():
            self.loss.mean.copy_(torch.tensor(data["center_mean"]))
            self.loss.sigma.copy_(torch.tensor(data["center_sigma"]))


@pytest.mark.golden_case("autoassign/*.npz")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_mmdetection(case, dtype):
    check_golden(Golden(case, dtype), 1e-6 if dtype == torch.float32 else 1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.golden_case("autoassign/*.npz")
def test_equals_mmdetection_on_cuda(case):
    check_golden(Golden(case, device="cuda"), 1e-6)


def check_golden(golden, rtol):
    data = golden.data
    np.testing.assert_array_equal(golden.priors.center.cpu(), data["points"])
    assignment = build_targets(golden.preds, golden.targets, InsideBox())
    weights = golden.loss.center_prior(golden.preds, golden.targets, assignment)
    start = 0
    for image in range(len(golden.preds.obj)):
        used = data[f"inside_used{image}"]
        stop = start + used.shape[1]
        rows = (assignment.target >= start) & (assignment.target < stop)
        np.testing.assert_array_equal(assignment.weight[rows].view(*used.T.shape).T.cpu() > 0, used)
        expected = data[f"center_weight{image}"]
        found = weights[rows].view(*used.T.shape).T.detach().cpu()
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-30)
        start = stop
    terms = golden.loss(golden.preds, golden.targets, assignment)
    found = [terms[name].item() for name in ("pos", "neg", "center")]
    np.testing.assert_allclose(found, data["loss_items_f64"], rtol=rtol)
    sum(terms.values()).backward()
    grads = {name: raw.grad for name, raw in golden.raws.items()}
    grads |= {"center_mean": golden.loss.mean.grad, "center_sigma": golden.loss.sigma.grad}
    for name, grad in grads.items():
        expected = data[f"grad_{name}"]
        assert np.abs(grad.cpu().numpy() - expected).max() <= 1e-5 * np.abs(expected).max(), name


# ---------------------------------------------------------------------------------------------------------------- laws


def situation(boxes, *, num_images=1, num_classes=2, labels=None, seed=0, image=None):
    generator = torch.Generator().manual_seed(seed)
    priors = fcos_priors(STRIDES, SIZE, offset=0, dtype=torch.float64)
    shape = (num_images, len(priors))
    reach = torch.rand(*shape, 4, generator=generator, dtype=torch.float64) * 30 + 5
    corners = torch.cat([priors.center - reach[..., :2], priors.center + reach[..., 2:]], dim=-1)
    obj, cls = (
        torch.randn(*extra, generator=generator, dtype=torch.float64) for extra in (shape, (*shape, num_classes))
    )
    leaves = [tensor.requires_grad_() for tensor in (cls, corners, obj)]
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    zeros = torch.zeros(len(boxes), dtype=torch.int64)
    image, labels = (zeros if column is None else torch.tensor(column) for column in (image, labels))
    return (
        predictions(priors, *leaves),
        Targets.of(image, labels, boxes),
        AutoAssignLoss(num_classes=num_classes).double(),
    )


def run(preds, targets, loss, assigner=None):
    return loss(preds, targets, build_targets(preds, targets, assigner or InsideBox()))


def test_worked_example():
    """The numbers of docs/assigners/autoassign.md: nine points; the middle one predicts the box, the others half."""
    priors = fcos_priors((8,), (64, 64), offset=0, dtype=torch.float64)
    boxes = torch.tensor([16.0, 16, 48, 32], dtype=torch.float64).repeat(1, 64, 1)
    boxes[0, 4 * 8 + 4, 3] = 48
    targets = Targets.of(torch.tensor([0]), torch.tensor([0]), torch.tensor([[16.0, 16, 48, 48]]))
    logits = torch.zeros(1, 64, 1, dtype=torch.float64)
    preds, loss = predictions(priors, logits, boxes, logits[..., 0]), AutoAssignLoss(num_classes=1).double()
    assignment = build_targets(preds, targets, InsideBox()).compact()
    assert assignment.prior.tolist() == [8 * row + column for row in (3, 4, 5) for column in (3, 4, 5)]
    prior = loss.center_prior(preds, targets, assignment)
    assert prior.view(3, 3)[1].tolist() == pytest.approx([0.6065, 1, 0.6065], abs=1e-4)
    terms = loss(preds, targets, assignment)
    assert terms["pos"].item() == pytest.approx(0.25 * -math.log(0.0981), abs=1e-3)
    assert terms["neg"].item() == pytest.approx(0.75 * 63 * 0.25**2 * -math.log(0.75) / 4.897, abs=1e-3)
    assert terms["center"].item() == pytest.approx(0.75 / 4.897, abs=1e-3)


def test_the_prior_is_a_product_because_both_axes_must_agree():
    """A point far off in x alone has no weight, however well it stands in y: a sum would give it half."""
    preds, targets, loss = situation([[4, 28, 124, 68]])
    assignment = build_targets(preds, targets, InsideBox()).compact()
    prior = loss.center_prior(preds, targets, assignment)
    offset = (preds.priors.center[assignment.prior] - torch.tensor([64.0, 48.0])) / preds.priors.stride[
        assignment.prior
    ]
    off_in_x = (offset[:, 0].abs() > 4) & (offset[:, 1] == 0)
    each = torch.exp(-offset.square() / 2)
    assert off_in_x.any() and (prior[off_in_x] < 1e-3).all() and (each.mean(1)[off_in_x] >= 0.5).all()
    torch.testing.assert_close(prior, torch.exp(-offset.square().sum(1) / 2))


def test_the_prior_follows_its_mean_and_sigma_per_class():
    preds, targets, loss = situation([[16, 16, 80, 80], [16, 16, 80, 80]], labels=[0, 1])
    with torch.no_grad():
        loss.mean[1] = torch.tensor([1.0, -2.0])
        loss.sigma[1] = 0.5
    assignment = build_targets(preds, targets, InsideBox()).compact()
    prior = loss.center_prior(preds, targets, assignment)
    for row, (shift, sigma) in enumerate([((0.0, 0.0), 1.0), ((1.0, -2.0), 0.5)]):
        rows = (assignment.target == row) & (preds.priors.stride[assignment.prior, 0] == 8)
        best = preds.priors.center[assignment.prior[rows][prior[rows].argmax()]]
        assert best.tolist() == [48 + 8 * shift[0], 48 + 8 * shift[1]]
        torch.testing.assert_close(prior[rows].max(), torch.tensor(1.0).double())
        assert (prior[rows] > math.exp(-0.5 / sigma**2) - 1e-9).sum() == 5  # the best point and its four neighbours


def test_objectness_learns_from_positives_and_negatives_without_a_label():
    """Implicit objectness: raised on the points of an object that fit, lowered on every other point."""
    preds, targets, loss = situation([[24, 24, 88, 88]])
    terms = run(preds, targets, loss)
    (grad,) = torch.autograd.grad(sum(terms.values()), preds.obj)
    inside = build_targets(preds, targets, InsideBox()).compact().prior.unique()
    outside = torch.ones(len(preds.priors), dtype=torch.bool)
    outside[inside] = False
    assert (grad[0, outside] > 0).all() and (grad[0, inside] < 0).any()


def test_normalisers_count_objects_priors_and_images():
    """pos is per object, neg per unit of prior, center per image: an image twice changes none of them."""
    boxes = [[24, 24, 88, 88], [60, 10, 100, 50]]
    preds, targets, loss = situation(boxes, labels=[0, 1])
    once = run(preds, targets, loss)
    twice = Predictions(
        priors=preds.priors, **{k: torch.cat([getattr(preds, k)] * 2) for k in ("boxes", "deltas", "obj", "cls")}
    )
    both = Targets.of(torch.tensor([0, 0, 1, 1]), targets.labels.repeat(2), targets.boxes.repeat(2, 1))
    for name, term in run(twice, both, loss).items():
        torch.testing.assert_close(term, once[name])


def test_image_without_objects_adds_its_negatives_and_nothing_else():
    preds, targets, loss = situation([[24, 24, 88, 88]], num_images=2)
    terms = run(preds, targets, loss)
    alone, _, _ = situation([[24, 24, 88, 88]], num_images=2)
    first = Predictions(priors=alone.priors, **{k: getattr(alone, k)[:1] for k in ("boxes", "deltas", "obj", "cls")})
    single = run(first, targets, loss)
    torch.testing.assert_close(terms["pos"], single["pos"])
    torch.testing.assert_close(terms["center"], single["center"] / 2)
    assert terms["neg"] > single["neg"]


def test_object_without_a_point_costs_a_constant():
    preds, targets, loss = situation([[1, 1, 7, 7]])
    terms = run(preds, targets, loss)
    assert terms["pos"].item() == pytest.approx(0.25 * 100) and terms["center"].item() == 0
    grads = torch.autograd.grad(sum(terms.values()), [preds.obj, preds.cls, loss.mean], allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)


def test_no_objects_at_all():
    preds, targets, loss = situation([], num_images=2)
    terms = run(preds, targets, loss)
    q = preds.obj.sigmoid()[..., None] * preds.cls.sigmoid()
    torch.testing.assert_close(terms["neg"], 0.75 * (q.square() * -torch.log(1 - q)).sum())
    assert terms["pos"] == 0 and terms["center"] == 0


def test_the_later_of_two_objects_of_a_class_sets_the_negative_weight():
    """Golden overlap_same_class says so too; here: swapping them changes neg, and is the same on every run."""
    boxes = [[10, 10, 70, 70], [50, 50, 120, 94]]
    results = []
    for order in ([0, 1], [1, 0], [0, 1]):
        preds, targets, loss = situation([boxes[i] for i in order])
        results.append(run(preds, targets, loss)["neg"].item())
    assert results[0] == results[2] != results[1]


def test_ignored_slots_have_no_gradient():
    preds, targets, loss = situation([[24, 24, 56, 56]])
    targets = Targets.of(
        targets.image, targets.labels, targets.boxes, torch.tensor([0]), torch.tensor([[60.0, 0.0, 128.0, 96.0]])
    )
    assignment = build_targets(preds, targets, InsideBox())
    grads = torch.autograd.grad(sum(loss(preds, targets, assignment).values()), [preds.obj, preds.cls])
    assert assignment.ignore.any() and all((grad[assignment.ignore] == 0).all() for grad in grads)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_finite_on_anything(scale):
    preds, targets, loss = situation([[24, 24, 88, 88], [30, 30, 30, 30], [1, 1, 7, 7]], labels=[0, 1, 1])
    leaves = [(leaf.detach() * scale).float().requires_grad_() for leaf in (preds.cls, preds.boxes, preds.obj)]
    with torch.no_grad():
        leaves[1][:, 50] = targets.boxes[0]  # a perfect box
    terms = run(predictions(preds.priors, *leaves), targets, loss.float())
    assert all(term.isfinite() for term in terms.values())
    grads = torch.autograd.grad(sum(terms.values()), [*leaves, loss.mean, loss.sigma])
    assert all(grad.isfinite().all() for grad in grads)


def test_counts_are_averaged_over_processes(monkeypatch):
    """Another process with three times the objects and priors: twice the mean."""
    preds, targets, loss = situation([[24, 24, 88, 88], [60, 10, 100, 50]], labels=[0, 1])
    alone = run(preds, targets, loss)
    monkeypatch.setattr(module, "all_reduce_mean", lambda counts: counts * 2)
    shared = run(preds, targets, loss)
    torch.testing.assert_close(shared["pos"], alone["pos"] / 2)
    torch.testing.assert_close(shared["neg"], alone["neg"] / 2)
    torch.testing.assert_close(shared["center"], alone["center"])


def test_negative_log_ends_at_100():
    x = torch.tensor([0.0, 1e-45, 1e-30, 0.5, 1.0, 1.0000001], requires_grad=True)
    value = negative_log(x)
    value.sum().backward()
    torch.testing.assert_close(value, torch.tensor([100.0, 100.0, 69.0776, 0.693147, 0.0, 0.0]))
    assert x.grad.isfinite().all() and x.grad[0] == 0


@pytest.mark.parametrize("name", ["pos", "neg", "center", "box", "temperature"])
def test_negative_gains_are_refused(name):
    with pytest.raises(ValueError, match=name):
        AutoAssignLoss(num_classes=1, **{name: -1.0})


@pytest.mark.parametrize(
    "assigner", [name for name, kind in ASSIGNERS.items() if "anchors" not in getattr(kind, "needs", ())]
)
def test_no_sync_with_any_assigner(assigner):
    """Forward and backward on the meta device, where looking at a value raises."""
    preds, *_ = situation([], num_classes=3, num_images=2)
    leaves = [leaf.detach().to("meta").requires_grad_() for leaf in (preds.cls, preds.boxes, preds.obj)]
    moved = {k: v.to("meta") for k, v in vars(preds.priors).items() if isinstance(v, torch.Tensor)}
    preds = predictions(type(preds.priors)(grids=preds.priors.grids, **moved), *leaves)
    criterion = build_criterion({"name": assigner}, {"name": "autoassign"}, 3).to("meta")
    sum(criterion(preds, make_targets(OBJECTS, ignore=[(1, 0, 0, 64, 96)]).to("meta")).values()).backward()


# ----------------------------------------------------------------------------------------- [fcos] and GroupNorm in cfgs

NET = "[net]\nwidth=64\nheight=64\nchannels=3\n"
CONV = "[convolutional]\nfilters={}\nsize=3\nstride={}\npad=1\nactivation={}\n{}"
HEAD = NET + "\n".join(
    [
        CONV.format(8, 8, "relu", "group_normalize=4\n"),
        CONV.format(4, 1, "linear", ""),
        "[route]\nlayers=-2\n",
        CONV.format(1, 1, "linear", ""),
        "[route]\nlayers=0\n",
        CONV.format(3, 1, "linear", ""),
        "[fcos]\nfrom=1,3,5\nclasses=3\noffset=0\n",
    ]
)


def test_fcos_decodes_distances_from_its_points():
    torch.manual_seed(0)
    model = Darknet(parse_cfg(HEAD))
    head = model.heads[0]
    with torch.no_grad():
        head.scale.fill_(1.5)
    raw = model(torch.rand(1, 3, 64, 64))[0]
    preds = model.decode([raw], (64, 64))
    boxes = model.layer_outputs(torch.rand(1, 3, 64, 64))[1]
    assert boxes.shape == (1, 4, 8, 8) and preds.priors.center[9].tolist() == [8.0, 8.0]
    assert model.layers[1].conv.bias.tolist() == [4.0] * 4 and model.layers[5].conv.bias[
        0
    ].sigmoid().item() == pytest.approx(0.02)
    distances = raw[0, :4, 1, 1].clamp(min=0) * 8
    torch.testing.assert_close(preds.boxes[0, 9], torch.cat([8 - distances[:2], 8 + distances[2:]]))
    head.scale.grad = None
    preds.boxes.sum().backward()
    assert head.scale.grad is not None
    middle = Darknet(parse_cfg(HEAD.replace("offset=0\n", "")))
    assert middle.predict(torch.rand(1, 3, 64, 64)).priors.center[9].tolist() == [12.0, 12.0]


def test_fcos_without_objectness_is_certain_and_refused_where_it_is_needed():
    cfg = parse_cfg(HEAD.replace("from=1,3,5", "from=1,5"))
    model = Darknet(cfg)
    preds = model.predict(torch.rand(1, 3, 64, 64))
    assert (preds.obj.sigmoid() == 1).all() and preds.cls.shape == (1, 64, 3)
    build_criterion({"name": "atss"}, {"name": "autoassign"}, 3, heads=model.heads)
    line = model.heads[0].section.line
    with pytest.raises(CfgError, match=rf":{line}: .*objectness"):
        build_criterion({"name": "atss"}, {"name": "yolox"}, 3, heads=model.heads)


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("group_normalize=4", "group_normalize=3", "group_normalize=3 does not divide 8 filters"),
        ("group_normalize=4", "group_normalize=4\nbatch_normalize=1", "both batch_normalize and group_normalize"),
        ("from=1,3,5", "from=1", "from names 1 layers"),
        ("from=1,3,5", "from=1,3,0", "filters=8.*needs 3"),
    ],
)
def test_bad_heads_are_refused_with_their_line(old, new, expected):
    with pytest.raises(CfgError, match=rf"<text>:\d+: .*{expected}"):
        build_graph(parse_cfg(HEAD.replace(old, new)))


def test_group_norm_is_torchs_and_survives_a_weights_file(tmp_path):
    torch.manual_seed(0)
    model = Darknet(parse_cfg(HEAD))
    layer, images = model.layers[0], torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2)
        layer.norm.bias.uniform_(-1, 1)
        model.heads[0].scale.fill_(1.25)
    x = torch.nn.functional.conv2d(images, layer.conv.weight, None, 8, 1).view(2, 4, -1)
    x = (x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x.view(2, 8, 8, 8) * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    torch.testing.assert_close(layer(images), x.relu(), rtol=1e-4, atol=1e-5)

    graph = model.graph
    assert graph.layers[0].params == graph.layers[0].floats == 3 * 8 * 9 + 16 and graph.layers[6].floats == 1
    write_weights(model, tmp_path / "a.weights")
    assert (tmp_path / "a.weights").stat().st_size == 20 + 4 * sum(spec.floats for spec in graph.layers)
    torch.manual_seed(1)
    other = Darknet(parse_cfg(HEAD))
    read_weights(other, tmp_path / "a.weights")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    torch.testing.assert_close(model.eval().fuse()(images), model(images))


@pytest.mark.parametrize(
    "name, strides, params",
    [("autoassign-tiny", (8, 16, 32), 1_065_083), ("autoassign-darknet53", (8, 16, 32, 64, 128), 48_913_466)],
)
def test_networks(name, strides, params):
    graph = build_graph(adapt_classes(read_cfg(CFG / f"{name}.cfg"), 20)[0])
    assert graph.strides == strides and {graph.layers[i].shape[0] for i in graph.heads} == {25}
    graph = build_graph(read_cfg(CFG / f"{name}.cfg"))
    assert sum(spec.params for spec in graph.layers) == params
    backbone, ours = build_graph(read_cfg(CFG / "yolov3.cfg")), graph
    if name == "autoassign-darknet53":
        assert [(a.section.type, a.floats) for a in ours.layers[:75]] == [
            (a.section.type, a.floats) for a in backbone.layers[:75]
        ]


@pytest.mark.parametrize("recipe", ["autoassign", "atss", "tal", "fcos"])
def test_recipes_train_the_small_network(recipe):
    """Two steps on one picture lower the loss; the shared head is one set of parameters."""
    torch.manual_seed(0)
    model = Darknet(read_cfg(CFG / "autoassign-tiny.cfg"))
    settings = read_recipe(recipe, [])
    criterion = build_criterion(settings.assigner, settings.loss, 3, recipe, model.heads)
    targets = make_targets([(0, 0, 10, 10, 60, 70), (0, 2, 60, 20, 120, 50), (1, 1, 40, 35, 50, 50)])
    images = torch.rand(2, 3, 96, 128)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=1e-3)
    losses = []
    for _ in range(3):
        terms = compute_loss(model(images), targets, model, criterion, (96, 128))
        losses.append(sum(terms.values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]

"""Any assigner with any loss on any head: it trains, or is refused at the cfg's line."""

import pytest
import torch

from models.assigners import ASSIGNERS
from models.cfg import parse_cfg
from models.darknet import Darknet
from models.losses import LOSSES, build_criterion, compute_loss
from models.raw_predictions import RawPredictions
from tests.models.yolov3_case import OBJECTS, make_targets
from utils.errors import UserError

NET = "[net]\nwidth=128\nheight=96\nchannels=3\n[convolutional]\nfilters=8\nsize=3\nstride=8\npad=1\nactivation=leaky\n"
DOWN = "[convolutional]\nfilters=8\nsize=3\nstride=2\npad=1\nactivation=leaky\n"
CONV = "[convolutional]\nfilters={}\nsize=1\nactivation=linear\n"
YOLO = CONV.format(16) + "[yolo]\nmask={}\nanchors=12,16, 19,36, 40,28, 36,75\nclasses=3\nnum=4\n"
PARTS = "[route]\nlayers=-1\n" + CONV.format(4) + "[route]\nlayers=-2\n" + CONV.format(1)
PARTS += "[route]\nlayers=-4\n" + CONV.format(3)
HEADS = {  # two heads each, strides 8 and 16
    "yolo": YOLO.format("0,1") + "[route]\nlayers=0\n" + DOWN + YOLO.format("2,3"),
    "yolox": PARTS + "[yolox]\nfrom=-5,-3,-1\nclasses=3\n[route]\nlayers=0\n" + DOWN,
    "fcos": PARTS + "[fcos]\nfrom=-5,-3,-1\nclasses=3\n[route]\nlayers=0\n" + DOWN,
}
HEADS["fcos without objectness"] = HEADS["fcos"].replace("from=-5,-3,-1", "from=-5,-1")
for kind in HEADS.keys() - {"yolo"}:
    HEADS[kind] += HEADS[kind].partition("[route]\nlayers=0")[0]
REFUSED = {  # what an assigner or a loss needs and a head does not have
    "yolo": {"proposals"},
    "yolox": {"anchors", "proposals", "[yolo] training keys"},
    "fcos": {"anchors", "proposals", "[yolo] training keys"},
    "fcos without objectness": {"anchors", "objectness", "proposals", "[yolo] training keys"},
}


def needs(assigner, loss):
    return {*getattr(ASSIGNERS[assigner], "needs", ()), *getattr(LOSSES[loss], "needs", ())}


@pytest.fixture(scope="module", params=HEADS)
def network(request):
    torch.manual_seed(0)
    return request.param, Darknet(parse_cfg(NET + HEADS[request.param], "my.cfg"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_trains_or_is_refused_at_its_line(network, assigner, loss):
    kind, model = network
    sections = {"name": assigner}, {"name": loss}
    if needs(assigner, loss) & REFUSED[kind]:
        with pytest.raises(UserError, match=rf"my.cfg:\d+: .*\[{kind.split()[0]}\]"):
            build_criterion(*sections, model.num_classes, heads=model.heads)
        return
    criterion = build_criterion(*sections, model.num_classes, heads=model.heads)
    generator = torch.Generator().manual_seed(3)
    shapes = [output.shape for output in model(torch.zeros(2, 3, 96, 128))]
    raws = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    region = (1, 0, 0, 128, 96)  # all of a picture whose objects stay: what answers for them is not ignored
    targets = make_targets(OBJECTS, ignore=[region])
    terms = compute_loss(raws, targets, model, criterion, (96, 128))
    assert all(term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert all(raw.grad.isfinite().all() for raw in raws) and any((raw.grad[0] != 0).any() for raw in raws)
    ignore = criterion.assigner(model.decode(raws, (96, 128)), targets).ignore
    assert ignore[1].any()
    for raw, grid in zip(raws, model.decode(raws, (96, 128)).priors.grids):
        hidden = ignore[:, grid.slots].view(2, grid.anchors, 1, grid.rows, grid.columns)
        gradient = raw.grad.view(2, grid.anchors, -1, grid.rows, grid.columns)
        assert (gradient * hidden == 0).all(), "exactly zero where nothing is right or wrong"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_forward_and_backward_look_at_no_value(network, assigner, loss):
    """On the meta device there is none to look at; on a GPU each look would wait for it."""
    kind, model = network
    if needs(assigner, loss) & REFUSED[kind]:
        return
    criterion = build_criterion({"name": assigner}, {"name": loss}, model.num_classes, heads=model.heads).to("meta")
    raws = [output.detach().to("meta").requires_grad_() for output in model(torch.zeros(2, 3, 96, 128))]
    targets = make_targets(OBJECTS, ignore=[(1, 0, 0, 64, 96)]).to("meta")
    preds = RawPredictions(model.heads, raws, (96, 128))  # autocast, hence compute_loss, does not know this device
    sum(criterion(preds, targets).values()).backward()
    assert all(raw.grad is not None for raw in raws)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_decoding_a_few_slots_equals_decoding_all(network, assigner, loss):
    """Training decodes what it looks at; terms and gradients are those of decoding everything."""
    kind, model = network
    if needs(assigner, loss) & REFUSED[kind]:
        return
    criterion = build_criterion({"name": assigner}, {"name": loss}, model.num_classes, heads=model.heads).double()
    generator, size = torch.Generator().manual_seed(4), (96, 128)
    shapes = [output.shape for output in model(torch.zeros(2, 3, *size))]
    raws = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    targets = make_targets(OBJECTS, ignore=[(1, 0, 0, 64, 96)])
    results = []
    for preds in (model.decode(raws, size), RawPredictions(model.heads, raws, size)):
        terms = criterion(preds, targets)
        results.append((terms, torch.autograd.grad(sum(terms.values()), raws)))
    (all_terms, all_gradients), (terms, gradients) = results
    torch.testing.assert_close(terms, all_terms, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, all_gradients, rtol=1e-9, atol=1e-14)

"""[rpn], [roi] and [mask] in a cfg: what they make, what is refused at which line, weights, the networks in cfg/."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.assignment_pictures import sheets
from models.cfg import adapt_classes, parse_cfg, read_cfg
from models.coders import AnchorDeltas
from models.compare_assigners import build_criteria, loss_shares, only
from models.darknet import Darknet
from models.darknet_weights import Header, read_weights, write_weights
from models.graph import build_graph
from models.heads import RpnHead
from models.predictor import Predictor
from models.section import CfgError
from models.structures import Predictions
from tests.models.rpn_case import GoldenRPN
from tests.models.two_stage_case import (
    BOXES,
    MASK,
    MASKS,
    OBJECTS,
    PYRAMID,
    ROI,
    RPN,
    SIZE,
    make_images,
    make_network,
    make_targets,
)
from utils.errors import UserError
from utils.structures import Batch, ImageInfo

CFG = Path(__file__).resolve().parents[2] / "cfg"
YOLO = "[convolutional]\nfilters=16\nactivation=linear\n[yolo]\nanchors=10,10,20,20\nnum=2\nclasses=3\nmask=0,1\n"


def test_outputs_are_maps_and_pyramids():
    network = make_network()
    *maps, pyramid, same = network(make_images())
    assert [tuple(one.shape) for one in maps] == [(3, 30, 24, 32), (3, 30, 12, 16)]
    assert isinstance(pyramid, tuple) and pyramid is same and [one.shape[2] for one in pyramid] == [24, 12]
    preds = network.decode((*maps, pyramid, same), SIZE)
    assert preds.boxes.shape == (3, 6 * (24 * 32 + 12 * 16), 4) and preds.cls.shape[2] == 0
    assert set(preds.refine) == {"roi", "mask"} and preds.priors.level.unique().tolist() == [0, 1]
    assert network.num_classes == 3


def test_priors_are_sizes_times_ratios():
    head = make_network().heads[0]
    priors = head.priors((24, 32), SIZE)
    assert torch.allclose(priors.center[0], torch.tensor([2.0, 2])) and head.num_anchors == 6
    width, height = priors.size[:: 24 * 32].unbind(1)
    assert torch.allclose(width * height, torch.tensor([144.0] * 3 + [400.0] * 3))
    assert torch.allclose(height / width, torch.tensor([0.5, 1, 2, 0.5, 1, 2]))


@pytest.mark.golden_case("rpn/*.npz")
def test_the_head_speaks_as_detectron2(case):
    golden = GoldenRPN(case)
    preds = Predictions.cat([_decoded(golden, level) for level in range(len(golden.grids))])
    assert torch.equal(preds.priors.center, golden.priors.center) and torch.equal(preds.boxes, golden.preds.boxes)
    assert torch.equal(preds.obj, golden.logits) and torch.equal(preds.deltas, golden.deltas)


def _decoded(golden, level):
    """What an [rpn] makes of one level of a golden case."""
    grid = golden.priors.grids[level]
    weights = golden.head.coder.weights
    head = RpnHead(anchors=golden.cells[level], offset=golden.hyp["anchor_offset"], section=None)
    head.coder = AnchorDeltas(weights)
    values = torch.cat([golden.deltas[:, grid.slots], golden.logits[:, grid.slots, None]], dim=-1)
    values = values.unflatten(1, (grid.anchors, grid.rows, grid.columns)).permute(0, 1, 4, 2, 3)
    return head.decode(head(values.flatten(1, 2)), golden.size)


@pytest.mark.parametrize("name", ["rcnn-tiny", "rcnn-tiny-mask", "rcnn-darknet53", "rcnn-darknet53-mask"])
def test_networks(name):
    graph = build_graph(read_cfg(CFG / f"{name}.cfg"))
    types = [graph.cfg.layers[index].type for index in graph.heads]
    levels = 3 if "tiny" in name else 5
    assert types == ["rpn"] * levels + ["roi"] + ["mask"] * name.endswith("mask")
    assert graph.strides[:levels] == (4, 8, 16, 32, 64)[:levels]
    assert graph.cfg.has_masks == name.endswith("mask")
    params = sum(spec.params for spec in graph.layers)
    assert params < 1e6 if "tiny" in name else 5.5e7 < params < 6.5e7


def test_the_darknet53_backbone_is_yolov3s():
    ours, theirs = (build_graph(read_cfg(CFG / f"{name}.cfg")) for name in ("rcnn-darknet53", "yolov3"))
    for our, their in zip(ours.layers[:75], theirs.layers[:75], strict=True):
        assert (our.section.type, our.inputs, our.shape[0], our.floats) == (
            their.section.type,
            their.inputs,
            their.shape[0],
            their.floats,
        )


def test_params_are_counted():
    for name in ("rcnn-tiny", "rcnn-tiny-mask"):
        model = Darknet(read_cfg(CFG / f"{name}.cfg"))
        assert sum(spec.params for spec in model.graph.layers) == sum(one.numel() for one in model.parameters())


def test_weights_come_back(tmp_path):
    network, other = make_network(seed=0), make_network(seed=1)
    write_weights(network, tmp_path / "a.weights", Header())
    read_weights(other, tmp_path / "a.weights")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_another_number_of_classes():
    cfg, changes = adapt_classes(parse_cfg(MASKS, "my.cfg"), 7)
    assert len(changes) == 2 and all("classes 3 -> 7" in change for change in changes)
    model = Darknet(cfg)
    assert model.num_classes == 7 and model.heads[-1].masks.out_channels == 7 and model.heads[0].num_classes == 0


@pytest.mark.parametrize(
    "text, complaint",
    [
        (PYRAMID + RPN, r"my.cfg:\d+: \[rpn\] without \[roi\]"),
        (PYRAMID + ROI, r"my.cfg:\d+: \[roi\] without \[rpn\]"),
        (BOXES + "[route]\nlayers=0\n" + MASK, r"my.cfg:\d+: \[mask\] after \[route\]"),
        (BOXES + "[route]\nlayers=0\n" + YOLO, r"my.cfg:\d+: \[yolo\] beside \[r"),
        (BOXES + ROI, r"my.cfg:\d+: a second \[roi\]"),
        (BOXES.replace("from=0,1", "from=1,0"), r"my.cfg:\d+: .*finest map first"),
        (BOXES.replace("from=0,1", "from=0,3"), r"my.cfg:\d+: .*finest map first"),
        (BOXES.replace("sizes=12,20", "sizes=12"), r"my.cfg:\d+: filters=30, \[rpn\] line \d+ needs 15"),
        (MASKS.replace("classes=3\ncanonical_size=64\npool=6", "classes=4\npool=6"), r"classes=4, but 3 at line"),
        (BOXES.replace("canonical_size=64", "canonical_size=0"), r"canonical_size: 0, expected more than 0"),
        (BOXES.replace("pool=5", "pool=0"), r"pool=0, expected at least 1"),
        (BOXES.replace("classes=3\n", ""), r"\[roi\] lacks 'classes'"),
        (BOXES.replace("sizes=12,20\n", ""), r"\[rpn\] lacks 'sizes'"),
        (BOXES.replace("sizes=12,20", "sizes=12,-20"), r"sizes: -20, expected more than 0"),
    ],
)
def test_bad_cfgs_are_refused_at_their_line(text, complaint):
    with pytest.raises(CfgError, match=complaint):
        Darknet(parse_cfg(text, "my.cfg"))


def test_predictor():
    images = (make_images() * 255).to(torch.uint8)
    found = Predictor(make_network(), conf_thres=0.01, max_det=5)(images)
    assert [len(one) for one in found] == [5, 5, 5] and found[0].masks.shape == (5, 12, 12)
    with pytest.raises(UserError, match=r"expected 0\.\.2"):
        Predictor(make_network(), classes=[3])(images)


def test_pictures_of_assignments_have_both_stages():
    network, targets = make_network().eval(), make_targets()
    criteria, refused = build_criteria(network)
    assert set(criteria) == {"rpn"} and "simota" in refused and "rpn" not in refused
    infos = tuple(ImageInfo(id=number, path="x", size=SIZE) for number in range(3))
    images = (make_images() * 255).to(torch.uint8)
    drawn = sheets(network, Batch(images=images, targets=targets, infos=infos))
    assert len(drawn) == 3 and all(picture.dtype == np.uint8 for picture in drawn)
    shares = loss_shares(network, images[:1].float() / 255, only(targets, 0), criteria["rpn"])
    assert shares["rpn_obj"].shape == (3,) and shares["rpn_obj"].sum() == pytest.approx(1)
    assert shares["mask"].sum() == 0  # does not reach the first stage's slots
    assert len(OBJECTS) == 3

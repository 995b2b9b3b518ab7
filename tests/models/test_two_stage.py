"""Proposals, regions, the second stage's losses and detections, against torchvision's detection models and loops."""

import pytest
import torch
from torchvision.models.detection import roi_heads as peer
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from models.assigners.roi import RoiSampler, with_objects
from models.losses import LOSSES, TrainStep, build_criterion
from models.losses.two_stage import region_masks
from models.postprocess import postprocess
from models.proposals import ProposalRule, Proposals, propose
from models.roi_heads import levels_of, pool_regions
from tests.models.two_stage_case import (
    BOXES,
    OBJECTS,
    SIZE,
    make_criterion,
    make_images,
    make_network,
    make_targets,
)
from utils.boxes import box_iou
from utils.errors import UserError


@pytest.fixture
def network():
    return make_network()


def said(network, seed=1):
    return network.predict(make_images(seed))


# ---- proposals


def test_proposals_equal_torchvision(network):
    preds = said(network)
    rule = ProposalRule(pre_nms=150, post_nms=60, nms_thresh=0.6, min_size=1e-3)
    ours = propose(preds, SIZE, rule)
    numbers = {"training": 150, "testing": 150}, {"training": 60, "testing": 60}
    theirs = RegionProposalNetwork(None, None, 0.7, 0.3, 256, 0.5, *numbers, 0.6).eval()
    counts = [grid.count for grid in preds.priors.grids]
    boxes, scores = theirs.filter_proposals(preds.boxes.detach(), preds.obj, [SIZE] * 3, counts)
    for image in range(3):
        valid = ours.valid[image]
        assert torch.equal(ours.boxes[image][valid], boxes[image])
        assert torch.allclose(ours.logits[image][valid].sigmoid(), scores[image])
    assert ours.valid.any(0).all() and (ours.boxes[~ours.valid] == 0).all()


def test_proposals_are_sound(network):
    preds = said(network)
    preds.boxes.data[0, :50] = float("nan")
    preds.obj.data[0, :50] = 100
    found = propose(preds, SIZE, ProposalRule(min_size=4))
    boxes = found.boxes[found.valid]
    assert boxes.isfinite().all() and not boxes.requires_grad
    assert (
        (boxes[:, 2:] - boxes[:, :2] > 4).all() and (boxes >= 0).all() and (boxes <= torch.tensor([128, 96] * 2)).all()
    )


def test_nothing_proposed(network):
    preds = said(network)
    found = propose(preds, SIZE, ProposalRule(min_size=1000))
    assert found.boxes.shape == (3, 0, 4)
    for head in network.heads[2:3]:
        object.__setattr__(head.rule, "min_size", 1000.0)
    detections = postprocess(preds, size=SIZE, conf_thres=0.001)
    assert [len(one) for one in detections] == [0, 0, 0] and detections[0].masks.shape[0] == 0
    terms = make_criterion(network)(preds, make_targets())  # learns from the objects themselves
    assert all(term.isfinite() for term in terms.values()) and terms["mask"] > 0


# ---- regions


def test_levels_equal_torchvision():
    side = torch.tensor([1, 10, 31.9, 32, 63.9, 64, 111, 112, 113, 224, 448, 1000.0])
    boxes = torch.stack([0 * side, 0 * side, side * 2, side / 2], 1)
    maps = tuple(torch.zeros(1, 1, 800 // stride, 800 // stride) for stride in (4, 8, 16, 32))
    theirs = LevelMapper(2, 5)([boxes])
    assert torch.equal(levels_of(boxes, maps, (800, 800), 224.0), theirs)


def test_regions_are_cut_from_their_level(network):
    maps = tuple(torch.randn(2, 4, *side) for side in ((24, 32), (12, 16)))
    corner = torch.rand(30, 2) * 50
    boxes = torch.cat([corner, corner + torch.rand(30, 2) * 60 + 1], 1)
    image = torch.randint(2, (30,))
    level = levels_of(boxes, maps, SIZE, 64.0)
    assert level.unique().tolist() == [0, 1]
    ours = pool_regions(maps, SIZE, level, image, boxes, 5)
    for row in range(30):
        scale = (1 / 4, 1 / 8)[level[row]]
        region = [boxes[row : row + 1]]
        one = roi_align(maps[level[row]][image[row] : image[row] + 1], region, 5, scale, 2, True)
        assert torch.allclose(ours[row], one[0], atol=1e-6)


def test_pooling_equals_torchvision_but_for_half_a_pixel():
    """torchvision's models sample half a pixel of the map further right and down: ``aligned`` came later."""
    maps = tuple(torch.randn(1, 4, *side) for side in ((24, 32), (12, 16)))
    boxes = torch.tensor([[8.0, 8, 30, 40], [16, 8, 112, 88]])
    theirs = MultiScaleRoIAlign(["0", "1"], 5, 2, canonical_scale=64, canonical_level=4)
    features = {str(number): level for number, level in enumerate(maps)}
    shift = torch.tensor([[2.0], [4.0]])  # half a cell
    theirs = theirs(features, [boxes], [SIZE])
    level = levels_of(boxes, maps, SIZE, 64.0)
    ours = pool_regions(maps, SIZE, level, torch.zeros(2).long(), boxes + shift, 5)
    assert level.tolist() == [0, 1] and torch.allclose(ours, theirs, atol=1e-5)


def make_proposals(seed=0, num=200):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(3, num, 2, generator=generator) * torch.tensor([90.0, 60.0])
    boxes = torch.cat([corner, corner + torch.rand(3, num, 2, generator=generator) * 40 + 2], dim=-1)
    boxes[0, :40] = torch.tensor(OBJECTS[0][2]) + torch.randn(min(num, 40), 4, generator=generator) * 2
    valid = torch.ones(3, num, dtype=torch.bool)
    valid[2, 100:] = False
    return Proposals(boxes=boxes, logits=torch.randn(3, num, generator=generator), valid=valid)


def test_objects_join_the_proposals():
    proposals, targets = make_proposals(num=5), make_targets()
    joined = with_objects(proposals, targets)
    assert joined.boxes.shape == (3, 7, 4) and torch.equal(joined.boxes[:, :5], proposals.boxes)
    assert torch.equal(joined.boxes[0, 5:], targets.boxes[:2]) and torch.equal(joined.boxes[2, 5], targets.boxes[2])
    assert joined.valid[:, 5:].tolist() == [[True, True], [False, False], [True, False]]


def test_labels_equal_a_loop():
    proposals, targets = with_objects(make_proposals(), make_targets()), make_targets()
    row, labels = RoiSampler().label(proposals, targets)
    for image in range(3):
        mine = (targets.image == image).nonzero().squeeze(1)
        for slot in range(proposals.boxes.shape[1]):
            if not proposals.valid[image, slot]:
                assert labels[image, slot] == -1
                continue
            iou = box_iou(targets.boxes[mine], proposals.boxes[image, slot][None])[:, 0]
            positive = len(mine) > 0 and iou.max() >= 0.5
            assert labels[image, slot] == int(positive)
            if positive:
                assert row[image, slot] == mine[iou.argmax()]


def test_the_draw():
    proposals, targets = make_proposals(), make_targets()
    regions = RoiSampler(num_samples=40)(proposals, targets, 3)
    again = RoiSampler(num_samples=40)(proposals, targets, 3)
    other = RoiSampler(num_samples=40, seed=1)(proposals, targets, 3)
    assert torch.equal(regions.boxes, again.boxes) and not torch.equal(regions.boxes, other.boxes)
    assert regions.image.bincount().tolist() == [40, 40, 40]
    positive = regions.labels < 3
    assert positive[regions.image == 0].sum() == 10  # a quarter
    assert not positive[regions.image == 1].any() and 1 <= positive[regions.image == 2].sum() <= 10
    assert torch.equal(regions.labels[positive], targets.labels[regions.target[positive]])
    assert (regions.target[~positive] == len(targets)).all()


def test_background_in_an_ignore_region_is_not_drawn():
    region = {"ignore_image": torch.tensor([1]), "ignore_boxes": torch.tensor([[0.0, 0, 64, 96]])}
    regions = RoiSampler()(make_proposals(), make_targets(**region), 3)
    middle = (regions.boxes[:, 0] + regions.boxes[:, 2]) / 2
    assert (middle[regions.image == 1] > 64).all() and (middle[regions.image == 0] <= 64).any()


# ---- losses


@pytest.mark.parametrize("seed", [0, 1])
def test_losses_equal_torchvision(network, monkeypatch, seed):
    preds, targets = said(network, seed), make_targets()
    criterion = make_criterion(network, beta=1 / 9, seed=seed)
    regions = criterion.loss.sampler(
        propose(preds, SIZE, ProposalRule(pre_nms=2000, post_nms=1000)), targets, network.num_classes
    )
    terms = criterion(preds, targets)

    positive = regions.labels < 3
    logits, deltas = preds.refine["roi"](regions.image, regions.boxes)
    logits = torch.cat([logits[:, 3:], logits[:, :3]], dim=1)  # background is class 0 there
    labels = torch.where(positive, regions.labels + 1, 0)
    objects = torch.where(positive[:, None], targets.boxes[regions.target.clamp(max=2)], regions.boxes)
    wanted = peer.det_utils.BoxCoder((10.0, 10.0, 5.0, 5.0)).encode([objects], [regions.boxes])[0]
    cls, box = peer.fastrcnn_loss(logits, torch.cat([deltas[:, :1], deltas], 1).flatten(1), [labels], [wanted])
    assert torch.allclose(terms["cls"], cls, rtol=1e-6) and torch.allclose(terms["box"], box, rtol=1e-5)

    boxes, target = regions.boxes[positive], regions.target[positive]
    pixels = region_masks(targets.masks[target], targets.boxes[target], boxes, 12)
    monkeypatch.setattr(peer, "project_masks_on_boxes", lambda *arguments: pixels)
    said_of_masks = preds.refine["mask"](regions.image[positive], boxes)
    mask = peer.maskrcnn_loss(said_of_masks, [boxes], [targets.masks], [targets.labels], [target])
    assert positive.sum() > 3 and torch.allclose(terms["mask"], mask, rtol=1e-6)

    ours = torch.autograd.grad(
        terms["cls"] + terms["box"] + terms["mask"], list(network.parameters()), retain_graph=True, allow_unused=True
    )
    theirs = torch.autograd.grad(cls + box + mask, list(network.parameters()), allow_unused=True)
    for left, right in zip(ours, theirs):
        assert (left is None) == (right is None)
        assert left is None or torch.allclose(left, right, rtol=1e-4, atol=1e-7)


def test_first_stage_is_the_rpn_loss_alone(network):
    preds, targets = said(network), make_targets()
    criterion = make_criterion(network)
    assignment = criterion.assigner(preds, targets)
    rpn = LOSSES["rcnn"](num_classes=1, heads=tuple(network.heads[:2]))(preds, targets, assignment)
    terms = criterion(preds, targets)
    assert terms["rpn_obj"] == rpn["obj"] and terms["rpn_box"] == rpn["box"]


def test_masks_of_regions():
    """A disk in its object's frame, looked at through its own box, a quarter of it, and a box beside it."""
    y, x = torch.meshgrid(torch.arange(56) + 0.5, torch.arange(56) + 0.5, indexing="ij")
    disk = ((x - 28) ** 2 + (y - 28) ** 2 < 28**2).to(torch.uint8)
    objects = torch.tensor([[10.0, 20, 50, 100]]).expand(3, 4)
    boxes = torch.tensor([[10.0, 20, 50, 100], [30, 60, 50, 100], [60, 20, 100, 100]])
    masks = region_masks(disk.expand(3, 56, 56), objects, boxes, 28)
    cell = (torch.arange(28) + 0.5) / 28
    whole = (cell[None] - 0.5) ** 2 + (cell[:, None] - 0.5) ** 2 < 0.25
    quarter = cell[None] ** 2 + cell[:, None] ** 2 < 1
    assert (masks[0] == whole).float().mean() > 0.98 and (masks[1] == quarter).float().mean() > 0.98
    assert (masks[2] == 0).all()


@pytest.mark.parametrize("objects", [[], OBJECTS[2:], OBJECTS, [OBJECTS[0]] * 3, [(0, 1, (5.0, 5.0, 5.0, 5.0))]])
def test_few_objects_are_finite(objects):
    """None at all, one, several, three in one place, one without width and height."""
    network = make_network()
    network.train()
    terms = TrainStep(network, make_criterion(network))(make_images(), make_targets(objects))
    assert set(terms) == {"rpn_obj", "rpn_box", "cls", "box", "mask"}
    assert all(term.isfinite() and term.shape == () for term in terms.values())
    sum(terms.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
    if not objects:
        assert terms["box"] == 0 and terms["mask"] == 0 and terms["rpn_box"] == 0 and terms["cls"] > 0


def test_mixed_precision():
    network = make_network()
    with torch.autocast("cpu", torch.bfloat16):
        terms = TrainStep(network, make_criterion(network))(make_images(), make_targets())
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())


def test_double_precision():
    network = make_network().double()
    terms = TrainStep(network, make_criterion(network))(make_images(), make_targets())
    assert all(term.dtype == torch.float64 for term in terms.values())


def test_a_network_without_masks_needs_none():
    network = make_network(BOXES)
    terms = make_criterion(network)(said(network), make_targets(masks=False))
    assert set(terms) == {"rpn_obj", "rpn_box", "cls", "box"}


def test_masks_to_teach_and_no_masks_in_the_data(network):
    with pytest.raises(UserError, match=r"no masks.*without \[mask\]"):
        make_criterion(network)(said(network), make_targets(masks=False))


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "two_stage"])
def test_losses_of_one_stage_are_refused_at_the_line_of_roi(network, loss):
    with pytest.raises(UserError, match=rf"my.cfg:\d+: loss '{loss}' "):
        build_criterion({"name": "rpn"}, {"name": loss}, 3, "test.yaml", network.heads)


@pytest.mark.parametrize("key, value", [("num_samples", 0), ("positive_fraction", 0), ("box", -1), ("post_nms", 0)])
def test_keys_out_of_range_are_named(network, key, value):
    with pytest.raises(UserError, match=key):
        make_criterion(network, **{key: value})


# ---- detections


def test_detections_equal_torchvision(network):
    with torch.no_grad():
        preds = said(network)
        roi = preds.refine["roi"]
        for parameter in (roi.head.classes.weight, roi.head.boxes.weight):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        proposals = propose(preds, SIZE, roi.head.rule)
        ours = postprocess(preds, size=SIZE, conf_thres=0.05, iou_thres=0.5, max_det=20)
        boxes = [proposals.boxes[image][proposals.valid[image]] for image in range(3)]
        image = torch.arange(3).repeat_interleave(torch.tensor([len(one) for one in boxes]))
        logits, deltas = roi(image, torch.cat(boxes))
        heads = peer.RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 20)
        logits = torch.cat([logits[:, 3:], logits[:, :3]], dim=1)
        deltas = torch.cat([deltas[:, :1], deltas], 1).flatten(1)
        theirs = heads.postprocess_detections(logits, deltas, boxes, [SIZE] * 3)
    for found, boxes, scores, labels in zip(ours, *theirs):
        assert len(found) == len(boxes) == 20
        assert torch.allclose(found.scores, scores, atol=1e-6) and torch.equal(found.labels, labels - 1)
        assert torch.allclose(found.boxes, boxes, atol=1e-4)


def test_masks_belong_to_their_boxes(network):
    with torch.no_grad():
        preds = said(network)
        found = postprocess(preds, size=SIZE, conf_thres=0.01, max_det=7)
        for image, one in enumerate(found):
            assert one.masks.shape == (7, 12, 12) and (one.masks > 0).all() and (one.masks < 1).all()
            alone = preds.refine["mask"](torch.full((7,), image), one.boxes)
            for row, label in enumerate(one.labels.tolist()):
                assert torch.allclose(one.masks[row], alone[row, label].sigmoid(), atol=1e-6)


def test_without_a_mask_head_there_are_none():
    network = make_network(BOXES)
    assert all(found.masks is None for found in postprocess(said(network), size=SIZE, conf_thres=0.01))


def test_options_of_detection_hold_for_the_second_stage(network):
    preds = said(network)
    only = postprocess(preds, size=SIZE, conf_thres=0.01, classes=[1])
    assert all((found.labels == 1).all() and len(found) for found in only)
    lone = postprocess(preds, size=SIZE, conf_thres=0.01, agnostic=True, iou_thres=0.3)
    for found in lone:
        assert (box_iou(found.boxes, found.boxes).fill_diagonal_(0) <= 0.3).all()


def test_it_learns():
    """Two painted rectangles: found, named and cut out after a few steps."""
    network = make_network().train()
    images, targets = torch.zeros(3, 3, *SIZE), make_targets()
    for image, label, (x1, y1, x2, y2) in OBJECTS:
        images[image, label, int(y1) : int(y2), int(x1) : int((x1 + x2) / 2)] = 1
        images[image, label, int(y1) : int(y2), int((x1 + x2) / 2) : int(x2)] = 0.5
    step = TrainStep(network, make_criterion(network))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.005)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 160)  # settles, whatever the last digits do
    for _ in range(160):
        optimizer.zero_grad()
        sum(step(images, targets).values()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = postprocess(network.eval().predict(images), size=SIZE, conf_thres=0.5)
    assert [set(one.labels.tolist()) for one in found] == [{0, 2}, set(), {1}]
    for image, label, box in OBJECTS:
        row = found[image].labels.tolist().index(label)
        assert box_iou(found[image].boxes[row][None], torch.tensor([box]))[0, 0] > 0.7
        mask = found[image].masks[row]
        assert mask[:, 2:5].mean() > mask[:, 8:].mean() + 0.5

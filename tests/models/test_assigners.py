"""The contract of every assigner, and the rules of each one against a slow loop."""

import copy
import dataclasses
import inspect

import pytest
import torch

from models.assigners import ASSIGNERS, build_targets
from models.assigners.wh_iou import WhIoU
from tests.models.yolov3_case import ANCHORS, OBJECTS, decode, make_heads, make_raws, make_targets
from utils.structures import Targets

SIZE = (96, 128)


def predictions(num_images=2, num_classes=3, dtype=torch.float32, device="cpu"):
    raws = [raw.detach().to(device) for raw in make_raws(num_images, num_classes, SIZE, dtype=dtype)]
    return decode([raw.requires_grad_() for raw in raws], ANCHORS, SIZE)


def triples(assignment) -> list[tuple[int, int, int]]:
    rows = assignment.compact()
    return list(zip(rows.image.tolist(), rows.prior.tolist(), rows.target.tolist()))


@pytest.fixture(params=ASSIGNERS)
def assigner(request):
    """Every assigner with its defaults."""
    return make_assigner(request.param)


def make_assigner(name):
    """An assigner with its defaults, told what it asks about the network."""
    facts = {"heads": make_heads()}
    asked = inspect.signature(ASSIGNERS[name]).parameters
    return ASSIGNERS[name](**{fact: value for fact, value in facts.items() if fact in asked})


# ------------------------------------------------------------------------------------------------------ the contract


def check_shapes(assignment, preds, targets):
    num_images, num_slots = preds.obj.shape
    for name, dtype in {"image": torch.int64, "prior": torch.int64, "target": torch.int64}.items():
        column = getattr(assignment, name)
        assert column.dtype == dtype and column.shape == assignment.weight.shape
    assert assignment.weight.dtype == torch.float32 and (assignment.weight >= 0).all()
    assert assignment.ignore.dtype == torch.bool and assignment.ignore.shape == (num_images, num_slots)
    assert ((assignment.prior >= 0) & (assignment.prior < num_slots)).all()
    assert (targets.image[assignment.target] == assignment.image).all()
    assert not any(tensor.requires_grad for tensor in vars(assignment).values())


CASES = {
    "ordinary": OBJECTS,
    "no object": [],
    "one picture without": [row for row in OBJECTS if row[0] == 1],
    "duplicates": [OBJECTS[0]] * 3,
    "smaller than a cell": [(0, 0, 50, 50, 50.5, 50.25)],
    "centre on every border": [(0, 0, -20, 40, 20, 60), (0, 0, 108, 76, 148, 116), (1, 1, 60, -9, 80, 9)],
    "whole picture": [(0, 0, 0, 0, 128, 96), (1, 1, 0, 0, 128, 96)],
    "more objects than slots": [(0, 0, x % 100, x % 70, x % 100 + 20, x % 70 + 20) for x in range(900)],
    "without area": [(0, 0, 30, 30, 30, 30), (1, 0, 30, 30, 60, 30)],
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_ranges_and_repeatability(assigner, case):
    preds, targets = predictions(), make_targets(CASES[case])
    before = copy.deepcopy(targets)
    assignment = build_targets(preds, targets, assigner)
    check_shapes(assignment, preds, targets)
    again = build_targets(preds, targets, assigner)
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(assignment).items())
    assert all(torch.equal(getattr(targets, name), getattr(before, name)) for name in ("image", "labels", "boxes"))


def test_shuffled_targets_give_the_same_pairs(assigner):
    preds, targets = predictions(), make_targets(OBJECTS)
    order = torch.tensor([4, 2, 6, 0, 5, 1, 3])
    shuffled = Targets.of(targets.image[order], targets.labels[order], targets.boxes[order])
    plain = triples(build_targets(preds, targets, assigner))
    mixed = triples(build_targets(preds, shuffled, assigner))
    assert sorted(plain) == sorted((image, prior, order[target].item()) for image, prior, target in mixed)


def test_a_picture_is_assigned_as_if_alone(assigner):
    preds = predictions()
    together = [row for row in triples(build_targets(preds, make_targets(OBJECTS), assigner)) if row[0] == 0]
    alone = triples(build_targets(preds, make_targets([row for row in OBJECTS if row[0] == 0]), assigner))
    assert together == alone


def test_float64_decides_like_float32(assigner):
    targets = make_targets(OBJECTS)
    single, double = (
        triples(build_targets(predictions(dtype=d), targets, assigner)) for d in (torch.float32, torch.float64)
    )
    assert single == double


def test_nothing_looks_at_a_value(assigner):
    """On the meta device there is none: ``.item()``, nonzero and boolean masks, which stall a GPU, all raise there."""
    preds = predictions(device="meta")
    targets = make_targets(OBJECTS, ignore=[(1, 0, 0, 64, 96)]).to("meta")
    assert build_targets(preds, targets, assigner).image.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu_without_a_sync(assigner):
    targets = make_targets(OBJECTS, ignore=[(1, 0, 0, 64, 96)])
    preds, on_device = predictions(device="cuda"), targets.to("cuda")
    for head in getattr(assigner, "heads", ()):
        head.to("cuda")
    build_targets(preds, on_device, assigner)  # the first call may load kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        assignment = build_targets(preds, on_device, assigner)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = vars(build_targets(predictions(), targets, assigner))
    found = {name: value.cpu() for name, value in vars(assignment).items()}
    torch.testing.assert_close(found.pop("weight"), expected.pop("weight"))  # may be a product of sigmoids and powers
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


# ------------------------------------------------------------------------------------------------- ignore regions


def test_ignore_covers_the_cells_inside_and_no_positive(assigner):
    preds = predictions()
    region = (1, 20, 10, 70, 60)  # holds objects 5 and 6
    assignment = build_targets(preds, make_targets(OBJECTS, ignore=[region]), assigner)
    x, y = preds.priors.center.unbind(1)
    inside = (x >= 20) & (x <= 70) & (y >= 10) & (y <= 60)
    positive = torch.zeros_like(assignment.ignore)
    rows = assignment.compact()
    positive[rows.image, rows.prior] = True
    assert (positive[1] & inside).any(), "the case is meant to have a positive inside the region"
    assert not (assignment.ignore & positive).any()
    assert (assignment.ignore[1] | ~inside | positive[1]).all()
    if not build_targets(preds, make_targets(OBJECTS), assigner).ignore.any():  # it ignores nothing of its own
        assert torch.equal(assignment.ignore[1], inside & ~positive[1]) and not assignment.ignore[0].any()


def test_regions_add_up_and_stay_in_their_picture(assigner):
    preds = predictions()
    regions = [(0, 0, 0, 128, 48), (0, 0, 40, 128, 96), (1, 0, 0, 4, 4)]
    ignore = build_targets(preds, make_targets([], ignore=regions), assigner).ignore
    assert ignore[0].all()
    x, y = preds.priors.center.unbind(1)
    inside = (x <= 4) & (y <= 4)
    assert inside.any() and (ignore[1] | ~inside).all()
    if not build_targets(preds, make_targets([]), assigner).ignore.any():
        assert torch.equal(ignore[1], inside)


# ------------------------------------------------------------------------------------------------------------ wh_iou


def wh_iou_by_loops(preds, targets, iou_t):
    """The rule written out: (image, prior, target) in the order head, anchor, object."""
    found = []
    for grid in preds.priors.grids:
        for anchor in range(grid.anchors):
            width, height = preds.priors.size[grid.start + anchor * grid.rows * grid.columns].tolist()
            for number, (x1, y1, x2, y2) in enumerate(targets.boxes.tolist()):
                shared = min(width, x2 - x1) * min(height, y2 - y1)
                if shared / (width * height + (x2 - x1) * (y2 - y1) - shared) <= iou_t:
                    continue
                column = min(max(int((x1 + x2) / 2 / SIZE[1] * grid.columns), 0), grid.columns - 1)
                row = min(max(int((y1 + y2) / 2 / SIZE[0] * grid.rows), 0), grid.rows - 1)
                slot = grid.start + (anchor * grid.rows + row) * grid.columns + column
                found.append((targets.image[number].item(), slot, number))
    return found


@pytest.mark.parametrize("iou_t", [0.0, 0.2, 0.5])
def test_wh_iou_equals_its_rule_written_out(iou_t):
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(40, 2, generator=generator) * 90
    boxes = torch.cat([low, low + torch.rand(40, 2, generator=generator) * 80 + 1], dim=1)
    targets = Targets.of(torch.arange(40) // 20, torch.zeros(40, dtype=torch.int64), boxes)
    preds = predictions()
    ours = triples(build_targets(preds, targets, WhIoU(iou_t=iou_t)))
    assert ours == wh_iou_by_loops(preds, targets, iou_t) and len(ours) > 20


def test_threshold_is_strict_and_an_object_may_stay_alone():
    preds = predictions()
    exactly = make_targets([(0, 0, 30, 30, 40, 36.5)])  # half of anchor (10, 13)
    level = preds.priors.grids[2]
    slots = [prior for _, prior, _ in triples(build_targets(preds, exactly, WhIoU(iou_t=0.5)))]
    assert not any(level.start <= slot < level.start + level.rows * level.columns for slot in slots)
    slots = [prior for _, prior, _ in triples(build_targets(preds, exactly, WhIoU(iou_t=0.499)))]
    assert any(level.start <= slot < level.start + level.rows * level.columns for slot in slots)
    assert triples(build_targets(preds, make_targets([(0, 0, 0, 40, 128, 42)]), WhIoU())) == []


def test_border_belongs_to_the_last_cell():
    preds = predictions()
    targets = make_targets([(0, 0, 108, 76, 148, 116)])  # centre exactly at x = width, y = height
    for _, prior, _ in triples(build_targets(preds, targets, WhIoU())):
        assert (preds.priors.center[prior] + preds.priors.stride[prior] / 2).tolist() == [128, 96]


@pytest.mark.parametrize("iou_t", [-0.1, 1.0])
def test_threshold_out_of_range_is_refused(iou_t):
    with pytest.raises(ValueError, match="iou_t"):
        WhIoU(iou_t=iou_t)


def test_frozen_and_keyword_only():
    with pytest.raises(TypeError):
        WhIoU(0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        WhIoU().iou_t = 0.3

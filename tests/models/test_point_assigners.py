"""ATSS, task-aligned assignment and FCOS centre sampling: equal to their peers, and their rules one by one."""

import json
import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from models.assigners import build_targets, task_aligned
from models.assigners.atss import Atss
from models.assigners.center_sampling import CenterSampling
from models.assigners.inside_box import InsideBox
from models.assigners.points import first_largest, inside, window, wins
from models.assigners.task_aligned import VARIANTS, TaskAligned
from models.coders import Distances
from models.structures import Priors
from tests.models.points_case import fcos_priors, owners, predictions, targets_of
from utils.boxes import xyxy_to_xywh
from utils.structures import Targets

SIZE, STRIDES = (96, 128), (8, 16, 32)


def blank(priors, num_images=1, num_classes=3):
    return predictions(priors, torch.zeros(num_images, len(priors), num_classes))


def made(boxes, labels=None, image=None) -> Targets:
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    zeros = torch.zeros(len(boxes), dtype=torch.int64)
    pick = [zeros if column is None else torch.tensor(column) for column in (image, labels)]
    return Targets.of(*pick, boxes)


def priors_from_boxes(boxes, counts, strides=STRIDES, size=SIZE) -> Priors:
    """Golden prior boxes [P, 4] as priors of heads with one anchor."""
    like = fcos_priors(strides, size)
    center, extent = xyxy_to_xywh(torch.tensor(boxes)).split(2, dim=-1)
    assert [grid.count for grid in like.grids] == list(counts)
    fields = {"center": center, "size": extent, "stride": like.stride, "level": like.level, "anchor": like.anchor}
    return Priors(grids=like.grids, **fields)


# ------------------------------------------------------------------------------------------------------------- golden


@pytest.mark.golden_case("assigners/atss_basic.npz")
def test_atss_equals_mmdetection(case):
    data = np.load(case)
    priors = priors_from_boxes(data["priors"], data["num_level_priors"])
    targets = targets_of(data, "gt_labels", "gt_bboxes")
    topk = json.loads(str(data["meta"]))["hyp"]["topk"]
    owner = owners(build_targets(blank(priors), targets, Atss(topk=topk)))[0]
    np.testing.assert_array_equal(owner + 1, data["assigned_gt_1based"])
    labels = torch.where(owner >= 0, targets.labels[owner], -1)
    np.testing.assert_array_equal(labels, data["assigned_labels"])


@pytest.mark.golden_case("assigners/atss_basic.npz")
def test_anchor_free_heads_have_square_boxes_of_scale_strides(case):
    data = np.load(case)
    priors = fcos_priors(STRIDES, SIZE, offset=0)  # whose golden boxes are 4 strides wide
    np.testing.assert_array_equal(Atss(scale=4.0).prior_boxes(priors), data["priors"] + 0)
    owner = owners(build_targets(blank(priors), targets_of(data, "gt_labels", "gt_bboxes"), Atss(scale=4.0)))[0]
    np.testing.assert_array_equal(owner + 1, data["assigned_gt_1based"])


@pytest.mark.golden_case("assigners/fcos_center_sampling.npz")
def test_center_sampling_equals_mmdetection(case):
    data = np.load(case)
    strides = data["strides"].tolist()
    rows = [len(data[f"points{level}"]) for level in range(len(strides))]
    size = next((h, 16 * 8) for h in (96,) if h // 8 * 16 == rows[0])
    priors = fcos_priors(strides, size)
    np.testing.assert_array_equal(priors.center, np.concatenate([data[f"points{n}"] for n in range(len(strides))]))
    targets, reach = targets_of(data, num_images=2), data["regress_ranges"][0, 1] / strides[0]
    owner = owners(build_targets(blank(priors, 2), targets, CenterSampling(reach=reach)))
    labels = torch.where(owner >= 0, targets.labels[owner], 3)
    boxes = Distances().encode(targets.boxes[owner], priors.center, priors.size, priors.stride)
    for level, grid in enumerate(priors.grids):
        np.testing.assert_array_equal(labels[:, grid.slots].flatten(), data[f"labels{level}"])
        positive = (owner[:, grid.slots] >= 0).flatten()
        distances = (boxes * priors.stride.repeat(1, 2))[:, grid.slots].flatten(0, 1)
        np.testing.assert_array_equal(distances[positive], data[f"bbox_targets{level}"][positive])


def tables(pairs, num_objects, num_slots):
    """Alignment and overlap [N, P] of the pairs that were looked at, 0 elsewhere."""
    columns = pairs.alignment, pairs.overlap
    return [
        column.new_zeros(num_objects, num_slots).index_put((pairs.target, pairs.slot), column) for column in columns
    ]


@pytest.mark.golden_case("assigners/tood_basic.npz")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_task_aligned_equals_tood(case, dtype):
    data = np.load(case)
    hyp = json.loads(str(data["meta"]))["hyp"]
    priors = priors_from_boxes(data["priors"], [192, 48, 12])
    scores, boxes = (torch.tensor(data[key])[None].to(dtype) for key in ("pred_scores", "pred_bboxes"))
    preds = predictions(priors, scores.logit(), boxes)
    targets = targets_of(data, "gt_labels", "gt_bboxes")
    assigner = TaskAligned(topk=hyp["topk"], alpha=hyp["alpha"], beta=hyp["beta"])
    assignment = build_targets(preds, targets, assigner)
    owner = owners(assignment)[0]
    np.testing.assert_array_equal(owner + 1, data["assigned_gt_1based"])
    slots = (owner >= 0).nonzero().squeeze(1)
    alignment, overlap = tables(assigner.pairs(preds, targets), len(targets), len(preds.priors))
    np.testing.assert_allclose(alignment[owner[slots], slots], data["assign_metrics"][slots], rtol=1e-4)
    np.testing.assert_allclose(overlap[owner[slots], slots], data["max_overlaps"][slots], rtol=1e-5)


@pytest.mark.golden_case("assigners/tal_basic.npz")
@pytest.mark.parametrize("peer, variant", [("v8_3_0", "v8_3"), ("v8_4_190", "v8_4")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_task_aligned_equals_ultralytics(case, peer, variant, dtype):
    data = np.load(case)
    priors = fcos_priors(STRIDES, SIZE)
    np.testing.assert_array_equal(priors.center, data["anchor_points"])
    real = torch.tensor(data["mask_gt"])[..., 0] > 0  # [B, M], real rows first
    image = real.nonzero()[:, 0]
    targets = Targets.of(
        image, torch.tensor(data["gt_labels"])[..., 0][real].long(), torch.tensor(data["gt_bboxes"])[real]
    )
    preds = predictions(
        priors, torch.tensor(data["pd_scores"]).to(dtype).logit(), torch.tensor(data["pd_bboxes"]).to(dtype)
    )
    assignment = build_targets(preds, targets, TaskAligned(variant=variant, topk=10, alpha=0.5, beta=6.0))
    owner, first = owners(assignment), torch.tensor([0, int(real[0].sum())])
    positive = data[f"{peer}/fg_mask"]
    np.testing.assert_array_equal(owner >= 0, positive)
    np.testing.assert_array_equal((owner - first[:, None])[positive], data[f"{peer}/target_gt_idx"][positive])
    rows = assignment.compact()
    scores = torch.zeros(data[f"{peer}/target_scores"].shape)
    scores[rows.image, rows.prior, targets.labels[rows.target]] = rows.weight
    np.testing.assert_allclose(scores, data[f"{peer}/target_scores"], rtol=2e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------ shared choices


def test_first_largest_takes_the_first_of_equals():
    values = torch.tensor([[0.5, 0.0, 2.0, 0.5, 0.5, float("nan")], [0, 0, 0, 0, 0, 0]])
    assert first_largest(values, 4).tolist() == [[2, 0, 3, 4], [0, 1, 2, 3]]
    many = torch.rand(3, 500).square() * 1e-3
    assert torch.equal(first_largest(many, 20), many.sort(dim=1, descending=True, stable=True).indices[:, :20])


def test_wins_is_the_largest_taken_row_of_a_slot():
    slot, value = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1.0, 3, 3, 9, 2, 5])
    taken = torch.tensor([True, True, True, False, True, False])
    assert wins(slot, value, taken, 4).tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_window_holds_the_nearest_cells(offset):
    priors = fcos_priors((8,), (40, 120), offset)  # 5 rows, 15 columns
    centers = torch.tensor([[0.0, 0.0], [119.9, 39.0], [60.1, 20.1], [33.0, 4.0], [-20.0, 100.0]])
    slots = window(centers, priors, priors.grids[0], 9)[:, 0]
    assert slots.shape == (5, 5 * 9)
    for center, row in zip(centers, slots):
        distance = (priors.center - center).square().sum(1)
        assert set(distance.sort(stable=True).indices[:9].tolist()) <= set(row.tolist())


def test_inside_is_strict():
    priors = fcos_priors((8,), (16, 32), 0.5)  # points at 4, 12, 20, 28 and at 4, 12
    boxes = torch.tensor([[4.0, 4.0, 28.0, 12.5]])
    expected = [False, False, False, False, False, True, True, False]
    assert inside(priors, boxes).tolist() == [expected]
    assert inside(priors, boxes, margin=0.5).tolist() == [[False] * 8]


def test_inside_equals_every_point_on_its_own():
    generator = torch.Generator().manual_seed(0)
    priors = fcos_priors((8, 16, 32), (96, 160), 0.5)
    low = torch.rand(40, 2, generator=generator) * 100
    boxes = torch.cat([low, low + torch.rand(40, 2, generator=generator) * 60], dim=1).round()
    point, low, high = priors.center, boxes[:, None, :2], boxes[:, None, 2:]
    assert torch.equal(inside(priors, boxes, 1.0), ((point - low > 1) & (high - point > 1)).all(-1))


# --------------------------------------------------------------------------------------------------------- rule by rule


def test_inside_box_matches_every_point_of_every_box():
    priors = fcos_priors(STRIDES, SIZE, offset=0)
    targets = made([[8, 8, 40, 40], [20, 20, 60, 50], [1, 1, 7, 7]])
    assignment = build_targets(blank(priors), targets, InsideBox())
    x, y = priors.center.T
    expected = [
        (0, slot, row)
        for row, (x1, y1, x2, y2) in enumerate(targets.boxes.tolist())
        for slot in range(len(priors))
        if x1 < x[slot] < x2 and y1 < y[slot] < y2
    ]
    rows = assignment.compact()
    assert list(zip(rows.image.tolist(), rows.prior.tolist(), rows.target.tolist())) == expected
    assert not (rows.target == 2).any(), "the third box lies between the points"


def test_force_topk_gives_points_to_those_without():
    priors = fcos_priors(STRIDES, SIZE, offset=0)
    targets = made([[8, 8, 40, 40], [1, 1, 7, 7]])
    plain, forced = (build_targets(blank(priors), targets, InsideBox(force_topk=k)).compact() for k in (0, 9))
    assert torch.equal(plain.prior, forced.prior[forced.target == 0])
    slots = forced.prior[forced.target == 1]
    distance = ((priors.center - 4.0) / priors.stride).square().sum(1)
    assert set(slots.tolist()) == set(distance.sort(stable=True).indices[:9].tolist())


def test_atss_thresholds_by_the_objects_own_candidates():
    """The rule in a loop, on boxes at random; conflicts by IoU."""
    priors, generator = fcos_priors(STRIDES, SIZE), torch.Generator().manual_seed(3)
    low = torch.rand(12, 2, generator=generator) * torch.tensor([90.0, 60.0])
    boxes = torch.cat([low, low + 4 + torch.rand(12, 2, generator=generator) * 50], dim=1)
    owner = owners(build_targets(blank(priors), made(boxes.tolist()), Atss(topk=9)))[0]
    iou = box_iou(Atss().prior_boxes(priors).double(), boxes.double())
    best = torch.full((len(priors),), -1.0).double()
    expected = torch.full((len(priors),), -1)
    for row, box in enumerate(boxes):
        center = (box[:2] + box[2:]) / 2
        distance = (priors.center - center).square().sum(1)
        picked = torch.cat([grid.start + distance[grid.slots].sort(stable=True).indices[:9] for grid in priors.grids])
        threshold = iou[picked, row].mean() + iou[picked, row].std()
        for slot in picked.tolist():
            x, y = priors.center[slot]
            within = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if within and iou[slot, row] >= threshold and iou[slot, row] > best[slot]:
                best[slot], expected[slot] = iou[slot, row], row
    assert torch.equal(owner, expected) and (owner >= 0).sum() > 20


def test_center_sampling_chooses_the_level_by_the_farthest_side():
    priors = fcos_priors((32, 8, 16), SIZE)  # the order of levels does not matter
    for side, strides in [(40, {8}), (63, {8}), (100, {8, 16}), (127, {16}), (400, {32})]:
        middle = 64.0, 48.0
        boxes = [[middle[0] - side / 2, middle[1] - side / 2, middle[0] + side / 2, middle[1] + side / 2]]
        rows = build_targets(blank(priors), made(boxes), CenterSampling()).compact()
        assert set(priors.stride[rows.prior, 0].tolist()) <= strides and len(rows.prior), side


def test_a_point_of_two_objects_goes_to_the_smaller_one():
    priors = fcos_priors(STRIDES, SIZE)
    targets = made([[20, 20, 60, 60], [24, 24, 56, 56], [24, 24, 56, 56]])
    rows = build_targets(blank(priors), targets, CenterSampling()).compact()
    assert set(rows.target.tolist()) == {1}, "of the two equal ones the first"


def aligned_preds(priors, boxes, scores):
    """Every slot predicts its box of ``boxes`` [P, 4] with its scores [P, C]."""
    return predictions(priors, torch.as_tensor(scores)[None].logit(), torch.as_tensor(boxes)[None])


def test_variants_differ_in_who_is_ranked():
    """The best aligned slot stands outside: TOOD ranks it and drops it, ultralytics never ranks it."""
    priors = fcos_priors((16,), (64, 64))
    box = torch.tensor([8.0, 8.0, 40.0, 40.0])
    scores = torch.full((16, 1), 0.1)
    scores[15] = 0.9  # far outside
    preds, targets = aligned_preds(priors, box.repeat(16, 1), scores), made([box.tolist()])
    tood = build_targets(preds, targets, TaskAligned(topk=1)).compact()
    ultralytics = build_targets(preds, targets, TaskAligned(variant="v8_3", topk=1)).compact()
    assert len(tood.prior) == 0 and ultralytics.prior.tolist() == [5]


def test_stretching_gives_an_object_between_points_candidates():
    priors = fcos_priors(STRIDES, SIZE)
    targets = made([[9, 9, 11, 11]])
    boxes = targets.boxes.expand(len(priors), 4)
    preds = aligned_preds(priors, boxes, torch.full((len(priors), 1), 0.5))
    counts = {
        variant: len(build_targets(preds, targets, TaskAligned(variant=variant)).compact().prior)
        for variant in ("tood", "v8_3", "v8_4")
    }
    assert counts["tood"] == counts["v8_3"] == 0 < counts["v8_4"]


def test_a_contested_slot_may_go_to_an_object_that_did_not_choose_it():
    """Three objects on one point. The third overlaps it most but prefers another slot: only v8 gives it the point."""
    priors = fcos_priors((16,), (48, 48))
    targets = made([[4, 4, 44, 44], [6, 6, 46, 46], [2, 2, 42, 42]], labels=[0, 1, 2])
    boxes = targets.boxes[2].repeat(9, 1)
    scores = torch.full((9, 3), 0.05)
    scores[4] = torch.tensor([0.9, 0.9, 0.05])  # the middle: first and second choose it
    scores[0] = torch.tensor([0.01, 0.01, 0.9])  # the third chooses a corner
    preds = aligned_preds(priors, boxes, scores)
    tood, v8 = (owners(build_targets(preds, targets, TaskAligned(variant=v, topk=1)))[0] for v in ("tood", "v8_3"))
    assert tood[4] in (0, 1) and v8[4] == 2 and tood[0] == v8[0] == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_looking_at_few_pairs_equals_looking_at_all(monkeypatch, variant):
    """What runs on a CPU and what runs on a GPU, row by row; objects of all sizes, some without a slot."""
    priors, generator = fcos_priors(STRIDES, SIZE), torch.Generator().manual_seed(5)
    low = torch.rand(24, 2, generator=generator) * torch.tensor([100.0, 70.0])
    boxes = torch.cat([low, low + 60 * torch.rand(24, 2, generator=generator) ** 3], dim=1)
    targets = made(boxes.tolist())
    center = priors.center + torch.randn(len(priors), 2, generator=generator) * 4
    half = torch.rand(len(priors), 2, generator=generator) * 20
    scores = torch.rand(len(priors), 1, generator=generator)
    preds = aligned_preds(priors, torch.cat([center - half, center + half], dim=1), scores)
    few = build_targets(preds, targets, TaskAligned(variant=variant, topk=5))
    monkeypatch.setattr(task_aligned, "LISTS", {})
    every = build_targets(preds, targets, TaskAligned(variant=variant, topk=5))
    for name in ("image", "prior", "target", "ignore"):
        assert torch.equal(getattr(few, name), getattr(every, name)), name
    torch.testing.assert_close(few.weight, every.weight)  # pow of a vector and of its rest may differ in the last bit
    assert (few.weight > 0).sum() > 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_slot_that_is_no_number_spoils_no_other(variant):
    """The first slot, which fills up the table of an object with few candidates."""
    priors = fcos_priors(STRIDES, SIZE)
    targets = made([[30, 30, 50, 50]])
    boxes = torch.cat([priors.center - 10, priors.center + 10], dim=1)
    preds = aligned_preds(priors, boxes, torch.full((len(priors), 1), 0.5))
    expected = build_targets(preds, targets, TaskAligned(variant=variant, topk=50))
    preds.boxes[0, 0] = math.nan
    found = build_targets(preds, targets, TaskAligned(variant=variant, topk=50))
    assert 0 < (expected.weight > 0).sum() < 50 and torch.equal(found.weight, expected.weight)


def test_weight_is_the_best_iou_at_the_best_slot():
    priors, generator = fcos_priors(STRIDES, SIZE), torch.Generator().manual_seed(0)
    targets = made([[10, 10, 70, 70]])
    noise = torch.rand(len(priors), 4, generator=generator) * 20 - 10
    preds = aligned_preds(priors, targets.boxes + noise, torch.rand(len(priors), 1, generator=generator))
    assigner = TaskAligned()
    rows = build_targets(preds, targets, assigner).compact()
    alignment, overlap = tables(assigner.pairs(preds, targets), len(targets), len(priors))
    assert rows.weight.argmax() == alignment[0, rows.prior].argmax()
    torch.testing.assert_close(rows.weight.max(), overlap[0, rows.prior].max(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Atss(topk=0),
        lambda: Atss(scale=0.0),
        lambda: CenterSampling(radius=0.0),
        lambda: CenterSampling(reach=-1.0),
        lambda: TaskAligned(topk=0),
        lambda: TaskAligned(beta=-1.0),
        lambda: InsideBox(force_topk=-1),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()

"""SimOTA against its rule written out, and plain answers to what is asked about it (docs/assigners/yolox.md)."""

import math

import pytest
import torch

from models.assigners import build_targets
from models.assigners.simota import SimOTA, Table, compact, owners
from tests.models import yolov3_case, yolox_case
from tests.models.yolov3_case import make_targets
from tests.models.yolox_case import GENERATIONS
from utils.structures import Targets

SIZE = (96, 128)


def predictions(kind="yolox", seed=0):
    if kind == "yolox":
        raws = [raw.detach() for raw in yolox_case.make_raws(seed=seed, dtype=torch.float64)]
        for raw in raws:
            raw[:, 2:4] += 1  # boxes large enough to fit some object
        return yolox_case.decode(raws, SIZE)
    raws = yolov3_case.make_raws(seed=seed)
    return yolov3_case.decode(raws, yolov3_case.ANCHORS, SIZE)


def pairs(preds, targets, assigner):
    rows = build_targets(preds, targets, assigner).compact()
    return dict(zip(zip(rows.image.tolist(), rows.prior.tolist()), rows.target.tolist()))


# --------------------------------------------------------------------------------------------------- the rule, slowly


def by_loops(preds, targets, assigner):
    """(image, slot) -> object, pair by pair."""
    answer = {}
    for image in range(len(preds.obj)):
        objects = [n for n in range(len(targets)) if targets.image[n] == image]
        slots = [s for s in range(len(preds.priors)) if any(near(preds, targets, assigner, n, s)[0] for n in objects)]
        costs = {n: [cost(preds, targets, assigner, image, n, s) for s in slots] for n in objects}
        choosers = {slot: [] for slot in slots}
        for n in objects:
            best = sorted((iou(targets.boxes[n], preds.boxes[image, s]) for s in slots), reverse=True)[:10]
            ranked = sorted(range(len(slots)), key=lambda i: (costs[n][i], slots[i]))
            for i in ranked[: max(1, int(sum(best)))]:
                choosers[slots[i]].append(n)
        for i, slot in enumerate(slots):
            if len(choosers[slot]) > 1:
                answer[image, slot] = min(objects, key=lambda n: (costs[n][i], n))
            elif choosers[slot]:
                answer[image, slot] = choosers[slot][0]
    return answer


def near(preds, targets, assigner, number, slot):
    """Whether the slot is in any, and in every region of the object."""
    x1, y1, x2, y2 = targets.boxes[number].tolist()
    (x, y), reach = preds.priors.center[slot].tolist(), assigner.center_radius * preds.priors.stride[slot, 0].item()
    center = abs(x - (x1 + x2) / 2) < reach and abs(y - (y1 + y2) / 2) < reach
    if assigner.region == "center":
        return center, center
    inside = x1 < x < x2 and y1 < y < y2
    return center or inside, center and inside


def iou(box, other):
    (a1, b1, a2, b2), (c1, d1, c2, d2) = box.tolist(), other.tolist()
    shared = max(0, min(a2, c2) - max(a1, c1)) * max(0, min(b2, d2) - max(b1, d1))
    return shared / ((a2 - a1) * (b2 - b1) + (c2 - c1) * (d2 - d1) - shared)


def cost(preds, targets, assigner, image, number, slot):
    total = -3 * math.log(iou(targets.boxes[number], preds.boxes[image, slot]) + 1e-8)
    for label, logit in enumerate(preds.cls[image, slot].tolist()):
        own = preds.obj[image, slot].item()
        probability = math.sqrt(1 / (1 + math.exp(-logit)) / (1 + math.exp(-own)))
        total -= math.log(probability if label == targets.labels[number] else 1 - probability)
    return total + assigner.penalty * (not near(preds, targets, assigner, number, slot)[1])


def scattered(num=14, seed=1):
    """Objects of all sizes, some over each other, some over the border."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(num, 2, generator=generator) * torch.tensor([128.0, 96.0])
    half = torch.rand(num, 2, generator=generator) ** 2 * 40 + 2
    image, labels = torch.arange(num) * 2 // num, torch.randint(3, (num,), generator=generator)
    return Targets.of(image, labels, torch.cat([center - half, center + half], dim=1))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["yolox", "yolov3"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_equals_its_rule_written_out(generation, kind, seed):
    preds, targets, assigner = predictions(kind, seed), scattered(seed=seed), GENERATIONS[generation]
    ours = pairs(preds, targets, assigner)
    assert ours == by_loops(preds, targets, assigner) and len(ours) > len(targets), "more slots than objects"


def test_rows_run_by_picture_and_slot_and_none_twice():
    rows = build_targets(predictions(), scattered(), SimOTA()).compact()
    place = rows.image * len(predictions().priors) + rows.prior
    assert (place.diff() > 0).all() and (rows.weight == 1).all()


def test_table_is_sparse():
    """Of 8400 slots only those near a centre are compared: 27 per object of the fullest picture."""
    preds = yolox_case.decode(yolox_case.make_raws(2, 3, (640, 640)), (640, 640))
    rows = [(0, 0, x, x, x + 50, x + 50) for x in range(0, 500, 100)] + [(1, 0, 5, 5, 90, 90)]
    table = SimOTA().table(preds, make_targets(rows))
    assert table.cost.shape == (6, 5 * 27) and table.real[1].sum() <= 27


# ------------------------------------------------------------------------------------------------- what people ask


def hand_made(costs, ious, image=(0, 0, 0)):
    costs, ious = torch.tensor(costs, dtype=torch.float64), torch.tensor(ious)
    columns = torch.arange(costs.shape[1])[None]
    table = Table(columns, torch.ones_like(columns, dtype=torch.bool), ious, costs)
    return owners(table, torch.tensor(image)).tolist()[0]


def test_a_conflict_can_hand_a_slot_to_an_object_that_never_chose_it():
    """Objects 0 and 1 both want slot 0; object 2 wanted slot 1 only, but is the cheapest of all three at slot 0."""
    one_each = [[0.5, 0.0, 0.0]] * 3
    assert hand_made([[5, 90, 95], [6, 91, 96], [2, 1, 97]], one_each) == [2, 2, 3]
    # with one chooser less there is no conflict, and object 2 is not asked
    assert hand_made([[5, 90, 95], [91, 90, 6], [2, 1, 97]], one_each) == [0, 2, 1]


def test_the_number_of_slots_is_the_sum_of_the_best_ious():
    costs = [[1.0, 2.0, 3.0, 4.0]]
    assert hand_made(costs, [[0.9, 0.9, 0.1, 0.0]], (0,)) == [0, 1, 1, 1], "1.9: one"
    assert hand_made(costs, [[0.9, 0.9, 0.3, 0.0]], (0,)) == [0, 0, 1, 1], (
        "2.1: two, the cheapest, not the best fitting"
    )
    assert hand_made(costs, [[0.0, 0.0, 0.0, 0.0]], (0,)) == [0, 1, 1, 1], "never none"


def test_of_equal_costs_the_lowest_slot_and_the_first_object_win():
    assert hand_made([[7.0, 7.0, 7.0]], [[0.9, 0.9, 0.3]], (0,)) == [0, 0, 1]
    assert hand_made([[7.0, 8.0], [7.0, 8.0]], [[0.5, 0.0]] * 2, (0, 0)) == [0, 2]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_penalty_only_ranks(generation):
    """Any number beyond all costs decides alike; a small one lets slots far from the centre win."""
    preds, targets, assigner = predictions(), scattered(), GENERATIONS[generation]
    radius = {"region": assigner.region, "center_radius": assigner.center_radius}
    usual, large, small = (pairs(preds, targets, SimOTA(penalty=penalty, **radius)) for penalty in (1e4, 1e9, 1e-3))
    assert usual == large == pairs(preds, targets, assigner) != small


def test_an_object_without_candidates_borrows_one_of_its_neighbours():
    """Its centre is far outside of the picture: what is left are the candidates of others, at any cost."""
    far = (0, 0, 300, 300, 340, 340)
    found = pairs(predictions(), make_targets([(0, 0, 20, 20, 60, 60), far]), SimOTA())
    borrowed = [slot for (_, slot), target in found.items() if target == 1]
    assert len(borrowed) == 1 and 0 in found.values()
    alone = SimOTA().table(predictions(), make_targets([(0, 0, 20, 20, 60, 60)])).columns[0].tolist()
    assert set(borrowed) <= set(alone)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_nobody_answers_where_the_peer_raises(generation):
    """No candidate in the whole picture; the other picture is not disturbed."""
    far, other = (0, 0, 900, 900, 940, 940), (1, 1, 30, 30, 70, 60)
    assigner = GENERATIONS[generation]
    assert pairs(predictions(), make_targets([far]), assigner) == {}
    both, alone = (pairs(predictions(), make_targets(rows), assigner) for rows in ([far, other], [other]))
    assert list(both) == list(alone) and set(both.values()) == {1}


def test_a_duplicate_gets_nothing():
    twice = make_targets([(0, 1, 20, 20, 60, 60)] * 2)
    assert set(pairs(predictions(), twice, SimOTA()).values()) == {0}


def test_float32_penalty_does_not_blur_costs():
    """In float32 a million rounds what is added to it to 1/16; which neighbour is borrowed must not depend on that."""
    raws = yolox_case.make_raws()
    targets = scattered()
    single, double = (
        pairs(yolox_case.decode([raw.to(dtype) for raw in raws], SIZE), targets, SimOTA(penalty=1e6))
        for dtype in (torch.float32, torch.float64)
    )
    assert single == double


# ---------------------------------------------------------------------------------------------------------- parts


def test_compact_is_nonzero_row_by_row():
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) > 0.7
    mask[2] = False
    columns, real = compact(mask, 20)
    for row in range(6):
        assert columns[row][real[row]].tolist() == mask[row].nonzero().squeeze(1).tolist()[:20]
        assert (columns[row][~real[row]] == 0).all()


@pytest.mark.parametrize("bad", [{"center_radius": 0.0}, {"penalty": -1.0}])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SimOTA(**bad)

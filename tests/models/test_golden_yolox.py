"""SimOTA and the YOLOX loss, equal to YOLOX's own code in both generations."""

import numpy as np
import pytest
import torch

from models.assigners import build_targets
from models.losses.yolox import YoloxLoss
from tests.models.yolox_case import GENERATIONS, Golden

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
on_every_device = pytest.mark.parametrize("device", ["cpu", CUDA])
in_both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
of_both_generations = pytest.mark.parametrize("generation", GENERATIONS)


@pytest.mark.golden_case("yolox/*.npz")
@on_every_device
@in_both_precisions
@of_both_generations
def test_assignment(case, generation, dtype, device):
    golden = Golden(case, dtype, device)
    assignment = build_targets(golden.preds, golden.targets, GENERATIONS[generation])
    matched = golden.data[f"{generation}/matched_gt"]
    np.testing.assert_array_equal(golden.matched(assignment), matched)
    assert len(assignment.compact().image) == golden.data[f"{generation}/fg_mask"].sum(), "no slot twice"
    assert not assignment.ignore.any()


@pytest.mark.golden_case("yolox/*.npz")
@of_both_generations
def test_candidates_costs_and_numbers_of_slots(case, generation):
    golden = Golden(case, torch.float64)
    table = GENERATIONS[generation].table(golden.preds, golden.targets)
    for image in golden.targets.image.unique().tolist():
        mine, real = golden.targets.image == image, table.real[image]
        columns, iou, cost = (value.detach().numpy() for value in (table.columns[image], table.iou, table.cost))
        expected = {key: golden.data[f"{generation}/{key}_b{image}"] for key in ("candidates", "iou", "cost")}
        np.testing.assert_array_equal(columns[real], expected["candidates"])
        np.testing.assert_allclose(iou[mine][:, real], expected["iou"], atol=1e-6)
        np.testing.assert_allclose(cost[mine][:, real], expected["cost"], rtol=1e-5)
        count = np.sort(iou[mine])[:, -10:].sum(1).astype(int).clip(1)
        np.testing.assert_array_equal(count, golden.data[f"{generation}/dynamic_k_b{image}"])


def losses(golden, generation):
    assignment = build_targets(golden.preds, golden.targets, GENERATIONS[generation])
    loss = YoloxLoss(num_classes=golden.num_classes, l1_epochs=int(golden.use_l1))
    loss.set_epoch(0, 1)
    return loss(golden.preds, golden.targets, assignment)


def by_peers_order(terms):
    total = sum(terms.values())
    return np.array([term.item() for term in (total, *(terms[name] for name in ("box", "obj", "cls", "l1")))])


@pytest.mark.golden_case("yolox/*.npz")
@on_every_device
@in_both_precisions
@of_both_generations
def test_losses_and_gradients(case, generation, dtype, device):
    golden = Golden(case, dtype, device)
    terms = losses(golden, generation)
    key, tolerance = ("loss_items", 1e-6) if dtype == torch.float32 else ("loss_items_f64", 1e-9)
    expected = golden.data[f"{generation}/{key}"][:5]
    np.testing.assert_allclose(by_peers_order(terms), expected, rtol=0, atol=tolerance * expected.max())
    sum(terms.values()).backward()
    gradients = [golden.data[f"{generation}/grad_raw{level}"] for level in range(3)]
    limit = 1e-5 * max(np.abs(gradient).max() for gradient in gradients)
    for raw, gradient in zip(golden.raws, gradients):
        np.testing.assert_allclose(raw.grad.cpu().numpy(), gradient, rtol=0, atol=limit)

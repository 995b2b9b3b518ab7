"""The YOLOv3 recipe against the archive's own code: assignments exactly, losses to 1e-6, gradients to 1e-5."""

import numpy as np
import pytest
import torch

from models.assigners import build_targets
from models.assigners.wh_iou import WhIoU
from models.losses.yolo import YoloLoss, objectness_targets
from tests.models.yolov3_case import Golden
from utils.boxes import paired_giou

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64]

pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.parametrize("dtype", DTYPES)]


@pytest.fixture(autouse=True)
def needs_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def assign(golden):
    return build_targets(golden.preds, golden.targets, WhIoU(iou_t=golden.hyp["iou_t"]))


@pytest.mark.golden_case("yolov3/*.npz")
def test_assignments_are_exactly_the_peers(case, dtype, device):
    golden = Golden(case, dtype, device)
    compact = assign(golden).compact()
    for name, rows in golden.rows().items():
        np.testing.assert_array_equal(getattr(compact, name).cpu(), rows, err_msg=name)
    assert not compact.ignore.any()


@pytest.mark.golden_case("yolov3/*.npz")
def test_objectness_targets_equal_the_peers(case, dtype, device):
    golden = Golden(case, dtype, device)
    assignment = assign(golden)
    iou = paired_giou(golden.preds.boxes[assignment.image, assignment.prior], golden.targets.boxes[assignment.target])
    ours = objectness_targets(assignment, 1 - golden.gr + golden.gr * iou.clamp(min=0))
    theirs = np.concatenate([golden.data[f"l{level}_tobj"].reshape(len(ours), -1) for level in range(3)], axis=1)
    np.testing.assert_allclose(ours.detach().cpu(), theirs, atol=2e-6)
    np.testing.assert_array_equal(ours.cpu() > 0, theirs > 0)


@pytest.mark.golden_case("yolov3/*.npz")
def test_losses_and_gradients_equal_the_peers(case, dtype, device):
    golden = Golden(case, dtype, device)
    hyp, num_classes = golden.hyp, golden.num_classes
    loss = YoloLoss(
        num_classes=num_classes,
        box=hyp["giou"],
        obj=hyp["obj"],
        cls=hyp["cls"] * 80 / num_classes,  # the case was computed without the trainer's scaling of this gain
        cls_pw=hyp["cls_pw"],
        obj_pw=hyp["obj_pw"],
        fl_gamma=hyp["fl_gamma"],
        gr=golden.gr,
    )
    terms = loss(golden.preds, golden.targets, assign(golden))
    total = sum(terms.values())
    total.backward()

    ours = np.array([terms[name].item() for name in ("box", "obj", "cls")] + [total.item()])
    np.testing.assert_allclose(ours, golden.data["loss_items"], rtol=1e-6, atol=1e-6)
    if dtype == torch.float64:
        np.testing.assert_allclose(ours, golden.data["loss_items_f64"], rtol=1e-9, atol=1e-12)
    largest = max(np.abs(golden.data[f"grad_p{level}"]).max() for level in range(golden.num_levels))
    for level, raw in enumerate(golden.raws):
        gap = np.abs(raw.grad.cpu().numpy() - golden.data[f"grad_p{level}"]).max()
        assert gap <= 1e-5 * largest

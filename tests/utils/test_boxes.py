"""utils/boxes.py against other projects' numbers, torchvision, and laws."""

import numpy as np
import pytest
import torch
import torchvision.ops as tv

from utils.boxes import (
    IOUS,
    box_area,
    box_iou,
    clip_boxes,
    paired_ciou,
    paired_giou,
    paired_iou,
    wh_iou,
    xywh_to_xyxy,
    xyxy_to_xywh,
)

DTYPES = [torch.float32, torch.float64]

# identical, touching edge, touching corner, contained, far apart, point in box, two equal points, zero height,
# zero width, equal lines, two points, two points in one row, thin cross, subnormal width
DEGENERATE = torch.tensor(
    [
        [[10, 10, 30, 40], [10, 10, 30, 40]],
        [[0, 0, 10, 10], [10, 0, 20, 10]],
        [[0, 0, 10, 10], [10, 10, 20, 20]],
        [[0, 0, 100, 100], [40, 40, 60, 60]],
        [[0, 0, 10, 10], [500, 700, 510, 720]],
        [[20, 20, 20, 20], [10, 10, 30, 30]],
        [[20, 20, 20, 20], [20, 20, 20, 20]],
        [[10, 20, 40, 20], [10, 10, 40, 30]],
        [[20, 10, 20, 40], [10, 10, 40, 30]],
        [[10, 20, 40, 20], [10, 20, 40, 20]],
        [[5, 5, 5, 5], [50, 50, 50, 50]],
        [[5, 5, 5, 5], [50, 5, 50, 5]],
        [[0, 0, 100, 1], [0, 0, 1, 100]],
        [[0, 0, 1e-30, 1e-30], [0, 0, 1e-30, 5]],
    ]
)


def random_boxes(num, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 2, generator=generator, dtype=torch.float64) * 400
    size = torch.rand(num, 2, generator=generator, dtype=torch.float64) * 200 + 1
    return torch.cat([low, low + size], dim=1).to(dtype)


# peer columns that hold the same quantity; the sign and offset turn a loss into a similarity
YOLO = ["yolov3", "yolov5_v6.0", "yolov5_v7.0"]
PEERS = {
    "iou": [f"{yolo}/IoU" for yolo in YOLO] + ["mmdet/IoU"],
    "giou": [f"{yolo}/GIoU" for yolo in YOLO] + ["mmdet/GIoU", "fvcore/giou_loss", "mmdet/giou_loss"],
    "diou": [f"{yolo}/DIoU" for yolo in YOLO] + ["detectron2/diou_loss", "mmdet/diou_loss"],
    "ciou": [f"{yolo}/CIoU" for yolo in YOLO] + ["detectron2/ciou_loss"],
}


@pytest.mark.golden_case("functional/iou.npz")
@pytest.mark.parametrize("name", IOUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_equal_the_peers(case, name, dtype):
    data = np.load(case)
    boxes1, boxes2 = torch.tensor(data["box1"]).to(dtype), torch.tensor(data["box2"]).to(dtype)
    ours = IOUS[name](boxes1, boxes2).numpy()
    assert ours.dtype == np.dtype(str(dtype).removeprefix("torch."))
    for peer in PEERS[name]:
        theirs = data[f"{peer}@f64"]
        theirs = 1 - theirs if peer.endswith("loss") else theirs
        sane = np.isfinite(theirs)
        assert sane.all() or name == "ciou"
        # 2e-6 is the peers' own spread: each adds another constant to its denominators
        np.testing.assert_allclose(ours[sane], theirs[sane], rtol=0, atol=2e-6, err_msg=peer)


@pytest.mark.golden_case("functional/iou.npz")
@pytest.mark.parametrize("name", IOUS)
def test_gradients_equal_yolov3(case, name):
    data = np.load(case)
    boxes1, boxes2 = torch.tensor(data["box1"]).double().requires_grad_(), torch.tensor(data["box2"]).double()
    IOUS[name](boxes1, boxes2).sum().backward()
    theirs = data[f"yolov3/{name[:-3].upper()}IoU@grad_box1_f64"]
    # left out: kinks, where any value between the one-sided slopes is right (torch 2.13 and 2.15 choose differently)
    kinks = ["touch" in kind or "point" in kind or "zero" in kind for kind in data["kind"]]
    compared = np.isfinite(theirs).all(1) & ~np.array(kinks)
    assert compared.sum() >= 185
    np.testing.assert_allclose(boxes1.grad.numpy()[compared], theirs[compared], rtol=1e-9, atol=1e-9)


@pytest.mark.golden_case("functional/iou.npz")
def test_wh_iou_equals_yolov3(case):
    data = np.load(case)
    ours = wh_iou(torch.tensor(data["yolov3/wh1"]), torch.tensor(data["yolov3/wh2"]))
    np.testing.assert_allclose(ours.numpy(), data["yolov3/wh_iou_matrix"], rtol=1e-6)


@pytest.mark.parametrize("name", IOUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_boxes_are_finite_with_gradients(name, dtype):
    boxes1, boxes2 = (b.to(dtype).clone().requires_grad_() for b in DEGENERATE.unbind(1))
    values = IOUS[name](boxes1, boxes2)
    values.sum().backward()
    assert values.isfinite().all() and boxes1.grad.isfinite().all() and boxes2.grad.isfinite().all()
    assert (values <= 1 + 1e-6).all() and (values >= -2).all()
    assert max(boxes1.grad.abs().max(), boxes2.grad.abs().max()) < 1e10  # no explosion either
    swapped = IOUS[name](boxes2, boxes1)
    torch.testing.assert_close(values, swapped, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", IOUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_boxes_score_one(name, dtype):
    boxes = random_boxes(50, dtype=dtype)
    torch.testing.assert_close(IOUS[name](boxes, boxes), torch.ones(50, dtype=dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", IOUS)
def test_gradcheck(name):
    boxes1, boxes2 = random_boxes(8, 1), random_boxes(8, 2)
    # the aspect weight is detached by definition, so CIoU's gradient is not its finite difference
    function = IOUS[name] if name != "ciou" else _ciou_with_frozen_weight(boxes1, boxes2)
    assert torch.autograd.gradcheck(function, (boxes1.clone().requires_grad_(), boxes2.clone().requires_grad_()))


def _ciou_with_frozen_weight(boxes1, boxes2):
    def aspect(a, b):
        ratios = [torch.atan((x[:, 2] - x[:, 0]) / (x[:, 3] - x[:, 1])) for x in (a, b)]
        return 4 / torch.pi**2 * (ratios[0] - ratios[1]) ** 2

    frozen = aspect(boxes1, boxes2) / (1 - paired_iou(boxes1, boxes2) + aspect(boxes1, boxes2))
    oracle = lambda a, b: IOUS["diou"](a, b) - frozen * aspect(a, b)  # noqa: E731
    torch.testing.assert_close(paired_ciou(boxes1, boxes2), oracle(boxes1, boxes2))
    inputs = [b.clone().requires_grad_() for b in (boxes1, boxes2)]
    ours = torch.autograd.grad(paired_ciou(*inputs).sum(), inputs)
    theirs = torch.autograd.grad(oracle(*inputs).sum(), inputs)
    torch.testing.assert_close(ours, theirs)
    return oracle


def test_pairwise_equals_torchvision_and_paired_is_its_diagonal():
    boxes1, boxes2 = random_boxes(20, 3), random_boxes(30, 4)
    matrix = box_iou(boxes1, boxes2)
    torch.testing.assert_close(matrix, tv.box_iou(boxes1, boxes2))
    torch.testing.assert_close(box_area(boxes1), tv.box_area(boxes1))
    torch.testing.assert_close(paired_iou(boxes1, boxes2[:20]), matrix.diagonal())
    torch.testing.assert_close(paired_giou(boxes1, boxes2[:20]), tv.generalized_box_iou(boxes1, boxes2).diagonal())
    assert box_iou(boxes1[:0], boxes2).shape == (0, 30) and box_iou(boxes1, boxes2[:0]).shape == (20, 0)


def test_wh_iou_is_the_iou_of_boxes_on_one_corner():
    sizes1, sizes2 = random_boxes(7, 5)[:, 2:], random_boxes(9, 6)[:, 2:]
    on_corner = lambda sizes: torch.cat([torch.zeros_like(sizes), sizes], dim=1)  # noqa: E731
    torch.testing.assert_close(wh_iou(sizes1, sizes2), box_iou(on_corner(sizes1), on_corner(sizes2)))


@pytest.mark.parametrize("name", IOUS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(name, dtype):
    boxes = torch.tensor([[0, 0, 512, 512], [8, 8, 520, 520]], dtype=dtype)  # the area overflows float16
    ours = IOUS[name](boxes[:1], boxes[1:])
    torch.testing.assert_close(ours, IOUS[name](boxes[:1].float(), boxes[1:].float()))
    assert ours.dtype == torch.float32 and ours > 0.9


def test_formats_undo_each_other_and_clip():
    boxes = random_boxes(50, 7)
    torch.testing.assert_close(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes)
    torch.testing.assert_close(xyxy_to_xywh(boxes), tv.box_convert(boxes, "xyxy", "cxcywh"))
    torch.testing.assert_close(clip_boxes(boxes, (200, 300)), tv.clip_boxes_to_image(boxes, (200, 300)))
    assert clip_boxes(torch.tensor([[-5.0, -6, 700, 800]]), (200, 300)).tolist() == [[0, 0, 300, 200]]

"""Post-processing: equal to a loop over sorted candidates, to Darknet's recorded sets, and bounded."""

import numpy as np
import pytest
import torch

from models import postprocess as module
from models.postprocess import NMS_KINDS, postprocess
from models.structures import Predictions
from utils.boxes import xywh_to_xyxy
from utils.errors import UserError


def _preds(boxes, obj, cls, quality=None) -> Predictions:
    return Predictions(boxes=boxes, deltas=torch.zeros_like(boxes), obj=obj, cls=cls, priors=None, quality=quality)


def _random(
    num_images=2, num_slots=400, num_classes=3, seed=0, spread=100.0, dtype=torch.float64, steps=None
) -> Predictions:
    """Random predictions, many overlapping; with ``steps`` the logits take so few values that scores tie."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(num_images, num_slots, *shape, generator=generator, dtype=dtype)

    obj, cls = rand() * 8 - 4, rand(num_classes) * 8 - 4
    if steps:
        obj, cls = (obj * steps).round() / steps, (cls * steps).round() / steps
    center, size = rand(2) * spread, rand(2) * 40 + 4
    return _preds(torch.cat([center - size / 2, center + size / 2], -1), obj, cls, rand())


def _overlap(box, other, kind, beta):
    """Darknet's rule for one pair, written out."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    intersection = max(width, 0) * max(height, 0)
    area = (box[2] - box[0]) * (box[3] - box[1]) + (other[2] - other[0]) * (other[3] - other[1])
    iou = intersection / (area - intersection) if intersection else 0.0
    if kind == "default":
        return iou
    hull_w, hull_h = max(box[2], other[2]) - min(box[0], other[0]), max(box[3], other[3]) - min(box[1], other[1])
    dx, dy = (box[0] + box[2] - other[0] - other[2]) / 2, (box[1] + box[3] - other[1] - other[3]) / 2
    return iou - ((dx * dx + dy * dy) / (hull_w**2 + hull_h**2)) ** (0.6 if kind == "greedynms" else beta)


def _reference(preds, image, conf_thres, iou_thres, max_det, classes, agnostic, multi_label, kind, beta_nms):
    """Sort everything, then one box after the other: [(slot, class)] and their scores."""
    obj, cls = preds.obj[image].sigmoid(), preds.cls[image].sigmoid()
    factor = obj if preds.quality is None else obj * preds.quality[image]
    scores, boxes = (cls * factor[:, None]).tolist(), preds.boxes[image].tolist()
    candidates = []
    for slot, row in enumerate(scores):
        if not obj[slot] > conf_thres:
            continue
        columns = range(len(row)) if multi_label else [max(range(len(row)), key=row.__getitem__)]
        candidates += [(slot, c) for c in columns if row[c] > conf_thres and (classes is None or c in classes)]
    candidates.sort(key=lambda at: -scores[at[0]][at[1]])  # stable
    kept = []
    for slot, label in candidates:
        rivals = [s for s, c in kept if agnostic or c == label]
        if all(not _overlap(boxes[slot], boxes[s], kind, beta_nms) > iou_thres for s in rivals):
            kept.append((slot, label))
        if len(kept) == max_det:
            break
    return kept, [scores[s][c] for s, c in kept]


OPTIONS = {
    "plain": {},
    "low threshold": {"conf_thres": 0.001},
    "few": {"max_det": 7},
    "one": {"max_det": 1},
    "agnostic": {"agnostic": True},
    "best class": {"multi_label": False},
    "classes": {"classes": [0, 2]},
    "best class of two": {"classes": [1, 2], "multi_label": False},
    "no classes": {"classes": []},
    "greedynms": {"kind": "greedynms", "beta_nms": 0.3},
    "diounms": {"kind": "diounms", "beta_nms": 0.8},
    "everything": {"conf_thres": 0.0, "iou_thres": 1.0, "max_det": 10**9},
    "nothing overlaps": {"conf_thres": 0.01, "iou_thres": 0.0},
    "threshold too high": {"conf_thres": 1.0},
}


@pytest.mark.parametrize("steps", [None, 2], ids=["distinct", "ties"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_loop_over_all_candidates(options, steps, monkeypatch):
    """Small chunks and pools, so that every path is taken."""
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(module, "FIRST_POOL", 40)
    settings = {
        "conf_thres": 0.1,
        "iou_thres": 0.45,
        "max_det": 300,
        "classes": None,
        "agnostic": False,
        "multi_label": True,
        "kind": "default",
        "beta_nms": 0.6,
    } | options
    preds = _random(num_slots=150, steps=steps)
    for image, found in enumerate(postprocess(preds, **settings)):
        expected, scores = _reference(preds, image, **settings)
        assert found.labels.tolist() == [label for _, label in expected]
        assert torch.equal(found.boxes, preds.boxes[image][[slot for slot, _ in expected]])
        np.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_and_pools_do_not_change_the_result(chunk, monkeypatch):
    preds = _random(num_slots=2000, num_classes=5, steps=3)
    expected = postprocess(preds, conf_thres=0.01)
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "FIRST_POOL", 64)
    for one, other in zip(expected, postprocess(preds, conf_thres=0.01)):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("size", [(416, 416), (256, 608)])
@pytest.mark.golden_case("darknet/nms/*.npz")
def test_kept_sets_equal_darknet(case, size):
    """One class after the other, as recorded: relative boxes, here on canvases of several shapes."""
    cases = np.load(case, allow_pickle=False)
    rows = cases["objectness"] > 0
    canvas = torch.tensor([size[1], size[0]] * 2)
    boxes = xywh_to_xyxy(torch.from_numpy(cases["boxes"][rows]).double() * canvas)
    probabilities = torch.from_numpy(cases["probabilities"][rows]).double()
    certain = torch.full((1, len(boxes)), torch.inf, dtype=torch.float64)  # probabilities hold the objectness already
    found = postprocess(
        _preds(boxes[None], certain, probabilities.logit()[None]),
        conf_thres=0.0,
        iou_thres=float(cases["iou"]),
        kind=str(cases["kind"]),
        beta_nms=float(cases["beta_nms"]),
        max_det=10**6,
        size=size,
    )[0]
    expected = [(label, row) for row, label in zip(*np.nonzero(cases["kept"][rows]))]
    kept = [(int(label), int((boxes == box).all(1).nonzero()[0])) for label, box in zip(found.labels, found.boxes)]
    assert len(kept) == len(set(kept)) and set(kept) == set(expected)


def test_rejects_objectness_at_the_threshold_and_sorts():
    obj = torch.tensor([[0.5, 0.5001, 0.9, 0.3]], dtype=torch.float64).logit()
    boxes = torch.tensor([[[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9], [60, 0, 69, 9.0]]], dtype=torch.float64)
    found = postprocess(_preds(boxes, obj, torch.full((1, 4, 1), 99.0, dtype=torch.float64)), conf_thres=0.5)[0]
    assert found.boxes[:, 0].tolist() == [40, 20]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["boxes", "obj", "cls", "quality"])
def test_what_is_not_finite_is_never_kept(field, bad):
    preds = _random(num_images=1, num_slots=50, spread=4000)
    clean = postprocess(preds, conf_thres=0.01)[0]
    getattr(preds, field)[0, ::2] = bad if field != "quality" else float("nan")  # a quality is in 0..1 or not a number
    found = postprocess(preds, conf_thres=0.01)[0]
    assert found.boxes.isfinite().all() and found.scores.isfinite().all() and (found.scores <= 1).all()
    assert len(found) > 0
    if np.isnan(bad) or field == "quality":
        assert len(found) < len(clean)


def test_quality_is_a_factor_of_the_score():
    preds = _random(num_images=1)
    with_it = postprocess(preds, conf_thres=0.0, iou_thres=1.0, max_det=10**6)[0]
    scores = preds.obj.sigmoid()[..., None] * preds.cls.sigmoid() * preds.quality[..., None]
    torch.testing.assert_close(with_it.scores, scores.flatten().sort(descending=True).values)


def test_nothing_found_and_no_slots():
    for preds in (
        _random(num_slots=0),
        _preds(*(t - 99 for t in (torch.zeros(1, 5, 4), torch.zeros(1, 5), torch.zeros(1, 5, 2)))),
    ):
        for found in postprocess(preds):
            assert found.boxes.shape == (0, 4) and found.scores.shape == (0,) and found.labels.dtype == torch.int64


def test_unknown_class():
    with pytest.raises(UserError, match=r"classes: 3: expected 0\.\.2"):
        postprocess(_random(), classes=[0, 3])


def test_worst_cases_stay_bounded():
    """Everything passes, everything on one spot; everything passes with one score: only chunks are ever compared."""
    preds = _random(num_images=1, num_slots=3000, num_classes=20, dtype=torch.float32)
    largest = 0

    def spy(boxes, others, beta):
        nonlocal largest
        largest = max(largest, len(boxes))
        return module.iou_overlap(boxes, others, beta)

    preds.boxes[...] = torch.tensor([0.0, 0.0, 10.0, 10.0])
    try:
        NMS_KINDS["spy"] = spy
        assert len(postprocess(preds, conf_thres=0.0, kind="spy")[0]) == 20
        tied = _random(num_images=1, num_slots=3000, num_classes=20, dtype=torch.float32, spread=3000)
        tied.obj[...], tied.cls[...] = 1, 1
        assert len(postprocess(tied, conf_thres=0.0, kind="spy")[0]) == 300
    finally:
        del NMS_KINDS["spy"]
    assert 0 < largest <= module.CHUNK * (module.CHUNK + 300)


def test_a_rare_class_is_found_behind_many_better_slots(monkeypatch):
    """Slots are chosen by their best score, whose class may be another than the ones asked for."""
    monkeypatch.setattr(module, "FIRST_POOL", 8)
    preds = _random(num_images=1, num_slots=500, num_classes=4, spread=4000)
    preds.cls[..., 3] -= 6
    found = postprocess(preds, conf_thres=0.001, classes=[3], max_det=20)[0]
    expected, scores = _reference(preds, 0, 0.001, 0.45, 20, [3], False, True, "default", 0.6)
    assert len(found) == 20 and torch.equal(found.boxes, preds.boxes[0][[slot for slot, _ in expected]])
    np.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-12)


def test_one_logit_that_is_no_number_silences_its_slot():
    preds = _random(num_images=1, num_slots=50, num_classes=5, spread=4000)
    preds.cls[0, 7, 2] = torch.nan
    found = postprocess(preds, conf_thres=0.0, iou_thres=1.0, max_det=10**6)[0]
    assert len(found) == 49 * 5 and not (found.boxes == preds.boxes[0, 7]).all(1).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_on_the_gpu():
    preds = _random(dtype=torch.float32)
    on_gpu = _preds(*(t.cuda() for t in (preds.boxes, preds.obj, preds.cls, preds.quality)))
    for here, there in zip(postprocess(preds), postprocess(on_gpu)):
        torch.testing.assert_close(there.cpu().boxes, here.boxes)
        assert torch.equal(there.labels.cpu(), here.labels)

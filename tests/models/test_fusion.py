"""Views of known pictures agree, what they disagree on is averaged by hand; the library is asked in its own words."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from grid_network import CFG, SCORE, grid_boxes, grid_network, write_grid_network

import detect
import test as script
from models import fusion, load
from models.fusion import LOOKS, Fusion, View
from models.predictor import Predictor
from utils.errors import UserError
from utils.structures import Detections

PICTURE = np.full((64, 64, 3), 100, np.uint8)


def by_hand(boxes, scores, labels, iou_thr):
    """Weighted box fusion with loops, from the paper: the library's oracle, and its stand-in where it is missing."""
    rows = [
        (score, view, label, box)
        for view, parts in enumerate(zip(boxes, scores, labels))
        for box, score, label in zip(*parts)
    ]
    clusters = []  # label, rows, fused box
    for score, _, label, box in sorted(rows, key=lambda row: -row[0]):
        near = [(overlap(cluster[2], box), cluster) for cluster in clusters if cluster[0] == label]
        best, mine = max(near, key=lambda pair: pair[0], default=(0, None))
        if best <= iou_thr:
            clusters.append([label, [(score, box)], box])
            continue
        mine[1].append((score, box))
        mine[2] = sum(score * box for score, box in mine[1]) / sum(score for score, _ in mine[1])
    found = []
    for label, members, box in clusters:
        mean = np.mean([score for score, _ in members])
        found.append((mean * min(len(members), len(boxes)) / len(boxes), label, box))
    found.sort(key=lambda row: -row[0])
    columns = [np.array([row[part] for row in found]) for part in range(3)]
    return columns[2].reshape(-1, 4), columns[0], columns[1]


def overlap(one, other) -> float:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    inner = np.prod(np.clip(high - low, 0, None))
    return inner / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - inner)


@pytest.fixture
def library(monkeypatch):
    """The library, or the loops above in its place."""
    monkeypatch.setattr(fusion, "_weighted_boxes_fusion", lambda where: by_hand)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_grid_network(tmp_path_factory.mktemp("fusion") / "net.safetensors")


class Scripted:
    """A predictor that says what it is told to, in pixels of what it is shown, and remembers that."""

    def __init__(self, *answers: Detections):
        self.model, self.device, self.answers, self.seen = grid_network(), torch.device("cpu"), answers, []

    def __call__(self, images):
        self.seen.append(images)
        return list(self.answers)


def found(*rows, num_invalid=0) -> Detections:
    """Rows of x1, y1, x2, y2, score, label."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(boxes=table[:, :4], scores=table[:, 4], labels=table[:, 5].long(), num_invalid=num_invalid)


def fuse(*answers: Detections, conf_thres=0.0, iou_thres=0.45, max_det=300, agnostic=False) -> Detections:
    views = [View(predict=Scripted(answer)) for answer in answers]
    options = {"conf_thres": conf_thres, "iou_thres": iou_thres, "max_det": max_det, "agnostic": agnostic}
    (merged,) = Fusion(views, where="--weights", **options)(torch.zeros(1, 3, 64, 128, dtype=torch.uint8))
    return merged


def test_boxes_of_two_views_become_their_average(library):
    merged = fuse(found((10, 10, 30, 30, 0.9, 0), num_invalid=1), found((12, 10, 32, 30, 0.3, 0), num_invalid=2))
    torch.testing.assert_close(merged.boxes, torch.tensor([[10.5, 10, 30.5, 30]]))
    torch.testing.assert_close(merged.scores, torch.tensor([0.6]))
    assert merged.labels.tolist() == [0] and merged.num_invalid == 3


def test_what_one_view_finds_counts_half(library):
    merged = fuse(found((10, 10, 30, 30, 0.9, 0)), found((10, 10, 30, 30, 0.4, 1)))
    torch.testing.assert_close(merged.scores, torch.tensor([0.45, 0.2]))
    assert merged.labels.tolist() == [0, 1] and merged.labels.dtype == torch.int64
    assert fuse(found((10, 10, 30, 30, 0.9, 0)), found(), conf_thres=0.45).boxes.shape == (0, 4)


def test_nothing_found_by_anybody(library):
    merged = fuse(found(), found())
    assert merged.boxes.shape == (0, 4) and merged.scores.dtype == torch.float32 and merged.labels.dtype == torch.int64


def test_boxes_beyond_the_canvas_are_cut_and_empty_ones_left_out(library):
    rows = (-10, -10, 10, 10, 0.8, 0), (120, 20, 300, 40, 0.6, 0), (130, 0, 140, 10, 0.9, 0), (5, 9, 5, 20, 0.9, 0)
    merged = fuse(found(*rows), found(*rows))
    torch.testing.assert_close(merged.boxes, torch.tensor([[0.0, 0, 10, 10], [120, 20, 128, 40]]))


def test_thresholds_and_rivals(library):
    rows = (10, 10, 30, 30, 0.9, 0), (11, 10, 31, 30, 0.8, 1), (50, 10, 70, 30, 0.7, 0)
    assert fuse(found(*rows), found(*rows)).labels.tolist() == [0, 1, 0]
    assert fuse(found(*rows), found(*rows), agnostic=True).labels.tolist() == [0, 0]
    assert fuse(found(*rows), found(*rows), max_det=1).labels.tolist() == [0]
    assert fuse(found(*rows), found(*rows), conf_thres=0.75).labels.tolist() == [0, 1]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 0.5), (1.2, 0.83)])
def test_a_view_comes_back_to_the_pixels_it_was_given(scale, mirrored):
    """A bright rectangle is looked for in what the network is shown; its box there is undone to where it is."""
    images = torch.zeros(1, 3, 64, 128, dtype=torch.uint8)
    images[:, :, 16:32, 32:48] = 255

    class Finder(Scripted):
        def __call__(self, images):
            rows, columns = (images[0, 0] > 127).nonzero().unbind(1)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            self.seen.append(images)
            return [found((*map(float, box), 0.9, 0))]

    predict = Finder()
    (undone,) = View(predict=predict, scale=scale, mirrored=mirrored)(images)
    torch.testing.assert_close(undone.boxes, torch.tensor([[32.0, 16, 48, 32]]), rtol=0, atol=1)
    height, width = predict.seen[0].shape[2:]
    assert (height, width) == tuple(round(side * by / 16) * 16 for side, by in zip((64, 128), scale))
    assert predict.seen[0].dtype == torch.uint8


def test_a_network_that_always_says_the_same_is_not_changed_by_looking_twice(library, weights):
    """Scales move the grid of this network; mirrored and twice it is itself."""
    once = load(weights, device="cpu", precision="float32")(PICTURE)
    twice = load([weights, weights], device="cpu", precision="float32")
    merged = twice(PICTURE)
    assert {"pre", "inference", "nms", "fusion"} == set(twice.predict.timer.seconds)
    rows = merged.boxes[:, :2].double() @ torch.tensor([1.0, 100.0]).double()
    torch.testing.assert_close(merged.boxes[rows.argsort()], once.boxes)
    torch.testing.assert_close(merged.scores, torch.full((16,), SCORE))
    assert torch.equal(merged.labels, once.labels)


def test_augment_looks_mirrored_smaller_and_larger(library, weights):
    detector = load(weights, device="cpu", precision="float32", augment=True)
    assert isinstance(detector.predict, Fusion) and len(detector.predict.views) == len(LOOKS)
    assert any(view.mirrored for view in detector.predict.views)
    sides = {view.scale[0] for view in detector.predict.views}
    assert min(sides) < 1 < max(sides)
    views = detector.predict.views
    assert all(view.predict is views[0].predict for view in views), "one network"
    assert views[0].predict.options["conf_thres"] == pytest.approx(0.25 / len(LOOKS))


def test_members_see_the_size_of_their_own_cfg(library, weights, tmp_path):
    wide = write_grid_network(tmp_path / "wide.safetensors", text=CFG.replace("width=64", "width=128"))
    detector = load([weights, wide], device="cpu")
    assert detector.size == (64, 128) and [view.scale for view in detector.predict.views] == [(1, 0.5), (1, 1)]
    detector = load([weights, wide], device="cpu", img_size=96)
    assert detector.size == (96, 96) and [view.scale for view in detector.predict.views] == [(1, 1), (1, 1)]


def test_the_real_library_agrees_with_the_loops(monkeypatch):
    """Random boxes of three views, with overlaps; where the library is not installed there is nothing to compare."""
    pytest.importorskip("ensemble_boxes", reason="the package ensemble-boxes is not installed")
    draw = torch.Generator().manual_seed(0)
    answers = []
    for _ in range(3):
        corners = torch.rand(40, 2, generator=draw) * torch.tensor([90.0, 40])
        boxes = torch.cat([corners, corners + 8 + 16 * torch.rand(40, 2, generator=draw)], dim=1)
        scores, labels = torch.rand(40, 1, generator=draw), torch.randint(0, 2, (40, 1), generator=draw)
        answers.append(found(*torch.cat([boxes, scores, labels], dim=1).tolist()))
    real = fuse(*answers)
    monkeypatch.setattr(fusion, "_weighted_boxes_fusion", lambda where: by_hand)
    ours = fuse(*answers)
    assert 30 < len(real) < 110, "some are merged, not all"
    torch.testing.assert_close(real.scores, ours.scores)
    torch.testing.assert_close(real.boxes, ours.boxes, rtol=0, atol=1e-3)
    assert torch.equal(real.labels, ours.labels)


def test_the_library_is_called_in_its_own_words(monkeypatch, weights):
    def weighted_boxes_fusion(boxes_list, scores_list, labels_list, weights=None, iou_thr=0.5, skip_box_thr=0.0):
        assert all(boxes.min() >= 0 and boxes.max() <= 1 for boxes in boxes_list)
        return by_hand(boxes_list, scores_list, labels_list, iou_thr)

    module = ModuleType("ensemble_boxes")
    module.weighted_boxes_fusion = weighted_boxes_fusion
    monkeypatch.setitem(sys.modules, "ensemble_boxes", module)
    assert len(load([weights, weights], device="cpu")(PICTURE)) == 16


def test_mistakes(monkeypatch, weights, tmp_path):
    monkeypatch.setitem(sys.modules, "ensemble_boxes", None)
    for flag, arguments in {"--augment": {"augment": True}, "--weights": {}}.items():
        with pytest.raises(
            UserError, match=rf"^{flag}: needs the package ensemble-boxes: .*\(pip install ensemble-boxes"
        ):
            load([weights, weights], device="cpu", **arguments)
    other = write_grid_network(tmp_path / "other.safetensors", names=["bar", "square"])
    with pytest.raises(UserError, match=r"other\.safetensors: finds bar, square; .* finds square, bar"):
        load([weights, other], device="cpu")
    grey = write_grid_network(tmp_path / "grey.safetensors", text=CFG.replace("channels=3", "channels=1"))
    with pytest.raises(UserError, match=r"grey\.safetensors: sees 1 channels; .* sees 3"):
        load([weights, grey], device="cpu")
    boxed = write_grid_network(tmp_path / "boxed.safetensors", text=CFG.replace("[net]\n", "[net]\nletter_box=1\n"))
    with pytest.raises(UserError, match=r"^--resize: the cfgs differ in letter_box \(letterbox or stretch"):
        load([weights, boxed], device="cpu")
    write_grid_network(tmp_path / "net.weights")
    with pytest.raises(UserError, match=r"^--cfg: 2 files for 3 of weights \(one for each, or one for all\)"):
        load([weights] * 3, cfg=[tmp_path / "net.cfg"] * 2, device="cpu")


def test_detect_and_test_take_several_weights_and_augment(library, weights, tmp_path, capsys):
    """The grid is found by both commands; two of the same network measure as one does."""
    import cv2

    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), PICTURE)
    rows = [((x1 + x2) / 128, (y1 + y2) / 128, (x2 - x1) / 64, (y2 - y1) / 64) for x1, y1, x2, y2 in EVERY_THIRD]
    (tmp_path / "labels" / "a.txt").write_text("".join(f"0 {x} {y} {w} {h}\n" for x, y, w, h in rows))
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [square, bar]\n")
    shared = ["--device", "cpu", "--project", str(tmp_path / "runs"), "--weights", str(weights)]

    def measure(*more):
        flags = [*shared, *map(str, more), "--data", str(tmp_path / "data.yaml"), "--workers", "0"]
        return script.main(script.parse_args(flags))

    one, two = measure(), measure(weights)
    assert 0.1 < one.map < 1 and two.map == pytest.approx(one.map) and "fusion" in two.speed
    assert measure("--augment", "--single-cls").num_images == 1
    capsys.readouterr()
    detect.main(detect.parse_args([*shared, str(weights), "--source", str(tmp_path / "images"), "--nosave"]))
    assert "16 square" in capsys.readouterr().out
    detect.main(detect.parse_args([*shared, "--augment", "--source", str(tmp_path / "images"), "--nosave"]))
    assert "ms fusion per frame" in capsys.readouterr().out


def test_networks_with_masks_are_refused(library):
    from models.cfg import read_cfg
    from models.darknet import Darknet

    model = Darknet(read_cfg("cfg/rcnn-tiny-mask.cfg"))
    views = [View(predict=Predictor(model))] * 2
    with pytest.raises(UserError, match=r"^--augment: networks with a \[mask\] cannot be merged"):
        Fusion(views, conf_thres=0.1, iou_thres=0.5, max_det=9, agnostic=False, where="--augment")


EVERY_THIRD = grid_boxes((64, 64), stretch=True)[::3].tolist()

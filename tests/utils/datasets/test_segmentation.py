"""Outlines from files, through augmentation, into targets: nothing lost, nothing shifted, every bad one counted."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils.datasets.augment import Augment, flip, mixup, mosaic, random_perspective
from utils.datasets.dataset import DetectionDataset
from utils.datasets.loader import Draw, EvalSampler, TrainSampler, build_loader, collate
from utils.datasets.records import read_dataset
from utils.datasets.shapes import ensure_shapes
from utils.errors import QuarantineError, UserError
from utils.mask_frames import Patch, paste
from utils.outlines import fill, patches
from utils.run_lengths import encode
from utils.structures import ImageInfo, Outlines, Sample

H, W = 48, 64
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def coco_set(folder: Path, annotations: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(folder / name), np.zeros((H, W, 3), np.uint8))
    images = [{"id": number + 1, "file_name": name} for number, name in enumerate(("a.png", "b.png"))]
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (folder / "instances.json").write_text(json.dumps(data))
    return folder / "instances.json"


def annotation(number: int, segmentation, *, box=(10, 10, 20, 20), image=1, crowd=0) -> dict:
    row = {"id": number, "image_id": image, "category_id": 1, "bbox": list(box), "area": 350, "iscrowd": crowd}
    return row if segmentation is None else {**row, "segmentation": segmentation}


def holed() -> np.ndarray:
    plane = np.zeros((H, W), bool)
    plane[10:30, 10:30], plane[15:20, 15:25] = True, False
    return plane


def runs(plane: np.ndarray) -> list[int]:
    return np.diff(np.flatnonzero(np.diff(plane.T.ravel(), prepend=False)), prepend=0, append=plane.size).tolist()


# ----------------------------------------------------------------------------------------------------------- from files


def test_polygons_and_run_lengths_are_read(tmp_path):
    square = np.zeros((H, W), bool)
    square[10:30, 10:30] = True
    path = coco_set(
        tmp_path,
        [
            annotation(1, [SQUARE]),
            annotation(2, {"size": [H, W], "counts": runs(holed())}),
            annotation(3, encode(Patch(0, 0, holed()), (H, W)), crowd=1),
            annotation(4, [SQUARE, [40, 40, 50, 40, 45, 47.5]], image=2, box=(10, 10, 40, 37)),
        ],
    )
    data = read_dataset(path, masks=True)
    assert data.problems == []
    first, second = data.records
    assert [len(record.outlines) for record in data.records] == [3, 1] and first.crowd.tolist() == [False, False, True]
    for pixels, expected in zip(fill(first.outlines, (H, W)), (square, holed(), holed())):
        np.testing.assert_array_equal(pixels, expected)
    parts = fill(second.outlines, (H, W))[0]
    assert (parts[:40] == square[:40]).all() and 30 < parts[40:].sum() < 45
    plain = read_dataset(path)
    for record, boxes_only in zip(data.records, plain.records):
        assert boxes_only.outlines is None
        np.testing.assert_array_equal(record.boxes, boxes_only.boxes)
        np.testing.assert_array_equal(record.area, boxes_only.area)


BAD = {
    "none": (None, "object without a segmentation"),
    "empty": ([], "object without a segmentation"),
    "text": ("10 10 30", "object without a segmentation"),
    "two corners": ([[10, 10, 30, 30]], "polygon of fewer than 3 corners"),
    "half a corner": ([[*SQUARE, 5]], "polygon with half a corner"),
    "nan": ([[float("nan"), *SQUARE[1:]]], "polygon is not a list of finite numbers"),
    "400 digits": ([[10**400, *SQUARE[1:]]], "polygon is not a list of finite numbers"),
    "words": ([["10", *SQUARE[1:]]], "polygon is not a list of finite numbers"),
    "flat list": (SQUARE, "polygon is not a list of finite numbers"),
    "line": ([[10, 10, 20, 10, 30, 10]], "polygon without width or height"),
    "outside": ([[x + 70 for x in SQUARE]], "polygon outside the picture"),
    "above": ([[-5, -9, 5, -9, 5, -1]], "polygon outside the picture"),
    "endless": ([[10, 10, 1e14, 10, 30, 30]], "polygon more than 10 times as large as its picture"),
    "elsewhere": ([[40, 35, 50, 35, 45, 45]], "polygon outside its box"),
    "other size": ({"size": [W, H], "counts": runs(holed())}, "run-length mask of another size than the picture"),
    "no counts": ({"size": [H, W]}, "run-length mask without counts"),
    "short": ({"size": [H, W], "counts": [5, 7]}, "run-length mask that cannot be decoded"),
    "letters": ({"size": [H, W], "counts": "~~"}, "run-length mask that cannot be decoded"),
    "negative": ({"size": [H, W], "counts": [-1, H * W + 1]}, "run-length mask that cannot be decoded"),
    "overflow": ({"size": [H, W], "counts": [10**400]}, "run-length mask that cannot be decoded"),
    "nothing": ({"size": [H, W], "counts": [H * W]}, "run-length mask without a pixel"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_segmentation_costs_its_row_where_masks_are_wanted(tmp_path, name):
    segmentation, reason = BAD[name]
    path = coco_set(
        tmp_path, [annotation(1, [SQUARE]), annotation(2, segmentation), annotation(3, segmentation, image=2)]
    )
    data = read_dataset(path, masks=True)
    assert [len(record.labels) for record in data.records] == [1]  # the second picture is set aside, not background
    reasons = [(problem.reason, problem.action) for problem in data.problems]
    quarantined = ("every row of its annotation is bad", "picture quarantined")
    assert sorted(reasons) == sorted([(reason, "row dropped")] * 2 + [quarantined])
    assert "instances.json image 1" in str(data.problems[0])
    assert sum(len(record.labels) for record in read_dataset(path).records) == 3  # boxes alone do not mind


def test_a_bad_polygon_beside_a_good_one_is_left_out_and_counted(tmp_path):
    data = read_dataset(
        coco_set(tmp_path, [annotation(1, [SQUARE, [1, 2, 3, 4], [90, 90, 95, 90, 95, 95]])]), masks=True
    )
    assert len(data.records[0].outlines.owner) == 1
    assert [(problem.reason, problem.action) for problem in data.problems] == [
        ("polygon of fewer than 3 corners", "kept"),
        ("polygon outside the picture", "kept"),
    ]


def test_area_is_the_annotated_one_or_that_of_the_rings(tmp_path):
    bare = annotation(1, [SQUARE, [40, 10, 50, 10, 40, 30]], box=(10, 10, 40, 20))
    del bare["area"]
    runs_only = {**annotation(2, {"size": [H, W], "counts": runs(holed())})}
    del runs_only["area"]
    path = coco_set(tmp_path, [bare, runs_only, annotation(3, [SQUARE])])
    assert read_dataset(path, masks=True).records[0].area.tolist() == [500, holed().sum(), 350]
    assert read_dataset(path).records[0].area.tolist() == [800, 400, 350]


def test_a_polygon_over_the_border_is_cut_by_the_picture(tmp_path):
    path = coco_set(tmp_path, [annotation(1, [[-20, 10, 30, 10, 30, 60, -20, 60]], box=(0, 10, 30, 38))])
    outlines = read_dataset(path, masks=True).records[0].outlines
    assert fill(outlines, (H, W)).sum() == 30 * 38 == patches(outlines, (H, W))[0].area


def test_masks_of_data_without_any_name_the_annotation_file(tmp_path):
    path = coco_set(tmp_path / "coco", [annotation(1, None), annotation(2, [])])
    with pytest.raises(UserError, match=r"instances\.json: none of its 2 annotations has a 'segmentation'"):
        read_dataset(path, masks=True)
    with pytest.raises(QuarantineError, match="every row"):
        read_dataset(coco_set(tmp_path / "bad", [annotation(k, [[1, 2]], image=k) for k in (1, 2)]), masks=True)

    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    cv2.imwrite(str(tmp_path / "images/a.png"), np.zeros((H, W, 3), np.uint8))
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\n")
    with pytest.raises(UserError, match=r"labels/a\.txt:1: none of 1 rows is a polygon"):
        read_dataset(tmp_path / "data.yaml", masks=True)
    voc = tmp_path / "voc.yaml"
    voc.write_text("train: train\nnames: [cat]\nformat: voc\n")
    with pytest.raises(UserError, match=r"voc\.yaml:1: annotations of format 'voc' hold boxes only"):
        read_dataset(voc, masks=True)


def test_yolo_polygons_are_outlines(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for name in "ab":
        cv2.imwrite(str(tmp_path / f"images/{name}.png"), np.zeros((H, W, 3), np.uint8))
    row = "0 " + " ".join(f"{x / W:.6f} {y / H:.6f}" for x, y in zip(SQUARE[::2], SQUARE[1::2]))
    (tmp_path / "labels/a.txt").write_text(f"{row}\n0 0.5 0.5 0.25 0.25\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\n")
    data = read_dataset(tmp_path / "data.yaml", masks=True)
    assert [(len(record.labels), len(record.outlines)) for record in data.records] == [(1, 1), (0, 0)]
    assert fill(data.records[0].outlines, (H, W))[0, 10:30, 10:30].all()
    assert data.records[0].area == pytest.approx(400, abs=0.01)
    assert [str(problem) for problem in data.problems if problem.line] == [
        f"{tmp_path}/labels/a.txt:2: object without a segmentation: box 24 18 40 30 (row dropped)"
    ]


# --------------------------------------------------------------------------------------------------------- augmentation


def triangle_sample(rng, size=(90, 120)) -> Sample:
    """A dark picture with two white triangles, the second one to be ignored."""
    rings = []
    for left, right in ((0.08, 0.5), (0.55, 0.95)):
        x = rng.uniform(left, right, 3) * size[1]
        y = np.array([0.1, 0.9, rng.uniform(0.2, 0.8)]) * size[0]
        x[:2] = left * size[1], right * size[1]
        rings.append([np.stack([x, y], axis=1)])
    fine = fill(Outlines.of([[4 * ring] for (ring,) in rings]), (4 * size[0], 4 * size[1])).any(0)
    share = fine.reshape(size[0], 4, size[1], 4).mean(axis=(1, 3))  # OpenCV's polygons are half a pixel too large
    image = np.repeat(np.uint8(20 + 235 * share)[..., None], 3, axis=2)
    boxes = np.array([[*ring.min(0), *ring.max(0)] for (ring,) in rings], np.float32)
    info = ImageInfo(id=0, path="", size=size)
    return Sample(
        image=image, boxes=boxes, labels=np.zeros(2, np.int64), ignore=np.array([False, True]), info=info,
        outlines=Outlines.of(rings),
    )  # fmt: skip


STRONG = Augment(degrees=30, translate=0.1, scale=0.4, shear=8, perspective=0.0008, fliplr=0.5, flipud=0.5)
UPRIGHT = Augment(translate=0.2, scale=0.4, fliplr=0.5, flipud=0.5)


@pytest.mark.parametrize("augment", [STRONG, UPRIGHT], ids=["turned", "upright"])
@pytest.mark.parametrize("make", ["one", "mosaic", "mixup"])
def test_outlines_follow_pixels(augment, make):
    """What an outline covers is white, and no white lies beyond the outlines."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        if make == "mosaic":
            sample = mosaic([triangle_sample(rng) for _ in range(4)], (128, 160), augment, rng)
        else:
            sample = random_perspective(triangle_sample(rng), (128, 160), augment, rng)
        if make == "mixup":
            other = random_perspective(triangle_sample(rng), (128, 160), augment, rng)
            sample = mixup(sample, other.replace(image=sample.image), rng)
            sample = sample.replace(outlines=sample.outlines.between(0, 2)) if len(sample.outlines) > 2 else sample
        sample = flip(sample, augment, rng)
        white = sample.image[..., 0] > 137
        covered = fill(sample.outlines, (128, 160)).any(0)
        inner = cv2.erode(covered.astype(np.uint8), np.ones((3, 3))).astype(bool)
        assert white[inner].mean() > 0.995 if inner.any() else True
        stray = white & ~cv2.dilate(covered.astype(np.uint8), np.ones((3, 3))).astype(bool)
        if make != "mosaic" and len(sample.outlines) == 2:  # what is hardly visible loses its outline, not its pixels
            assert stray.sum() <= 2


def test_outlines_change_no_box_and_no_pixel():
    for seed in range(6):
        samples = [triangle_sample(np.random.default_rng(seed + i)) for i in range(4)]
        bare = [sample.replace(outlines=None) for sample in samples]
        for make in (mosaic, lambda parts, *rest: random_perspective(parts[0], *rest)):
            results = []
            for parts in (samples, bare):
                rng = np.random.default_rng(seed)
                results.append(flip(make(parts, (96, 96), STRONG, rng), STRONG, rng))
            one, other = results
            assert other.outlines is None and len(one.outlines) == len(one.boxes)
            for name in ("image", "boxes", "labels", "ignore"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


# ----------------------------------------------------------------------------------------------------------- to targets


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> tuple:
    """The generated data set, small, with outlines."""
    folder = tmp_path_factory.mktemp("shapes") / "set"
    ensure_shapes(folder, seed=3, num_pictures={"train": 10, "val": 2})
    return tuple(read_dataset(folder / "annotations" / "train.json", masks=True).records)


def test_the_generated_data_has_outlines_of_its_areas(shapes):
    assert sum(len(record.outlines) for record in shapes) > 15
    for record in shapes:
        for patch, area, box in zip(patches(record.outlines, record.size), record.area, record.boxes):
            assert 0.8 < patch.area / area <= 1.0
            window = Outlines.of([[np.stack([box[[0, 2, 2, 0]], box[[1, 1, 3, 3]]], axis=1)]])
            assert patch.area <= fill(window, record.size).sum()


def test_targets_hold_the_masks_of_their_boxes(shapes):
    dataset = DetectionDataset(shapes)
    draws = [draw for batch in EvalSampler(dataset.sizes, 4, (128, 128), rect=False) for draw in batch]
    batch = collate([dataset[draw] for draw in draws])
    targets = batch.targets
    assert targets.masks.dtype == torch.uint8 and targets.masks.shape == (len(targets), 56, 56)
    assert targets.masks.max() == 1
    for row, (number, box) in enumerate(zip(targets.image.tolist(), targets.boxes)):
        record, info = shapes[batch.infos[number].id], batch.infos[number]
        mine = [i for i, other in enumerate(record.boxes) if np.allclose(info.letterbox.apply(other), box, atol=1e-3)]
        outline = record.outlines.between(mine[0], mine[0] + 1)
        placed = outline.moved(info.letterbox.apply(outline.corners))
        expected = fill(placed, (128, 128))[0]
        patch = paste(targets.masks[row : row + 1].float(), box[None], (128, 128))[0]
        left, top, right, bottom = patch.window
        pixels = np.zeros((128, 128), bool)
        pixels[top:bottom, left:right] = patch.pixels
        assert (pixels & expected).sum() >= 0.88 * (pixels | expected).sum()  # a mask of 20 pixels may lose a column


def test_workers_and_ignore_regions(shapes):
    dataset = DetectionDataset(shapes, augment=Augment(mosaic=1.0, mixup=0.5, degrees=5.0, fliplr=0.5), seed=1)
    runs_ = [
        list(build_loader(dataset, TrainSampler(len(dataset), 4, size=(96, 96), seed=1), workers=workers))
        for workers in (0, 1)
    ]
    for one, other in zip(*runs_, strict=True):
        assert torch.equal(one.targets.masks, other.targets.masks) and len(one.targets.masks) == len(one.targets)
        assert one.targets.pin_memory is not None
    sample = triangle_sample(np.random.default_rng(0))
    targets = collate([sample, sample]).targets
    assert len(targets) == 2 == len(targets.masks) and len(targets.ignore_boxes) == 2


def test_pictures_without_objects():
    empty = Sample(
        image=np.zeros((32, 32, 3), np.uint8), boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int64),
        ignore=np.zeros(0, bool), info=ImageInfo(id=0, path="", size=(32, 32)), outlines=Outlines.of([]),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    moved = flip(mosaic([empty] * 4, (32, 32), STRONG, rng), STRONG, rng)
    assert collate([moved, moved]).targets.masks.shape == (0, 56, 56)


def test_a_cached_picture_keeps_its_outlines_in_its_pixels(shapes):
    class Halved:
        def __len__(self):
            return len(shapes)

        def __getitem__(self, index):
            height, width = shapes[index].size
            return np.zeros((height // 2, width // 2, 3), np.uint8)

    whole, half = DetectionDataset(shapes), DetectionDataset(shapes, cache=Halved())
    for index in range(len(shapes)):
        np.testing.assert_allclose(half.load(index).outlines.corners * 2, whole.load(index).outlines.corners, rtol=1e-5)
        for size in ((128, 128), (64, 96)):
            draw = Draw(0, 0, index, size)
            np.testing.assert_allclose(half[draw].outlines.corners, whole[draw].outlines.corners, atol=1.01)

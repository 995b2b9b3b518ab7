"""The generated data set: the same bytes for a seed, whole or not there, and its labels describe its pictures."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from utils.datasets import shapes
from utils.datasets.images import read_image
from utils.datasets.records import read_dataset
from utils.datasets.shapes import NAMES, draw_picture, ensure_shapes
from utils.errors import ResourceError, UserError

FEW = {"train": 12, "val": 4}


def digest(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated") / "shapes"
    ensure_shapes(folder, num_pictures=FEW)
    return folder


def test_a_seed_names_the_bytes(folder, tmp_path):
    ensure_shapes(tmp_path / "again", num_pictures=FEW)
    ensure_shapes(tmp_path / "other", seed=1, num_pictures=FEW)
    assert digest(tmp_path / "again") == digest(folder) != digest(tmp_path / "other")


def test_it_reads_without_a_problem(folder):
    for split, num in FEW.items():
        data = read_dataset(folder, split)
        assert data.names == NAMES and len(data.records) == num
        assert data.problems == [] and data.num_unlabelled == 0


def test_labels_and_polygons_agree(folder):
    coco = read_dataset(folder / "annotations" / "train.json")
    for mine, theirs in zip(read_dataset(folder, "train").records, coco.records):
        np.testing.assert_allclose(mine.boxes, theirs.boxes, atol=1e-3)
        assert np.array_equal(mine.labels, theirs.labels)
    annotations = json.loads((folder / "annotations" / "train.json").read_text())["annotations"]
    for annotation in annotations:
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in annotation["segmentation"]])
        x, y, w, h = annotation["bbox"]
        assert points.min(0).tolist() == [x, y] and points.max(0).tolist() == [x + w - 1, y + h - 1]


def test_boxes_hug_what_is_visible():
    for seed in range(20):
        image, drawn = draw_picture(np.random.default_rng(seed))
        masks = np.stack([shape.mask for shape in drawn]) if drawn else np.zeros((0, *image.shape[:2]), bool)
        assert masks.sum(0).max(initial=0) <= 1  # a pixel belongs to the foremost shape only
        for shape in drawn:
            assert shape.mask.shape == image.shape[:2]
            assert shape.mask.sum() >= max(shapes.MIN_PIXELS, shapes.MIN_UNCOVERED * shape.num_pixels)


def test_shapes_differ_from_what_lies_around_them(folder):
    """A detector can find them: inside and around a shape's box the colours differ."""
    distances = []
    for record in read_dataset(folder, "train").records:
        image = read_image(record.path).astype(float)
        for x1, y1, x2, y2 in record.boxes.astype(int):
            core = image[(3 * y1 + y2) // 4 : (y1 + 3 * y2) // 4 + 1, (3 * x1 + x2) // 4 : (x1 + 3 * x2) // 4 + 1]
            around = image[max(y1 - 6, 0) : y2 + 6, max(x1 - 6, 0) : x2 + 6]
            distances.append(np.linalg.norm(core.mean((0, 1)) - around.mean((0, 1))))
    assert np.median(distances) > 15


def test_an_existing_folder_is_never_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ResourceError, match="cannot write"):
        ensure_shapes(tmp_path / "mine", num_pictures=FEW)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_what_another_seed_drew_is_not_taken_for_this_one(folder):
    assert ensure_shapes(folder, num_pictures=FEW) == folder / "data.yaml"
    with pytest.raises(UserError, match=r"data\.yaml:1: found .*seed 0.* expected .*seed 1.*remove"):
        ensure_shapes(folder, seed=1, num_pictures=FEW)


def test_no_half_data_set_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "draw_picture", lambda rng: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ensure_shapes(tmp_path / "shapes", num_pictures=FEW)
    assert list(tmp_path.iterdir()) == []


def test_a_yaml_makes_it_at_first_use(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "NUM_PICTURES", FEW)
    yaml = tmp_path / "shapes.yaml"
    yaml.write_text((Path(shapes.__file__).parents[2] / "data" / "shapes.yaml").read_text())
    assert len(read_dataset(yaml, "val").records) == FEW["val"]
    assert (tmp_path / "shapes" / "annotations" / "val.json").is_file()

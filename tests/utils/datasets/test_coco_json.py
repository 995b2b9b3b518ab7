"""COCO files: ids are mapped, crowds kept, bad annotations cost themselves."""

from pathlib import Path

import pytest

from tests.utils.datasets.sets import GOOD_ANNOTATION, H, W, coco_set, write
from utils.datasets.records import read_dataset
from utils.errors import UserError


def test_coco_ids_are_mapped_and_crowds_kept(tmp_path):
    crowd = {
        "id": 2,
        "image_id": "b",
        "category_id": 3,
        "bbox": [0, 0, 5, 5],
        "iscrowd": 1,
        "segmentation": {"counts": [1]},
    }
    tiny = {"id": 3, "image_id": "b", "category_id": 3, "bbox": [9, 9, 0.5, 0.5]}
    data = read_dataset(coco_set(tmp_path, [GOOD_ANNOTATION, crowd, tiny, {**tiny, "id": 4}]))
    assert data.names == ("cat", "dog") and data.problems == []
    first, second = data.records
    assert (first.image_id, first.labels.tolist(), first.boxes.tolist()) == (7, [1], [[1, 2, 11, 22]])
    assert first.area.tolist() == [150.5]
    assert second.labels.tolist() == [0, 0, 0] and second.crowd.tolist() == [True, False, False]
    yaml = write(tmp_path / "c.yaml", "format: coco\nannotations: {train: instances.json}\nnames: [dog, cat]\n")
    assert read_dataset(yaml).records[0].labels.tolist() == [0]
    few = write(tmp_path / "d.yaml", "format: coco\nannotations: instances.json\ntrain: images\nnames: [cat]\n")
    with pytest.raises(UserError, match="annotation 1: category 90 has no name"):
        read_dataset(few)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"bbox": [1, 2, 3]}, "bbox is not 4 numbers"),
        ({"bbox": [1, 2, float("nan"), 4]}, "bbox is not 4 finite numbers"),
        ({"bbox": [1, 2, 10**400, 4]}, "bbox is not 4 finite numbers"),
        ({"bbox": None}, "bbox is not 4 numbers"),
        ({"bbox": [1, 2, 0, 4]}, "box without width or height"),
        ({"id": 1}, "annotation id given twice"),
        ({"image_id": 99}, "annotation of an unknown image"),
        ({"image_id": [1]}, "annotation of an unknown image"),
        ({"category_id": "dog"}, "category_id is not a number"),
    ],
)
def test_bad_coco_annotations_cost_themselves(tmp_path, change, reason):
    path = coco_set(tmp_path, [GOOD_ANNOTATION, {**GOOD_ANNOTATION, "id": 2, **change}])
    data = read_dataset(path)
    assert len(data.records[0].labels) == 1
    assert [problem.reason for problem in data.problems] == [reason]


def test_bad_coco_images_are_set_aside(tmp_path):
    images = [
        {"id": 7, "file_name": "a.jpg", "height": H, "width": W},
        {"id": 7, "file_name": "b.jpg"},
        {"id": 8},
        {"id": 9, "file_name": "gone.jpg"},
        {"id": 10, "file_name": "b.jpg", "height": W, "width": H},
    ]
    data = read_dataset(coco_set(tmp_path, [GOOD_ANNOTATION], images))
    assert len(data.records) == 1 and [problem.action for problem in data.problems] == ["picture quarantined"] * 4


def test_one_picture_under_two_ids_is_not_background_for_itself(tmp_path):
    """Merged files: each of two records would teach that what the other one annotates is not there."""
    images = [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}]
    path = coco_set(tmp_path, [GOOD_ANNOTATION, {**GOOD_ANNOTATION, "id": 2, "image_id": 8}], images)
    yaml = write(tmp_path / "c.yaml", "format: coco\nannotations: instances.json\ntrain: images\n")
    for data in (read_dataset(path), read_dataset(yaml)):
        assert [Path(record.path).name for record in data.records] == ["a.jpg", "b.jpg"]
        assert [(problem.reason, problem.action) for problem in data.problems] == [
            ("file_name given twice", "picture quarantined"),
            ("annotation of an unknown image", "row dropped"),
        ]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 9999, '{"images": [], "annotations": []}', '{"images": [1]}', "\0"]
)
def test_json_that_is_not_coco(tmp_path, text):
    with pytest.raises(UserError, match=r"c\.json"):
        read_dataset(write(tmp_path / "c.json", text))

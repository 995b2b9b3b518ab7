"""Rows D24 and D25: XML and JSON. DTDs are refused, a bad object costs itself, ids are mapped."""

import os

import pytest
from harness import refused

from tests.utils.datasets.sets import GOOD_ANNOTATION, OBJECT, H, W, coco_set, voc_set, write
from utils.datasets.quarantine import refuse_bad
from utils.datasets.records import read_dataset

# ----------------------------------------------------------------------------------------------------------- Pascal VOC

ENTITIES = "<!DOCTYPE a [<!ENTITY x0 'x'>" + "".join(
    f"<!ENTITY x{n} '{f'&x{n - 1};' * 10}'>" for n in range(1, 10)
)  # a billion
VOC_FILES = {  # a whole file that is set aside -> what is told
    "D24-bomb": (f"{ENTITIES}]><annotation>&x9;</annotation>", "document types and entities are refused"),
    "D24-external": ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>', "refused"),
    "D24-external-dtd": ('<!DOCTYPE annotation SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>', "refused"),
    "D24-wrong-size": (
        f"<annotation><size><width>{W + 1}</width><height>{H}</height></size>{OBJECT.format(5, 30)}</annotation>",
        "annotated 65 x 48, found 64 x 48",
    ),
    "D24-cut": ("<annotation><object>", "not XML"),
    "D24-nested": ("<annotation>" + "<a>" * 5000, "nested deeper than 20"),
    "D24-encoding": ('<?xml version="1.0" encoding="euc-jp"?><annotation/>', "not XML"),
    "D24-other": ("<html></html>", "not Pascal VOC"),
}


@pytest.mark.parametrize("text, says", [pytest.param(*values, id=row) for row, values in VOC_FILES.items()])
def test_a_bad_xml_is_set_aside(tmp_path, seen, text, says):
    voc_set(tmp_path, {"a": OBJECT.format(5, 30), "b": ""})
    write(tmp_path / "Annotations" / "b.xml", text)
    data = read_dataset(tmp_path)
    assert len(data.records) == 1
    (problem,) = data.problems
    assert problem.action == "picture quarantined" and "b.xml" in problem.where and says in problem.found
    seen(str(problem).replace(str(tmp_path), ""))


VOC_OBJECTS = {  # an object beside a good one -> what is told; None: it is used
    "D24-turned": ((30, 10), "box without width or height"),
    "D24-text": (("left", 30), "object without name and 4 finite corners"),
    "D24-nan": (("nan", 30), "object without name and 4 finite corners"),
    "D24-huge": (("1e300", 30), "object without name and 4 finite corners"),
    "D24-underscore": (("1_0", 30), "object without name and 4 finite corners"),
    "D24-outside": ((100, 200), "box outside the picture"),
    "D24-float": ((10.5, 30.25), None),
    "D24-one-based": ((1, W), None),
}


@pytest.mark.parametrize("corners, reason", [pytest.param(*values, id=row) for row, values in VOC_OBJECTS.items()])
def test_objects_of_an_xml(tmp_path, corners, reason):
    voc_set(tmp_path, {"a": OBJECT.format(5, 30) + "\n" + OBJECT.format(*corners)})
    data = read_dataset(tmp_path)
    if reason is None:
        assert data.problems == [] and data.records[0].boxes[1].tolist() == [corners[0], 5, corners[1], 20]
        return
    (problem,) = data.problems
    assert len(data.records[0].labels) == 1
    assert problem.where.endswith("a.xml:3") and (problem.reason, problem.action) == (reason, "row dropped")


@pytest.mark.parametrize("size", [pytest.param("", id="D24-no-size"), pytest.param("0", id="D24-size-0")])
def test_a_size_is_not_needed(tmp_path, size):
    voc_set(tmp_path, {"a": OBJECT.format(5, 30)})
    text = f"<annotation>{f'<size><width>{size}</width></size>' if size else ''}{OBJECT.format(5, 30)}</annotation>"
    write(tmp_path / "Annotations" / "a.xml", text)
    assert read_dataset(tmp_path).num_boxes == 1


def test_d24_difficult_truncated_and_unknown(tmp_path, seen):
    marked = OBJECT.format(5, 30).replace("<bndbox>", "<difficult>1</difficult><truncated>1</truncated><bndbox>")
    voc_set(tmp_path, {"a": marked + OBJECT.format(6, 30)})
    record = read_dataset(tmp_path).records[0]
    assert record.ignore.tolist() == [True, False]
    yaml = write(tmp_path / "voc.yaml", "format: voc\ntrain: train\nnames: [cats]\n")
    seen(refused(lambda: read_dataset(yaml), where=str(tmp_path / "Annotations" / "a.xml:2"), says="class 'cat'"))


def test_d24_an_xml_that_cannot_be_opened_is_not_missing(tmp_path):
    voc_set(tmp_path, {"a": OBJECT.format(5, 30), "b": "", "c": ""})
    for name in "bc":
        (tmp_path / "Annotations" / f"{name}.xml").unlink()
    os.mkfifo(tmp_path / "Annotations" / "b.xml")
    (tmp_path / "Annotations" / "c.xml").symlink_to("nowhere")
    data = read_dataset(tmp_path)
    assert len(data.records) == 1 and data.num_unlabelled == 0
    assert [problem.action for problem in data.problems] == ["picture quarantined"] * 2


# ----------------------------------------------------------------------------------------------------------------- COCO

COCO_ROWS = {  # a changed annotation beside a good one -> the reason
    "D25-bbox-of-3": ({"bbox": [1, 2, 3]}, "bbox is not 4 numbers"),
    "D25-nan": ({"bbox": [1, 2, float("nan"), 4]}, "bbox is not 4 finite numbers"),
    "D25-infinity": ({"bbox": [1, 2, float("inf"), 4]}, "bbox is not 4 finite numbers"),
    "D25-huge-int": ({"bbox": [1, 2, 10**400, 4]}, "bbox is not 4 finite numbers"),
    "D25-text": ({"bbox": ["1", 2, 3, 4]}, "bbox is not 4 finite numbers"),
    "D25-zero-area": ({"bbox": [1, 2, 0, 4]}, "box without width or height"),
    "D25-double-id": ({"id": 1}, "annotation id given twice"),
    "D25-unknown-image": ({"image_id": 99}, "annotation of an unknown image"),
    "D25-category-text": ({"category_id": "dog"}, "category_id is not a number"),
}


@pytest.mark.parametrize("change, reason", [pytest.param(*values, id=row) for row, values in COCO_ROWS.items()])
def test_a_bad_annotation_costs_itself(tmp_path, seen, change, reason):
    path = coco_set(tmp_path, [GOOD_ANNOTATION, {**GOOD_ANNOTATION, "id": 2, **change}])
    data = read_dataset(path)
    assert len(data.records[0].labels) == 1
    (problem,) = data.problems
    assert (problem.reason, problem.action) == (reason, "row dropped")
    assert f"annotation {change.get('id', 2)} of image" in problem.found or "image 7" in problem.where
    seen(str(problem).replace(str(tmp_path), ""))


COCO_IMAGES = {
    "D25-image-missing": {"id": 9, "file_name": "gone.jpg"},
    "D25-image-id-twice": {"id": 7, "file_name": "b.jpg"},
    "D25-image-without-name": {"id": 8},
    "D25-image-turned": {"id": 10, "file_name": "b.jpg", "height": W, "width": H},
    "D25-half-a-pair": {"id": 11, "file_name": "\ud800.jpg"},
}


@pytest.mark.parametrize("image", [pytest.param(image, id=row) for row, image in COCO_IMAGES.items()])
def test_a_bad_image_is_set_aside(tmp_path, image):
    good = {"id": 7, "file_name": "a.jpg", "height": H, "width": W}
    data = read_dataset(coco_set(tmp_path, [GOOD_ANNOTATION], [good, image]))
    assert [record.image_id for record in data.records] == [7]
    assert [problem.action for problem in data.problems] == ["picture quarantined"]
    assert str(data.problems[0]).encode("utf-8")


COCO_FILES = {
    "D25-deep": ("[" * 9999, "not JSON"),
    "D25-number-of-5000-digits": ('{"images": [' + "1" * 5000 + "]}", "not JSON"),
    "D25-double-key": (
        '{"images": [], "images": [], "annotations": [], "categories": []}',
        "key 'images' is given twice",
    ),
    "D25-cut": ('{"images": [', "not JSON"),
    "D25-no-list": ('{"images": {}}', "no list of objects named 'images'"),
    "D25-category-surrogate": (
        '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "\\ud800"}]}',
        "a category needs an id",
    ),
}


@pytest.mark.parametrize("text, says", [pytest.param(*values, id=row) for row, values in COCO_FILES.items()])
def test_a_bad_json_is_refused(tmp_path, seen, text, says):
    path = write(tmp_path / "c.json", text)
    seen(refused(lambda: read_dataset(path), where=str(path), says=says))


def test_d25_ids_are_mapped_crowds_kept(tmp_path):
    """Categories 3 and 90, an image id that is text, a crowd with run lengths, an area of zero."""
    crowd = {"id": 2, "image_id": "b", "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1}
    crowd |= {"segmentation": {"counts": [1, 2], "size": [H, W]}, "area": 0}
    data = read_dataset(coco_set(tmp_path, [GOOD_ANNOTATION, crowd]))
    assert data.names == ("cat", "dog") and data.problems == [] and data.category_ids == (3, 90)
    first, second = data.records
    assert (first.image_id, first.labels.tolist(), first.ignore.tolist()) == (7, [1], [False])
    assert (second.labels.tolist(), second.crowd.tolist(), second.ignore.tolist()) == ([0], [True], [True])
    assert refuse_bad(data, max_bad=0) is None

"""Pascal VOC folders: objects, splits, and files that are none."""

import pytest

from tests.utils.datasets.sets import OBJECT, H, W, voc_set, write
from utils.datasets.records import read_dataset
from utils.errors import UserError


def test_voc_root(tmp_path):
    objects = """
  <object><name>dog</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part></object>
  <object><name>cat</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object>"""
    voc_set(tmp_path, {"a": objects, "b": ""})
    data = read_dataset(tmp_path)
    assert data.names == ("cat", "dog")
    record = data.records[0]
    assert record.boxes.tolist() == [[1, 2.5, 30, 40], [5, 5, 64, 48]]  # the numbers as they stand
    assert record.labels.tolist() == [1, 0] and record.ignore.tolist() == [True, False] and not record.crowd.any()
    assert len(data.records[1].labels) == 0
    yaml = write(tmp_path / "voc.yaml", "format: voc\ntrain: train\nnames: [dog, cat]\n")
    assert read_dataset(yaml).records[0].labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"no list 'val\.txt' \(there is: train\)"):
        read_dataset(tmp_path, "val")


@pytest.mark.parametrize("corners", [(30, 10), ("nan", 30), ("", 30), (1, 1), (100, 200)])
def test_bad_voc_objects_cost_themselves(tmp_path, corners):
    voc_set(tmp_path, {"a": OBJECT.format(5, 30) + "\n" + OBJECT.format(*corners)})
    data = read_dataset(tmp_path)
    assert len(data.records[0].labels) == 1
    (problem,) = data.problems
    assert problem.where.endswith("a.xml:3") and problem.action == "row dropped"


@pytest.mark.parametrize(
    "text",
    [
        '<!DOCTYPE a [<!ENTITY x "boom">]><annotation>&x;</annotation>',
        '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>',
        "<annotation><object>",
        "<html></html>",
        "",
        "<a>" * 5000,
        f"<annotation><size><width>{W + 1}</width><height>{H}</height></size></annotation>",
    ],
)
def test_bad_voc_files_are_set_aside(tmp_path, text):
    voc_set(tmp_path, {"a": OBJECT.format(5, 30), "b": ""})
    write(tmp_path / "Annotations" / "b.xml", text)
    data = read_dataset(tmp_path)
    assert len(data.records) == 1 and [problem.action for problem in data.problems] == ["picture quarantined"]
    assert "b.xml" in data.problems[0].where


def test_voc_class_without_a_name(tmp_path):
    voc_set(tmp_path, {"a": OBJECT.format(5, 30)})
    yaml = write(tmp_path / "voc.yaml", "format: voc\ntrain: train\nnames: [cats]\n")
    with pytest.raises(UserError, match=r"a\.xml:2: class 'cat' .*did you mean 'cats'"):
        read_dataset(yaml)

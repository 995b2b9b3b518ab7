"""Every layout gives the same records, and every irregularity is counted with its place; nothing is lost in silence."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.utils.datasets.sets import GOOD, OBJECT, tree_hash, voc_set, write, yolo_set
from utils.datasets.records import FORMATS, read_dataset
from utils.errors import QuarantineError, UserError


def test_bccd_official_splits(data_dir):
    sets = {split: read_dataset(data_dir / "bccd", split) for split in ("train", "val", "test")}
    assert {split: len(data.records) for split, data in sets.items()} == {"train": 205, "val": 87, "test": 72}
    assert sum(data.num_boxes for data in sets.values()) == 4888 - 2
    places = [Path(problem.where).name for data in sets.values() for problem in data.problems]
    assert places == ["BloodImage_00343.xml:50", "BloodImage_00338.xml:158"]
    assert all(data.names == ("Platelets", "RBC", "WBC") for data in sets.values())
    labels = np.concatenate([record.labels for data in sets.values() for record in data.records])
    assert np.bincount(labels).tolist() == [361, 4155 - 2, 372]


def roughly(row) -> list:
    return [row[0], *(round(value) for value in row[1])]


def test_coco_json_and_yolo_labels_agree(data_dir, tmp_path):
    """The boxes of instances.json without crowds equal those of the 131 label files, to their sixth digit."""
    root = data_dir / "coco-mini"
    coco = read_dataset(root / "instances.json")
    assert (coco.num_boxes, sum(int(record.crowd.sum()) for record in coco.records)) == (1713, 13)
    assert len(coco.names) == 80 and coco.names[0] == "person" and coco.problems == []
    assert all((record.ignore == record.crowd).all() for record in coco.records)
    assert coco.records[0].image_id == 25 and coco.records[0].size == (426, 640)
    labelled = {file.stem for file in (root / "labels").glob("*.txt")}
    listed = write(
        tmp_path / "labelled.txt", "\n".join(str(root / "images" / f"{stem}.jpg") for stem in sorted(labelled))
    )
    yaml = write(tmp_path / "data.yaml", f"train: {listed}\nnames: {json.dumps(list(coco.names))}\n")
    yolo = read_dataset(yaml)
    assert len(yolo.records) == len(labelled)
    by_path = {Path(record.path).name: record for record in coco.records}
    for record in yolo.records:
        other = by_path[Path(record.path).name]
        plain = ~other.crowd
        mine = sorted(zip(record.labels.tolist(), record.boxes.tolist()), key=roughly)
        theirs = sorted(zip(other.labels[plain].tolist(), other.boxes[plain].tolist()), key=roughly)
        assert [label for label, _ in mine] == [label for label, _ in theirs]
        np.testing.assert_allclose([box for _, box in mine], [box for _, box in theirs], atol=0.02)


def test_coco_through_a_yaml_with_a_picture_list(data_dir, tmp_path):
    text = f"format: coco\npath: {data_dir / 'coco-mini'}\nannotations: instances.json\nval: val2017.txt\n"
    data = read_dataset(write(tmp_path / "mini.yaml", text), "val")
    assert len(data.records) == 112 and len(data.names) == 80
    whole = {record.path: record for record in read_dataset(data_dir / "coco-mini" / "instances.json").records}
    for record in data.records:
        assert np.array_equal(record.boxes, whole[record.path].boxes)


def test_reading_changes_nothing(tmp_path):
    yolo_set(tmp_path, {"a": GOOD, "b": "0 0.5\n", "c": None, "d": "1 0.9 0.5 0.4 0.2\n"})
    before = tree_hash(tmp_path)
    read_dataset(tmp_path)
    assert tree_hash(tmp_path) == before


def test_unusable_pictures_are_set_aside(tmp_path):
    path = yolo_set(tmp_path, {"a": GOOD, "b": GOOD, "c": GOOD, "d": GOOD})
    folder = tmp_path / "images" / "train"
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:-20])
    (folder / "c.jpg").unlink()
    os.mkfifo(folder / "c.jpg")
    (folder / "d.jpg").unlink()
    (folder / "d.jpg").symlink_to(folder / "nowhere.jpg")
    data = read_dataset(path)
    assert [Path(record.path).name for record in data.records] == ["a.jpg"]
    quarantined = {Path(problem.path).name for problem in data.problems if problem.action == "picture quarantined"}
    assert quarantined == {"b.jpg", "c.jpg", "d.jpg"}
    (folder / "a.jpg").write_bytes(b"")
    with pytest.raises(QuarantineError, match="all 4 were set aside"):
        read_dataset(path)


def make_voc(folder: Path) -> Path:
    voc_set(folder, {"a": OBJECT.format(5, 20), "b": OBJECT.format(5, 20)})
    return folder


def deny(monkeypatch, function: str, start: str) -> None:
    """Let ``os.function`` say of every path that starts so what it says where a user may not read it."""
    real = getattr(os, function)

    def denied(path, *args, **more):
        if str(path).startswith(start):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(os, function, denied)


def test_a_folder_of_pictures_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    path = yolo_set(tmp_path, {"a": GOOD, "deep/b": GOOD})
    deny(monkeypatch, "scandir", f"{tmp_path}/images/train/deep")
    with pytest.raises(UserError, match=r"train/deep: the folder cannot be read: Permission denied"):
        read_dataset(path)


@pytest.mark.parametrize("make", [lambda folder: yolo_set(folder, {"a": GOOD, "deep/b": GOOD}), make_voc])
def test_annotations_that_may_not_be_read_leave_no_background(tmp_path, monkeypatch, make):
    path = make(tmp_path)
    for function in ("lstat", "stat"):
        deny(monkeypatch, function, f"{tmp_path}/labels/train/deep/")
        deny(monkeypatch, function, f"{tmp_path}/Annotations/b.xml")
    data = read_dataset(path)
    assert [Path(record.path).stem for record in data.records] == ["a"] and data.num_unlabelled == 0
    assert ["picture quarantined" in str(problem) for problem in data.problems] == [True]


def test_formats_are_a_table():
    assert set(FORMATS) == {"yolo", "darknet", "coco", "voc"}

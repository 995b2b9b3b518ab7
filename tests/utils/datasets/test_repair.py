"""The repaired copy reads as the original does, with nothing left to repair; every change goes back, to the byte."""

import json
import shutil

import numpy as np
import pytest

from tests.utils.datasets.sets import GOOD, coco_set, tree_hash, voc_set, yolo_set
from utils.datasets.formats.rows import CLIPPED, DOUBLE, DROPPED
from utils.datasets.records import read_dataset
from utils.datasets.repair import CHANGES, COPY, RESTORED, json_items, main, repair, repaired, restore
from utils.errors import UserError

OBJECT = (
    "\n  <object><name>{}</name>{}<bndbox><xmin>{}</xmin><ymin>5</ymin><xmax>{}</xmax><ymax>20</ymax></bndbox></object>"
)


def dirty_yolo(folder):
    labels = {
        "over": GOOD + "0 0.9 0.5 0.4 0.2  # reaches out\n1 0.5 0.5 0.1 0.1\r\n",
        "last": "\ufeff" + "0 0.9 0.5 0.4 0.2\n" + GOOD + "one 0.5 0.5 1 1\n0 0.5 0.5 0 0.1\n1 2.5 0.5 0.1 0.1",
        "double": GOOD + "\n\n" + GOOD + GOOD,
        "polygon": "1 -0.2 0.1 0.5 0.1 0.5 0.9 0.1 1.2\n",
        "nameless": GOOD + "7 0.5 0.5 0.1 0.1\n",
        "hopeless": "0 nan 0.5 0.1 0.1\n",
        "empty": "",
        "none": None,
    }
    return yolo_set(folder, labels), folder / "labels/train"


def dirty_voc(folder):
    good, far = OBJECT.format("cat", "", 3, 30), OBJECT.format("dog", "<difficult>1</difficult>", 40, 75)
    flat, double = OBJECT.format("cat", "", 9, 9), OBJECT.format("cat", "", 3, 30)
    voc_set(
        folder, {"a": good + far + flat, "b": double + good + far, "c": good, "d": flat, "e": far * 2 + "<x/>" + flat}
    )
    return folder, folder / "Annotations"


def dirty_coco(folder):
    def box(number, box, image=7):
        return {"id": number, "image_id": image, "category_id": 3, "bbox": box}

    annotations = [
        box(1, [5, 5, 0, 9]),
        box(2, [5, 5, "x", 9]),
        box(3, [1, 2, 10, 20]) | {"note": 'a "quoted], thing" ä'},
        box(4, [50, 2, 30, 20]),
        box(5, [1, 2, 10, 20]),
        box(5, [3, 3, 3, 3]),
        box(6, [1, 2, -3, 20]),
        box(7, [1, 2, 3, 4], "gone"),
        box(8, [0, 0, 0, 0], "b"),
        box(9, [200, 0, 5, 5]),
    ]
    return coco_set(folder, annotations), folder


SETS = {"yolo": dirty_yolo, "voc": dirty_voc, "coco": dirty_coco}
LEFT = {"yolo": 1, "voc": 1, "coco": 2}  # rows of pictures that have no good one, and of none


def in_place(path, annotations, copy, folder):
    """A data set like that at ``path`` whose annotations are the copies."""
    root = path if path.is_dir() else path.parent
    shutil.copytree(root, folder)
    shutil.copytree(copy, folder / annotations.relative_to(root), dirs_exist_ok=True)
    return folder / path.relative_to(root)


@pytest.mark.parametrize("format", SETS)
def test_the_copy_reads_as_the_original_with_nothing_left_to_repair(tmp_path, format):
    path, annotations = SETS[format](tmp_path / "set")
    before = tree_hash(tmp_path / "set")
    data = read_dataset(path, "train")
    changes = repair(str(path), [data], tmp_path / "run")
    assert tree_hash(tmp_path / "set") == before
    again = read_dataset(in_place(path, annotations, tmp_path / "run" / COPY, tmp_path / "new"), "train")
    assert len(again.records) == len(data.records)
    for old, new in zip(data.records, again.records):
        np.testing.assert_array_equal(old.boxes, new.boxes)
        np.testing.assert_array_equal(old.labels, new.labels)
        np.testing.assert_array_equal(old.ignore, new.ignore)
    repairable = (CLIPPED, DROPPED, DOUBLE)
    left = [problem for problem in again.problems if problem.action in repairable]
    assert len(left) == LEFT[format] < len([problem for problem in data.problems if problem.action in repairable])
    assert len(changes) >= 6


@pytest.mark.parametrize("format", SETS)
def test_every_change_goes_back_to_the_byte(tmp_path, format):
    path, annotations = SETS[format](tmp_path / "set")
    repair(str(path), [read_dataset(path, "train")], tmp_path / "run")
    assert restore(tmp_path / "run") > 0
    files = [file for file in (tmp_path / "run" / RESTORED).rglob("*") if file.is_file()]
    assert files
    changed = 0
    for file in files:
        name = file.relative_to(tmp_path / "run" / RESTORED)
        assert file.read_bytes() == (annotations / name).read_bytes()
        changed += file.read_bytes() != (tmp_path / "run" / COPY / name).read_bytes()
    assert changed == len({json.loads(line)["file"] for line in (tmp_path / "run" / CHANGES).read_text().splitlines()})


def test_what_stands_beside_a_change_stays(tmp_path):
    path, _ = dirty_yolo(tmp_path / "set")
    changes = repair(str(path), [read_dataset(path, "train")], tmp_path / "run")
    copy = tmp_path / "run" / COPY
    assert (copy / "over.txt").read_bytes() == (
        GOOD + "0 0.850000 0.500000 0.300000 0.200000\n1 0.5 0.5 0.1 0.1\r\n"
    ).encode()
    assert (copy / "double.txt").read_text() == GOOD + "\n\n"
    assert (copy / "polygon.txt").read_text() == "1 0 0.1 0.5 0.1 0.5 0.9 0.1 1\n"
    assert (copy / "last.txt").read_text() == "0 0.850000 0.500000 0.300000 0.200000\n" + GOOD
    assert not (copy / "hopeless.txt").exists()  # left to its owner
    over = next(change for change in changes if change.file == "over.txt")
    assert (over.line, over.reason) == (2, "box over the border of its picture")


@pytest.mark.parametrize("removed", [[0], [3], [0, 1], [2, 3], [1, 2], [0, 1, 2, 3], [0, 3], [0, 2]])
@pytest.mark.parametrize("space", ["", " ", "\n  "])
def test_any_items_of_a_json_list_can_go(tmp_path, removed, space):
    good = {"image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 20]}
    flat = good | {"bbox": [1, 2, 0, 20]}
    items = [json.dumps((flat if number in removed else good) | {"id": number}) for number in range(4)]
    items.append(json.dumps(good | {"id": 9, "image_id": "b"}))  # so that no list is empty and no picture hopeless
    keep = json.dumps(good | {"id": 10})
    path = coco_set(tmp_path / "set", [])
    head = json.loads(path.read_text())
    listed = f"{space},{space}".join([*items, keep])
    text = f'{{"annotations":{space}[{space}{listed}{space}], "images": {json.dumps(head["images"])}, '
    path.write_text(text + f'"categories": {json.dumps(head["categories"])}}}')
    repair(str(path), [read_dataset(path, "train")], tmp_path / "run")
    copy = json.loads((tmp_path / "run" / COPY / "instances.json").read_text())
    assert [item["id"] for item in copy["annotations"]] == [n for n in range(4) if n not in removed] + [9, 10]
    restore(tmp_path / "run")
    assert (tmp_path / "run" / RESTORED / "instances.json").read_text() == path.read_text()


def test_items_of_a_list():
    text = '\ufeff{"info": {"annotations": [1]}, "x" : "]\\"" ,\n"annotations" : [ {"a": [1, 2]} ,\n {}\n, 3 ], "z": 1}'
    assert [text[start:stop] for start, stop in json_items(text, "annotations")] == ['{"a": [1, 2]}', "{}", "3"]
    assert json_items('{"annotations":[]}', "annotations") == []


def test_bad_input_is_one_line(tmp_path, capsys):
    path, _ = dirty_yolo(tmp_path / "set")
    repair(str(path), [read_dataset(path, "train")], tmp_path / "run")
    main([str(tmp_path / "run")])
    assert "files as they were" in capsys.readouterr().out
    (tmp_path / "run" / COPY / "over.txt").write_text(GOOD)
    with pytest.raises(UserError, match="it was edited since"):
        main([str(tmp_path / "run")])
    (tmp_path / "run" / CHANGES).write_text("{}\n")
    with pytest.raises(UserError, match="not a change"):
        main([str(tmp_path / "run")])
    with pytest.raises(UserError, match="no such file"):
        main([str(tmp_path / "nowhere")])
    assert repaired("text", []) == "text"

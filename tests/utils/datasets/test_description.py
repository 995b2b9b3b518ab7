"""What a data file says: splits, names, folders, and what is wrong with them."""

from pathlib import Path

import pytest

from tests.utils.datasets.sets import GOOD, GOOD_BOX, picture, write, yolo_set
from utils.datasets.records import read_dataset
from utils.errors import UserError


@pytest.mark.parametrize(
    "names", ["[cat, dog]", "\n  0: cat\n  1: dog", "\n- cat\n- dog", "my.names"], ids=["list", "map", "block", "file"]
)
def test_yaml_forms_of_names(tmp_path, names):
    write(tmp_path / "my.names", "cat\r\ndog\r\n\r\n")
    data = read_dataset(yolo_set(tmp_path, {"a": GOOD}, f"nc: 2\nnames: {names}\n"))
    assert data.names == ("cat", "dog")
    assert data.records[0].boxes.tolist() == [GOOD_BOX]
    assert data.records[0].area.tolist() == [16 * 24]


@pytest.mark.parametrize("entry", ["images/train", "[images/train]", "list.txt", "images"])
def test_yaml_forms_of_a_split(tmp_path, entry):
    yolo_set(tmp_path, {"a": GOOD, "b": GOOD})
    write(tmp_path / "list.txt", "./images/train/a.jpg  \r\n\r\nimages\\train\\b.jpg\r\n")
    data = read_dataset(write(tmp_path / "x.yaml", f"path: .\ntrain: {entry}\nnames: [cat]\n"))
    assert [Path(record.path).name for record in data.records] == ["a.jpg", "b.jpg"]
    assert data.num_boxes == 2 and data.problems == []


def test_exported_layout_one_folder_up(tmp_path):
    """Roboflow writes ``../train/images`` and no path, beside the folder it means."""
    picture(tmp_path / "valid" / "images" / "a.jpg")
    write(tmp_path / "valid" / "labels" / "a.txt", GOOD)
    yaml = "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\nroboflow:\n  license: MIT\n"
    data = read_dataset(write(tmp_path / "data.yaml", yaml), "val")
    assert data.num_boxes == 1 and data.problems == []


def test_darknet_data_file(tmp_path):
    """Paths start where Darknet was run: above the folder of the .data file. Labels lie beside the pictures."""
    picture(tmp_path / "data" / "obj" / "a.jpg")
    picture(tmp_path / "data" / "obj" / "b.jpg")
    write(tmp_path / "data" / "obj" / "a.txt", GOOD)
    write(tmp_path / "data" / "train.txt", "data/obj/a.jpg\ndata/obj/b.jpg")
    write(tmp_path / "data" / "obj.names", "cat\ndog\n")
    text = "classes= 2\n# comment\ntrain  = data/train.txt\nnames = data/obj.names\nbackup = backup/\n"
    path = write(tmp_path / "data" / "obj.data", text)
    data = read_dataset(path)
    assert data.names == ("cat", "dog")
    assert [len(record.labels) for record in data.records] == [1, 0]
    assert data.num_unlabelled == 1
    with pytest.raises(UserError, match="no 'valid'"):
        read_dataset(path, "val")


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("nc: 2\n", "no 'names:'.*add the line: names:"),
        ("nc: 3\nnames: [cat, dog]\n", r"data\.yaml:2: nc is 3, but there are 2 names"),
        ("names: {0: cat, 2: dog}\n", "ids must run from 0 to 1"),
        ("names: [cat, no]\n", r"data\.yaml:2: names: expected text of one line, found False \(quote it\)"),
        ("names: []\n", "expected a list of class names"),
        ("names: [cat]\nnames: [dog]\n", "given twice"),
        ("names: [cat]\nformat: yollo\n", "no such format: 'yollo'"),
        ("names: [cat]\npath: elsewhere\n", r"data\.yaml:3: no such folder: 'elsewhere'; looked at"),
        ("names: [cat]\ngenerator: squares\n", "no such generator"),
        ("names: [cat]\nx: &a [1]\ny: *a\n", "aliases"),
        ("names: !!python/object/apply:os.system [id]\n", r"data\.yaml:2"),
    ],
)
def test_wrong_yaml_says_where_and_what_to_do(tmp_path, yaml, message):
    with pytest.raises(UserError, match=message) as caught:
        read_dataset(yolo_set(tmp_path, {"a": GOOD}, yaml))
    assert "\n" not in str(caught.value)


def test_download_is_ignored_and_odd_keys_are_reported(tmp_path):
    sentinel = tmp_path / "sentinel"
    yaml = f"names: [cat]\ndownload: touch {sentinel}\nvall: images/val\n"
    data = read_dataset(yolo_set(tmp_path, {"a": GOOD}, yaml))
    assert not sentinel.exists()
    assert [problem.reason for problem in data.problems] == ["key is not used", "'download' is ignored"]
    assert "did you mean 'val'" in data.problems[0].found


def test_missing_splits_folders_and_pictures(tmp_path):
    path = yolo_set(tmp_path, {"a": GOOD})
    with pytest.raises(UserError, match=r"no 'val:' \(there is: train; add 'val: images/val'\)"):
        read_dataset(path, "val")
    wrong = write(tmp_path / "wrong.yaml", "train: pictures\nnames: [cat]\n")
    with pytest.raises(UserError, match=r"wrong\.yaml:1: no such folder") as caught:
        read_dataset(wrong)
    assert str(tmp_path / "pictures") in str(caught.value)
    (tmp_path / "empty").mkdir()
    empty = write(tmp_path / "empty.yaml", "train: empty\nnames: [cat]\n")
    with pytest.raises(UserError, match="no picture found; looked in") as caught:
        read_dataset(empty)
    assert str(tmp_path / "empty") in str(caught.value)
    for nothing in (tmp_path / "empty", tmp_path / "missing.yaml", picture(tmp_path / "x.png")):
        with pytest.raises(UserError, match=r"no data set|no such data set|not a data set"):
            read_dataset(nothing)

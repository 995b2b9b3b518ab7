"""Planted faults are found, sound data passes, and whatever a data set is, the doctor ends with a report."""

import re

import cv2
import numpy as np
import pytest
import torch

from tests.utils.datasets.scenes import save, scene
from tests.utils.datasets.sets import GOOD, picture, tree_hash, write, yolo_set
from utils.datasets.doctor import main
from utils.datasets.doctor_page import _finding, _surroundings
from utils.datasets.findings import Exam, Finding, Place, Shown
from utils.datasets.records import read_dataset
from utils.datasets.second_opinion import second_opinion
from utils.errors import QuarantineError, UserError
from utils.structures import Detections


def sound_set(folder, num=4):
    """Two splits of different scenes, every class learnt often enough."""
    for split, start in (("train", 0), ("val", 100)):
        for number in range(num):
            save(folder / f"images/{split}/{number}.png", scene(start + number))
            rows = "".join(f"{label} 0.{place} 0.{place} 0.1 0.2\n" for label in (0, 1) for place in (2, 4, 6))
            write(folder / f"labels/{split}/{number}.txt", rows.replace("1 0.", "1 0.1"))
    return write(folder / "data.yaml", "train: images/train\nval: images/val\nnames: [cat, dog]\n")


def examined(path, tmp_path, capsys, *flags) -> str:
    """What the doctor said, with its last line where it ends with errors."""
    worst = ""
    try:
        main([str(path), "--project", str(tmp_path / "runs"), *flags])
    except QuarantineError as error:
        worst = f"\n{error}"
    return capsys.readouterr().out + worst


def test_sound_data_passes_and_is_not_touched(tmp_path, capsys):
    path = sound_set(tmp_path / "set")
    before = tree_hash(tmp_path / "set")
    said = examined(path, tmp_path, capsys)
    assert "nothing found" in said and re.search(r"pictures +4 +4\n", said) and re.search(r"  dog +12 +12\n", said)
    page = (tmp_path / "runs/exp/report.html").read_text()
    assert page.startswith("<!doctype html>") and "Nothing found" in page and "http" not in page
    assert tree_hash(tmp_path / "set") == before


def leak(folder):
    save(folder / "images/val/9.jpg", cv2.resize(scene(1), None, fx=0.8, fy=0.8))
    write(folder / "labels/val/9.txt", GOOD)


def copies(folder):
    for name in "xyz":
        save(folder / f"images/train/{name}.png", scene(77), cv2.IMWRITE_PNG_COMPRESSION, ord(name) - ord("x"))
        write(folder / f"labels/train/{name}.txt", GOOD)


def broken(folder):
    file = folder / "images/train/1.png"
    data = bytearray(file.read_bytes())
    data[60:-40] = bytes(len(data) - 100)
    file.write_bytes(bytes(data))


def append(folder, text, name="labels/train/0.txt"):
    with (folder / name).open("a") as file:
        file.write(text)


def misnamed(folder):
    (folder / "images/train/2.png").rename(folder / "images/train/2.jpg")


def exif(folder):
    """A JPEG that says: turn me by a quarter."""
    data = cv2.imencode(".jpg", scene(50))[1].tobytes()
    tag = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    write(folder / "images/train/t.jpg", data[:2] + b"\xff\xe1" + (len(tag) + 2).to_bytes(2, "big") + tag + data[2:])
    write(folder / "labels/train/t.txt", GOOD)


BIRD = "2 0.8 0.2 0.1 0.1\n"
FAULTS = {  # what is done to a sound set -> what must be said
    "leak": (leak, "error   1 x pictures that show the same in two splits"),
    "copies": (copies, "warning 1 x groups of pictures that show the same within a split"),
    "broken": (broken, "error   1 x pictures that do not decode"),
    "misnamed": (misnamed, "note    1 x pictures of another format than their name says"),
    "exif": (exif, "warning 1 x pictures turned upright by their EXIF"),
    "twice": (lambda set: append(set, GOOD + GOOD.replace("0.25", "0.251")), "warning 1 x nearly the same box twice"),
    "two classes": (lambda set: append(set, GOOD + "1" + GOOD[1:]), "warning 1 x two classes in nearly the same box"),
    "tiny": (lambda set: append(set, "0 0.8 0.2 0.005 0.1\n"), "warning 1 x boxes under 4 pixels on the input"),
    "huge": (lambda set: append(set, "0 0.5 0.5 1 0.99\n"), "warning 1 x boxes as large as their picture"),
    "thin": (lambda set: append(set, "0 0.5 0.9 0.9 0.02\n"), "warning 1 x boxes as thin as a line"),
    "bad row": (lambda set: append(set, "0 0.5 0.5 nan 1\n"), "warning 1 x train: not a row of numbers (row dropped)"),
    "double": (lambda set: append(set, GOOD + GOOD), "note    1 x train: the same box twice (counted once)"),
    "no file": (
        lambda set: (set / "labels/val/0.txt").unlink(),
        "warning val: 1 of 4 pictures have no",
    ),
    "no split": (lambda set: append(set, "test: nowhere\n", "data.yaml"), "error   test cannot be read: "),
    "few": (lambda set: append(set, BIRD), "warning 1 x classes with fewer than 10 boxes"),
    "unlearnt": (
        lambda set: append(set, "2 0.8 0.2 0.1 0.1\n", "labels/val/0.txt"),
        "error   1 x classes that are measured",
    ),
    "unused": (lambda set: None, "note    1 x classes without any box"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_found(tmp_path, capsys, fault):
    path = sound_set(tmp_path / "set")
    plant, expected = FAULTS[fault]
    if fault in ("few", "unlearnt", "unused"):
        path.write_text(path.read_text().replace("dog]", "dog, bird]"))
    plant(tmp_path / "set")
    said = examined(path, tmp_path, capsys)
    assert expected in said
    assert ("errors, first" in said) == ("\nerror " in said)
    title = expected.split(" x ")[-1].split(": ")[-1].split(" (")[0]
    assert title.removeprefix("error   ") in (tmp_path / "runs/exp/report.html").read_text()


def test_the_input_decides_what_is_tiny(tmp_path, capsys):
    path = sound_set(tmp_path / "set")
    assert "pixels on the input" not in examined(path, tmp_path, capsys, "--img-size", "416")
    said = examined(path, tmp_path, capsys, "--img-size", "32", "64")
    assert "input of 64x32" in said and "boxes under 4 pixels on the input" in said


def test_half_written_data_ends_with_a_report(tmp_path, capsys):
    """Nothing of it can be used: each split says why, the page is there, the code is 3."""
    write(tmp_path / "set/data.yaml", "train: images\nval: other\nnames: [cat]\n")
    write(tmp_path / "set/images/a.jpg", b"")
    said = examined(tmp_path / "set", tmp_path, capsys, "--fix")
    assert said.count("cannot be read") >= 2 and "2 errors, first" in said and "0 rows repaired" in said
    assert "No split can be read" in (tmp_path / "runs/exp/report.html").read_text()
    assert QuarantineError.exit_code == 3
    with pytest.raises(UserError, match="no such data set"):
        main([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data set"):
        main([str(tmp_path / "empty")])


def test_names_do_not_become_html(tmp_path, capsys):
    path = yolo_set(tmp_path / "<b>set", {"<i>a": GOOD, "b": "x\n"}, "names: ['<u>cat', dog]\n")
    examined(path, tmp_path, capsys)
    page = (tmp_path / "runs/exp/report.html").read_text()
    assert "&lt;u&gt;cat" in page and not re.search("<u>|<i>a|<b>set", page)


def test_fix_writes_a_copy_and_a_list(tmp_path, capsys):
    path = yolo_set(tmp_path / "set", {"a": GOOD + "0 0.9 0.5 0.4 0.2\n", "b": GOOD})
    before = tree_hash(tmp_path / "set")
    assert "1 rows repaired" in examined(path, tmp_path, capsys, "--fix")
    assert tree_hash(tmp_path / "set") == before
    assert (tmp_path / "runs/exp/repaired/b.txt").read_text() == GOOD
    assert len((tmp_path / "runs/exp/changes.jsonl").read_text().splitlines()) == 1


def test_the_leak_of_a_public_data_set(data_dir, tmp_path, capsys):
    """Two frames of one slide stand in BCCD's official training and validation lists."""
    said = examined(data_dir / "bccd", tmp_path, capsys)
    assert "error   1 x pictures that show the same in two splits" in said
    assert "BloodImage_00038.jpg" in said and "BloodImage_00037.jpg, labelled otherwise" in said
    assert said.count("box without width or height (row dropped)") == 2 and "7 x nearly the same box twice" in said


def detections(*rows) -> Detections:
    boxes, scores, labels = zip(*rows) if rows else ((), (), ())
    return Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.int64),
    )


def disagreement(tmp_path, labels, *rows) -> dict[str, list[str]]:
    path = yolo_set(tmp_path, {"a": labels})
    exam = Exam(sets=(read_dataset(path, "train"),), looks={}, size=(64, 64))
    findings = second_opinion(lambda data: [detections(*rows)])(exam)
    return {finding.title.split(",")[0]: [place.text for place in finding.places] for finding in findings}


MISSED, SWAPPED, UNSEEN = (
    "objects found that have no box",
    "objects found with another class",
    "boxes in which nothing was found",
)
THERE = [24.0, 12.0, 40.0, 36.0]  # the box of GOOD


@pytest.mark.parametrize(
    ("labels", "rows", "expected"),
    [
        (GOOD, [(THERE, 0.9, 0)], {}),
        (GOOD, [(THERE, 0.9, 1)], {SWAPPED: ["labelled cat, found dog 0.90"]}),
        (GOOD, [(THERE, 0.4, 1)], {}),
        (GOOD, [], {UNSEEN: ["cat, 16 x 24 pixels"]}),
        (GOOD, [(THERE, 0.06, 0), ([0, 0, 10, 10], 0.8, 1)], {MISSED: ["dog 0.80"]}),
        ("", [([0, 0, 10, 10], 0.7, 1), ([20, 0, 30, 10], 0.8, 0)], {MISSED: ["cat 0.80", "dog 0.70"]}),
        (GOOD, [([30, 12, 46, 36], 0.9, 1)], {}),  # neither the same place nor another one
    ],
)
def test_disagreements_of_a_network(tmp_path, labels, rows, expected):
    assert disagreement(tmp_path, labels, *rows) == expected


def test_regions_to_ignore_contradict_nobody(tmp_path):
    picture(tmp_path / "JPEGImages/a.jpg")
    corners = "<xmin>0</xmin><ymin>0</ymin><xmax>60</xmax><ymax>40</ymax>"
    text = (
        f"<annotation><object><name>cat</name><difficult>1</difficult><bndbox>{corners}</bndbox></object></annotation>"
    )
    write(tmp_path / "Annotations/a.xml", text)
    write(tmp_path / "ImageSets/Main/train.txt", "a\n")
    exam = Exam(sets=(read_dataset(tmp_path, "train"),), looks={}, size=(64, 64))
    assert list(second_opinion(lambda data: [detections(([5, 5, 20, 20], 0.9, 0))])(exam)) == []
    assert list(second_opinion(lambda data: [None])(exam)) == []


def test_page_pictures_are_of_the_boxes_they_are_about():
    boxes = np.array([[10.0, 10, 20, 20], [30, 30, 40, 40]])
    left, top, right, bottom = _surroundings(boxes, (1000, 1000))
    assert (left, top) == (0, 0) and right >= 70 and bottom >= 70
    assert _surroundings(np.array([[990.0, 5, 999, 9]]), (100, 1000))[2] == 1000


def test_cases_that_read_alike_stand_on_the_page_each(tmp_path):
    records = read_dataset(sound_set(tmp_path / "set"), "train").records[:2]
    places = tuple(Place("x.png", "cat", (Shown(record),)) for record in records)
    text = _finding(Finding(severity="warning", title="alike", places=places), 0, ["cat", "dog"])
    assert text.count("<img") == 2 and "<details>" not in text

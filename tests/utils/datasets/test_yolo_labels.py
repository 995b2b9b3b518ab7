"""YOLO label files: harmless variants are read, bad rows cost themselves, what is lost is counted."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.utils.datasets.sets import GOOD, GOOD_BOX, H, W, write, yolo_set
from utils.datasets.formats.rows import Problems
from utils.datasets.formats.yolo import LabelReader, label_paths
from utils.datasets.records import read_dataset
from utils.errors import UserError


def test_label_path_changes_one_component_and_the_suffix():
    def first(path):
        return str(next(label_paths(Path(path))))

    assert first("/a/images/b/images/jpgset/x.jpg.jpg") == "/a/images/b/labels/jpgset/x.jpg.txt"
    assert first("/data/jpgset/x.jpg") == "/data/jpgset/x.txt"
    assert first("/VOC2007/JPEGImages/1.jpg") == "/VOC2007/labels/1.txt"
    assert first("images/x.JPG") == "labels/x.txt"
    assert first("/myimages/images.jpg") == "/myimages/images.txt"


BAD_ROWS = {  # row -> reason
    "0 0.5 0.5 0.25": "wrong number of columns",
    "0 0.5 0.5 0.25 0.5 0.9": "wrong number of columns",
    "0 0.5 0.5 0.25 0.5 0.9 0.8": "wrong number of columns",
    "0 nan 0.5 0.25 0.5": "not a row of numbers",
    "0 0.5 inf 0.25 0.5": "not a row of numbers",
    "0 0.5 1e400 0.25 0.5": "number out of range",
    "0,0.5,0.5,0.25,0.5": "not a row of numbers",
    "0 0,5 0,5 0,25 0,5": "not a row of numbers",
    "class x y w h": "not a row of numbers",
    "0 0.5 0.5 0.2_5 0.5": "not a row of numbers",
    "0 0.5 ٣ 0.25 0.5": "not a row of numbers",
    "0 0.5 0.5 0x1 0.5": "not a row of numbers",
    "-1 0.5 0.5 0.25 0.5": "class id is not a whole number from 0",
    "0.7 0.5 0.5 0.25 0.5": "class id is not a whole number from 0",
    "dog 0.5 0.5 0.25 0.5": "not a row of numbers",
    "0 0.5 0.5 0 0.5": "box without width or height",
    "0 0.5 0.5 0.25 -0.5": "box without width or height",
    "0 0.5 0.5 0.001 0.001": "box smaller than 1 square pixel",
    "0 1.5 0.5 0.2 0.2": "box outside the picture",
    "0 1.09 0.5 0.2 0.2": "less than 10% of the box in the picture",
    "0 " + "1" * 70000: "line too long",
    "0 " + "1" * 60000 + "x": "not a row of numbers",  # in linear time
}


@pytest.mark.parametrize("row", BAD_ROWS, ids=lambda row: row[:24])
def test_a_bad_row_costs_itself_and_is_counted_with_its_line(tmp_path, row):
    path = yolo_set(tmp_path, {"a": f"# header\n\n1 0.25 0.25 0.25 0.25\n{row}\n{GOOD}", "b": GOOD})
    data = read_dataset(path)
    assert data.records[0].labels.tolist() == [1, 0]
    (problem,) = data.problems
    assert problem.where.endswith(f"{os.sep}a.txt:4") and problem.reason == BAD_ROWS[row]
    assert f"1 x {problem.reason} (row dropped)" in data.summary() and "a.txt:4" in data.summary()


@pytest.mark.parametrize("row", ["0 0.5 0.5 0.25", "0 nan 0.5 0.25 0.5", "0 0.5 0.5 0 0.5"])
def test_an_annotated_picture_never_becomes_background(tmp_path, row):
    data = read_dataset(yolo_set(tmp_path, {"a": row, "b": GOOD}))
    assert [Path(record.path).name for record in data.records] == ["b.jpg"]
    assert [problem.action for problem in data.problems] == ["row dropped", "picture quarantined"]


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode(),
        b"\r" + GOOD.replace("\n", "\r").encode(),
        GOOD.strip().encode(),
        b"\n\n  " + GOOD.encode() + b"\n# end\n",
        b"0\t0.5  0.5\t.25 5e-1 # cat\n",
        b"0.0 0.5 0.5 0.25 0.5\n",
    ],
    ids=["bom", "crlf", "cr", "no newline", "blank", "tabs", "float class"],
)
def test_harmless_variants_are_read(tmp_path, text):
    data = read_dataset(yolo_set(tmp_path, {"a": text}))
    assert data.records[0].boxes.tolist() == [GOOD_BOX] and data.problems == []


@pytest.mark.parametrize(
    "text", [GOOD.encode("utf-16"), GOOD.encode("utf-16-le"), b"\0\1\2", b"0 .5 .5 .2 .2 \xff\n"], ids=repr
)
def test_label_files_that_are_no_text_quarantine_their_picture(tmp_path, text):
    data = read_dataset(yolo_set(tmp_path, {"a": text, "b": GOOD}))
    assert len(data.records) == 1
    assert [problem.action for problem in data.problems] == ["picture quarantined"]


def test_any_bytes_give_rows_or_counted_problems():
    """Rows that are read and rows that are counted are together the lines that hold anything."""
    rng = np.random.default_rng(0)
    pieces = [
        "0",
        "1",
        "0.5",
        "-.2",
        "1e-3",
        "nan",
        ",",
        "#",
        "\n",
        "\n",
        "\r",
        " ",
        "\t",
        "\x0b",
        "1e999",
        "x",
        "\u0663",
    ]
    for _ in range(2000):
        text = " ".join(rng.choice(pieces, rng.integers(1, 40))).replace("\r", "\n")
        problems = Problems()
        rows, num_bad = LabelReader(("cat",), problems).rows(text, (H, W), Path("x.txt"))
        lines = [line.partition("#")[0].strip() for line in text.split("\n")]
        assert len(rows) + num_bad == sum(map(bool, lines))
        assert len(problems.entries) == num_bad
        for row in rows:
            assert row.label >= 0 and np.isfinite(row.box).all()


def test_polygons_become_their_boxes(tmp_path):
    data = read_dataset(yolo_set(tmp_path, {"a": "1 0.25 0.5 0.75 0.5 0.5 0.75\n1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n"}))
    np.testing.assert_allclose(data.records[0].boxes, [[16, 24, 48, 36], [6.4, 4.8, 32, 24]], atol=1e-4)
    assert data.problems == []


def test_boxes_over_the_border(tmp_path):
    rows = {
        "a": "0 0.9 0.5 0.4 0.5\n" + GOOD,  # 0.7 to 1.1: three quarters remain
        "b": "0 0.5 0.5 1.0005 0.5\n",  # rounding
        "c": "0 0.5 0.5 1.000001 0.5\n",  # the last digit
    }
    path = yolo_set(tmp_path, rows)
    clip = read_dataset(path)
    np.testing.assert_allclose(clip.records[0].boxes, [[44.8, 12, 64, 36], GOOD_BOX], rtol=1e-6)
    np.testing.assert_allclose(clip.records[1].boxes, [[0, 12, 64, 36]])
    np.testing.assert_allclose(clip.records[2].boxes, [[0, 12, 64, 36]])
    assert [(Path(problem.path).stem, problem.action) for problem in clip.problems] == [
        ("a", "clipped"),
        ("b", "clipped"),
    ]


def test_duplicates_are_removed_and_counted(tmp_path):
    data = read_dataset(yolo_set(tmp_path, {"a": GOOD * 3 + GOOD.replace("0 ", "1 ", 1)}))
    assert data.records[0].labels.tolist() == [0, 1]
    assert [problem.reason for problem in data.problems] == ["the same box twice"] * 2


def test_too_many_boxes_are_a_broken_file(tmp_path):
    rows = "".join(f"0 0.5 0.5 0.{1000 + i} 0.5\n" for i in range(8990)) + "".join(
        f"1 0.5 0.5 0.{1000 + i} 0.5\n" for i in range(8990)
    )
    data = read_dataset(yolo_set(tmp_path, {"a": rows, "b": GOOD}))
    assert len(data.records) == 1 and "more than 10000 rows" in data.problems[0].reason


def test_background_missing_and_empty_are_counted_apart(tmp_path):
    data = read_dataset(yolo_set(tmp_path, {"a": GOOD, "b": "", "c": "\n", "d": None}))
    assert len(data.records) == 4 and data.num_unlabelled == 1
    assert "backgrounds        3  (1 of them without an annotation file)" in data.summary()
    with pytest.raises(UserError, match="none of 2 pictures has a label file") as caught:
        read_dataset(yolo_set(tmp_path / "none", {"a": None, "b": None}))
    assert str(tmp_path / "none" / "labels" / "train" / "a.txt") in str(caught.value)


def test_strays_and_doubles_are_reported(tmp_path):
    path = yolo_set(tmp_path, {"a": GOOD})
    write(tmp_path / "labels" / "train" / "lost.txt", GOOD)
    write(tmp_path / "labels" / "train" / "classes.txt", "cat")
    (problem,) = read_dataset(path).problems
    assert problem.reason == "label files without a picture" and "lost.txt" in problem.found
    twice = write(tmp_path / "twice.yaml", "train: [images/train, images]\nnames: [cat]\n")
    assert "pictures named more than once" in [problem.reason for problem in read_dataset(twice).problems]


def test_class_without_a_name(tmp_path):
    data = read_dataset(yolo_set(tmp_path, {"a": GOOD, "b": GOOD + "7 0.5 0.5 0.2 0.2\n"}))
    (problem,) = data.problems
    assert str(problem).endswith("b.txt:2: class id has no name: class 7, but there are 2 names, from 0 (row dropped)")
    assert len(data.records[1].labels) == 1
    with pytest.raises(UserError, match="are the ids 1-based"):
        read_dataset(yolo_set(tmp_path / "shifted", {"a": "1 0.5 0.5 0.2 0.2\n", "b": "2 0.5 0.5 0.2 0.2\n"}))


def test_labels_in_pixels(tmp_path):
    with pytest.raises(UserError, match=r"a\.txt:1: 2 of 3 rows.*look like pixels"):
        read_dataset(yolo_set(tmp_path, {"a": "0 30 20 10 10\n0 31 21 10 10\n" + GOOD}))

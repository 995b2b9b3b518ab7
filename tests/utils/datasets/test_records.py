"""Every layout gives the same records, and every irregularity is counted with its place; nothing is lost in silence."""

import hashlib
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.datasets.formats.rows import Problems
from utils.datasets.formats.yolo import LabelReader, label_paths
from utils.datasets.records import FORMATS, read_dataset
from utils.errors import QuarantineError, UserError

H, W = 48, 64
GOOD = "0 0.5 0.5 0.25 0.5\n"  # the box 24 12 40 36
GOOD_BOX = [24, 12, 40, 36]


def picture(path: Path, size=(H, W)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.full((*size, 3), 90, np.uint8))[1].tobytes())
    return path


def yolo_set(folder: Path, labels: dict[str, str | bytes | None], yaml: str = "names: [cat, dog]\n") -> Path:
    """A data set with one picture per label text; the names of pictures end in .jpg although they are PNG."""
    for name, text in labels.items():
        picture(folder / "images" / "train" / f"{name}.jpg")
        if text is not None:
            file = folder / "labels" / "train" / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
    path = folder / "data.yaml"
    path.write_text("train: images/train\n" + yaml)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        digest.update(str(file).encode() + (file.read_bytes() if file.is_file() else b""))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- real data sets


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


# -------------------------------------------------------------------------------------------------------------- layouts


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


def test_label_path_changes_one_component_and_the_suffix():
    def first(path):
        return str(next(label_paths(Path(path))))

    assert first("/a/images/b/images/jpgset/x.jpg.jpg") == "/a/images/b/labels/jpgset/x.jpg.txt"
    assert first("/data/jpgset/x.jpg") == "/data/jpgset/x.txt"
    assert first("/VOC2007/JPEGImages/1.jpg") == "/VOC2007/labels/1.txt"
    assert first("images/x.JPG") == "labels/x.txt"
    assert first("/myimages/images.jpg") == "/myimages/images.txt"


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


def voc_set(folder: Path, annotations: dict[str, str], head: str = "") -> None:
    size = f"<size><width>{W}</width><height>{H}</height></size>"
    for name, objects in annotations.items():
        picture(folder / "JPEGImages" / f"{name}.jpg")
        write(folder / "Annotations" / f"{name}.xml", f"{head}<annotation>\n{size}{objects}\n</annotation>")
    write(folder / "ImageSets" / "Main" / "train.txt", "\n".join(annotations))


# ------------------------------------------------------------------------------------------------------------- bad rows

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
    with pytest.raises(UserError, match=r"a\.txt:4: "):
        read_dataset(path, policy="fatal")


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
    drop = read_dataset(path, policy="drop")
    assert [len(record.labels) for record in drop.records] == [1, 1, 1]
    with pytest.raises(UserError, match=r"a\.txt:1: box over the border"):
        read_dataset(path, policy="fatal")


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


# ---------------------------------------------------------------------------------------------- wrong as a whole


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
    with pytest.raises(UserError, match="did you mean 'clip'"):
        read_dataset(path, policy="clp")


# ----------------------------------------------------------------------------------------------------------- COCO, VOC


def coco_set(folder: Path, annotations: list[dict], images: list[dict] | None = None) -> Path:
    for name in ("a.jpg", "b.jpg"):
        picture(folder / "images" / name)
    plain = [{"id": 7, "file_name": "a.jpg", "height": H, "width": W}, {"id": "b", "file_name": "b.jpg"}]
    categories = [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}]
    data = {"images": plain if images is None else images, "annotations": annotations, "categories": categories}
    return write(folder / "instances.json", json.dumps(data))


GOOD_ANNOTATION = {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 150.5}


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


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 9999, '{"images": [], "annotations": []}', '{"images": [1]}', "\0"]
)
def test_json_that_is_not_coco(tmp_path, text):
    with pytest.raises(UserError, match=r"c\.json"):
        read_dataset(write(tmp_path / "c.json", text))


OBJECT = "<object><name>cat</name><bndbox><xmin>{}</xmin><ymin>5</ymin><xmax>{}</xmax><ymax>20</ymax></bndbox></object>"


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


def test_formats_are_a_table():
    assert set(FORMATS) == {"yolo", "darknet", "coco", "voc"}

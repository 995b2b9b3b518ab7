"""Rows L1 to L18: what stands in a label file. A bad row costs itself, its place is told, and an annotated picture
never becomes background.
"""

import random

import numpy as np
import pytest
from harness import refused

from tests.utils.datasets.painted import paint_records
from tests.utils.datasets.sets import GOOD, GOOD_BOX, write, yolo_set
from tests.utils.tiny import CFG, write_pictures
from utils.datasets.augment import Augment
from utils.datasets.dataset import DetectionDataset
from utils.datasets.limits import Limits
from utils.datasets.loader import Draw
from utils.datasets.quarantine import refuse_bad
from utils.datasets.records import read_dataset
from utils.datasets.splits import read_splits
from utils.errors import QuarantineError

ROWS = {  # id -> (row, reason, what is told of it)
    "L1-class-beyond": ("7 0.5 0.5 0.2 0.2", "class id has no name", "class 7, but there are 2 names"),
    "L2-negative": ("-1 0.5 0.5 0.2 0.2", "class id is not a whole number", "-1"),
    "L2-fraction": ("0.7 0.5 0.5 0.2 0.2", "class id is not a whole number", "0.7"),
    "L2-word": ("dog 0.5 0.5 0.2 0.2", "not a row of numbers", "'dog 0.5"),
    "L2-huge": ("1e30 0.5 0.5 0.2 0.2", "number out of range", "1e30"),
    "L3-negative-size": ("0 0.5 0.5 -0.2 0.2", "box without width or height", ""),
    "L3-outside": ("0 1.5 0.5 0.2 0.2", "box outside the picture", "in 64 x 48"),
    "L3-outside-left": ("0 -0.5 0.5 0.2 0.2", "box outside the picture", "in 64 x 48"),
    "L3-inf": ("0 inf 0.5 0.2 0.2", "not a row of numbers", "not a finite number"),
    "L3-nan": ("0 0.5 NaN 0.2 0.2", "not a row of numbers", "not a finite number"),
    "L3-overflow": ("0 1e400 0.5 0.2 0.2", "number out of range", ""),
    "L6-zero-width": ("0 0.5 0.5 0 0.5", "box without width or height", ""),
    "L6-zero-height": ("0 0.5 0.5 0.5 0", "box without width or height", ""),
    "L6-half-a-pixel": ("0 0.5 0.5 0.01 0.01", "box smaller than 1 square pixel", ""),
    "L6-mostly-outside": ("0 1.09 0.5 0.2 0.2", "less than 10% of the box in the picture", ""),
    "L8-four": ("0 0.5 0.5 0.2", "wrong number of columns", "4, expected"),
    "L8-six": ("0 0.5 0.5 0.2 0.2 0.9", "wrong number of columns", "confidence?"),
    "L8-seven-among-boxes": ("0 .1 .1 .5 .1 .5 .5", "wrong number of columns", "7 among boxes"),
    "L8-odd-polygon": ("0 .1 .1 .5 .1 .5 .5 .1", "wrong number of columns", "8, expected"),
    "L9-commas": ("0,0.5,0.5,0.2,0.2", "not a row of numbers", "separate by spaces"),
    "L9-decimal-comma": ("0 0,5 0,5 0,2 0,2", "not a row of numbers", "with a decimal point"),
    "L11-header": ("class x y w h", "not a row of numbers", "'class x y w h'"),
    "L12-arabic": ("0 0.5 ٣ 0.2 0.2", "not a row of numbers", "٣"),
    "L12-underscore": ("0 0.5_0 0.5 0.2 0.2", "not a row of numbers", "0.5_0"),
    "L12-hex": ("0 0x1 0.5 0.2 0.2", "not a row of numbers", "0x1"),
    "L15-long-line": ("0 " + "0.5 " * 200_000, "line too long", "characters"),
    "L15-digits": ("0 0.5 0.5 0.2 0." + "1" * 1_000_000, "line too long", "characters"),
}


@pytest.mark.parametrize("row, reason, told", [pytest.param(*values, id=row) for row, values in ROWS.items()])
def test_a_bad_row_costs_itself(tmp_path, seen, row, reason, told):
    data = read_dataset(yolo_set(tmp_path, {"a": f"{GOOD}{row}\n1 0.2 0.2 0.2 0.2\n", "b": GOOD}))
    assert data.records[0].labels.tolist() == [0, 1] and len(data.records) == 2
    (problem,) = data.problems
    assert problem.where.endswith("a.txt:2") and problem.action == "row dropped"
    assert problem.reason.startswith(reason) and told in problem.found
    seen(f"{problem.reason} ({problem.action}), with a.txt:2")


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name) for name, (row, _, _) in ROWS.items() if name != "L8-seven-among-boxes"]
)
def test_a_picture_of_bad_rows_only_is_set_aside(tmp_path, row):
    data = read_dataset(yolo_set(tmp_path, {"a": row, "b": GOOD}))
    assert [record.path[-5:] for record in data.records] == ["b.jpg"]
    assert [problem.action for problem in data.problems] == ["row dropped", "picture quarantined"]


def test_l1_ids_from_one_are_an_error(tmp_path, seen):
    path = yolo_set(tmp_path, {"a": "1 .5 .5 .2 .2\n", "b": "1 .5 .5 .2 .2\n2 .5 .5 .2 .2\n"})
    seen(refused(lambda: read_dataset(path), where=str(tmp_path / "labels/train/b.txt:2"), says="1-based?"))


@pytest.mark.parametrize("edge", [pytest.param(0.0005, id="L3-within-a-thousandth"), pytest.param(0.00001, id="L4")])
def test_rounding_is_cut_back_and_counted(tmp_path, seen, edge):
    data = read_dataset(yolo_set(tmp_path, {"a": f"0 {0.75 + edge} 0.5 0.5 0.5\n"}))
    np.testing.assert_allclose(data.records[0].boxes, [[32 + 64 * edge, 12, 64, 36]], atol=1e-4)
    (problem,) = data.problems
    assert (problem.reason, problem.action) == ("box over the border by rounding", "clipped")
    seen(str(problem.reason))


def test_l5_pixels_are_an_error(tmp_path, seen):
    path = yolo_set(tmp_path, {"a": "0 80 60 32 24\n" * 1 + "0 81 61 32 24\n" + GOOD})
    seen(refused(lambda: read_dataset(path), where=str(tmp_path / "labels/train/a.txt:1"), says="look like pixels"))


def test_l6_a_tenth_of_the_box_is_enough(tmp_path):
    data = read_dataset(yolo_set(tmp_path, {"a": "0 1.07 0.5 0.2 0.5\n"}))  # 0.97 .. 1.17: 15 % remain
    np.testing.assert_allclose(data.records[0].boxes, [[0.97 * 64, 12, 64, 36]], rtol=1e-5)
    assert [problem.action for problem in data.problems] == ["clipped"]


@pytest.mark.parametrize("times", [pytest.param(2, id="L7-twice"), pytest.param(9000, id="L7-thousands")])
def test_double_rows_count_once(tmp_path, times):
    data = read_dataset(yolo_set(tmp_path, {"a": GOOD * times}))
    assert data.records[0].boxes.tolist() == [GOOD_BOX]
    assert [problem.reason for problem in data.problems] == ["the same box twice"] * (times - 1)
    assert refuse_bad(data, max_bad=0) is None, "nothing was lost"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(GOOD * 100_000, id="L7-the-same-100000-times"),
        pytest.param("".join(f"0 0.5 0.5 0.2 0.{n}\n" for n in range(20_000, 31_000)), id="L7-11000-boxes"),
    ],
)
def test_more_than_ten_thousand_rows_are_a_broken_file(tmp_path, seen, text):
    data = read_dataset(yolo_set(tmp_path, {"a": text, "b": GOOD}))
    (problem,) = data.problems
    assert len(data.records) == 1 and problem.action == "picture quarantined"
    seen(problem.reason)


def test_l8_polygons_become_boxes(tmp_path):
    data = read_dataset(yolo_set(tmp_path, {"a": "1 .25 .5 .75 .5 .5 .75\n0 .1 .1 .5 .1 .5 .5 .1 .5\n"}))
    np.testing.assert_allclose(data.records[0].boxes, [[16, 24, 48, 36], [6.4, 4.8, 32, 24]], atol=1e-4)
    assert data.problems == []


GOOD_FILES = {
    "L10-bom": b"\xef\xbb\xbf" + GOOD.encode(),
    "L10-cr": GOOD.replace("\n", "\r").encode(),
    "L10-crlf": GOOD.replace("\n", "\r\n").encode(),
    "L11-blank": b"\n\n" + GOOD.encode() + b"   \n\n",
    "L11-comment": b"# cat\n" + GOOD.encode() + b" # end",
}


@pytest.mark.parametrize("data", [pytest.param(text, id=row) for row, text in GOOD_FILES.items()])
def test_harmless_files_are_read(tmp_path, data):
    read = read_dataset(yolo_set(tmp_path, {"a": data}))
    assert read.records[0].boxes.tolist() == [GOOD_BOX] and read.problems == []


BAD_FILES = {
    "L10-utf16": (GOOD.encode("utf-16"), "UTF-16"),
    "L10-utf16-without-mark": (GOOD.encode("utf-16-le"), "NUL"),
    "L10-latin1": (b"0 .5 .5 .2 .2 # \xe9\n", "not UTF-8"),
    "L10-nul": (b"0 .5 .5 .2 .2\0\n", "NUL"),
    "L10-binary": (random.Random(0).randbytes(500), "not"),
}


@pytest.mark.parametrize("text, says", [pytest.param(*values, id=row) for row, values in BAD_FILES.items()])
def test_files_that_are_no_text_quarantine_their_picture(tmp_path, seen, text, says):
    data = read_dataset(yolo_set(tmp_path, {"a": text, "b": GOOD}))
    (problem,) = data.problems
    assert len(data.records) == 1 and problem.action == "picture quarantined" and says in problem.found
    seen(f"{problem.reason}: {problem.found}")


def test_l12_only_what_the_grammar_says_is_a_number(tmp_path):
    """Of what float() takes: ASCII, without underscores, not inf or nan."""
    rng, pieces = random.Random(0), ["0", "1", ".", "e", "-", "+", "_", "٣", "x", "inf", "nan", "5", "E", "٫"]
    words = {"".join(rng.choices(pieces, k=rng.randrange(1, 6))) for _ in range(3000)}
    path = yolo_set(tmp_path, {"a": "".join(f"0 0.5 0.5 0.5 {word}\n" for word in sorted(words))})
    data = read_dataset(path)
    dropped = {int(problem.where.rsplit(":", 1)[1]) for problem in data.problems if problem.reason.startswith("not a")}
    for number, word in enumerate(sorted(words), 1):
        plain = word.isascii() and "_" not in word and word.lstrip("+-") not in ("inf", "nan") and is_float(word)
        assert (number not in dropped) == plain, word


def is_float(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "missing, warned", [pytest.param(1, False, id="L13-some"), pytest.param(3, True, id="L13-most")]
)
def test_missing_and_empty_are_counted_apart(tmp_path, seen, missing, warned):
    labels = {"a": GOOD, "b": ""} | {f"m{number}": None for number in range(missing)}
    data = read_dataset(yolo_set(tmp_path, labels))
    assert (len(data.records), data.num_unlabelled) == (2 + missing, missing)
    assert f"({missing} of them without an annotation file)" in data.summary()
    assert ("more than half of the pictures have no annotation file" in data.summary()) == warned
    seen(data.summary().splitlines()[2].strip())


def test_l13_no_label_file_at_all(tmp_path, seen):
    path = yolo_set(tmp_path, {"a": None, "b": None})
    seen(refused(lambda: read_dataset(path), where=f"{path}:1", says="none of 2 pictures has a label file"))


def test_l13_a_label_that_cannot_be_opened_is_not_missing(tmp_path):
    path = yolo_set(tmp_path, {"a": GOOD, "b": None, "c": None, "d": None})
    folder = tmp_path / "labels" / "train"
    (folder / "b.txt").symlink_to("nowhere")
    (folder / "c.txt").symlink_to("c.txt")
    (folder / "d.txt").mkdir()
    data = read_dataset(path)
    assert len(data.records) == 1 and data.num_unlabelled == 0
    assert [problem.action for problem in data.problems] == ["picture quarantined"] * 3


def test_l14_labels_without_a_picture_are_counted(tmp_path, seen):
    path = yolo_set(tmp_path, {"a": GOOD})
    for name in ("lost", "gone"):
        (tmp_path / "labels" / "train" / f"{name}.txt").write_text(GOOD)
    (problem,) = read_dataset(path).problems
    assert problem.action == "kept" and problem.found == "2, such as gone.txt"
    seen(f"{problem.reason}: {problem.found}")


def test_l16_the_fingerprint_sees_every_edit_and_no_move(tmp_path):
    labels = {"a": GOOD, "b": "1 .5 .5 .2 .2\n", "c": ""}
    first = read_dataset(yolo_set(tmp_path / "1", labels)).fingerprint()
    assert read_dataset(yolo_set(tmp_path / "2", labels)).fingerprint() == first
    changes = [
        {"b": "0 .5 .5 .2 .2\n"},
        {"b": "1 .5 .5 .2 .21\n"},
        {"b": ""},
        {"c": GOOD},
        {"d": ""},
    ]
    prints = {first}
    for number, change in enumerate(changes):
        prints.add(read_dataset(yolo_set(tmp_path / f"changed{number}", {**labels, **change})).fingerprint())
    prints.add(read_dataset(yolo_set(tmp_path / "names", labels, "names: [dog, cat]\n")).fingerprint())
    assert len(prints) == len(changes) + 2


def test_l17_classes_without_a_box_are_listed(tmp_path, seen):
    text = read_dataset(yolo_set(tmp_path, {"a": GOOD}, "names: [cat, dog, bird]\n")).summary()
    assert "2 x class without a box: dog, bird" in text
    seen("2 x class without a box: dog, bird")


# ---------------------------------------------------------------------------------------------- how much may be bad


def test_i16_too_many_bad_rows_stop_the_run(tmp_path, seen):
    labels = {f"p{number}": GOOD for number in range(10)} | {"bad": GOOD + "9 .5 .5 .2 .2\n"}
    path = yolo_set(tmp_path, labels, "val: images/train\nnames: [cat, dog]\n")
    with pytest.raises(QuarantineError) as caught:
        read_splits(path)
    assert caught.value.exit_code == 3 and "1 of 12 rows are bad (8.33%, allowed 1.00%)" in str(caught.value)
    assert "--max-bad 0.09" in caught.value.hint
    assert len(read_splits(path, limits=Limits(max_bad=0.09)).train) == 11
    seen(str(caught.value).replace(str(tmp_path), ""))


# ---------------------------------------------------------------------------------------------- after augmentation

EVERYTHING = Augment(
    hsv_h=0.1, hsv_s=0.5, hsv_v=0.4, degrees=45, translate=0.5, scale=0.9, shear=10, perspective=0.001,
    fliplr=0.5, flipud=0.5, mosaic=0.7, mixup=0.4,
)  # fmt: skip


def test_l18_boxes_stay_boxes(tmp_path):
    """Inside, with a width and a height, finite, of a class that there is; at extreme strengths."""
    dataset = DetectionDataset(paint_records(tmp_path, 12), augment=EVERYTHING, seed=3)
    num = 0
    for position in range(150):
        height, width = size = [(64, 64), (96, 64), (32, 160)][position % 3]
        sample = dataset[Draw(0, position, position % 12, size, tuple(range(12)))]
        boxes = sample.boxes
        num += len(boxes)
        assert sample.image.shape[:2] == size and np.isfinite(boxes).all()
        assert (boxes >= 0).all() and (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert set(sample.labels.tolist()) <= {0, 1} and len(sample.labels) == len(sample.ignore) == len(boxes)
    assert num > 100


# ------------------------------------------------------------------------------------------------------ a whole command


def test_l16_a_run_does_not_go_on_with_other_labels(tmp_path, server, seen):
    data, cfg = write_pictures(tmp_path / "data"), write(tmp_path / "tiny.cfg", CFG)
    flags = ["--project", tmp_path / "runs", "--workers", 0, "--device", "cpu"]
    done = server.run("train.py", "--data", data, "--cfg", cfg, "--epochs", 1, *flags)
    assert done.code == 0, done.err
    label = tmp_path / "data" / "labels" / "train" / "2.txt"
    label.write_text("\n".join(label.read_text().splitlines()[:1]) + "\n")
    run = tmp_path / "runs" / "exp"
    before = (run / "results.csv").read_bytes()
    done = server.run("train.py", "--resume", run, "--epochs", 2)
    assert done.code == 2 and "--allow-data-change" in done.error_line()
    assert (run / "results.csv").read_bytes() == before
    seen(f"exit 2: {done.error_line()}".replace(str(tmp_path), ""))
    done = server.run("train.py", "--resume", run, "--epochs", 2, "--allow-data-change")
    assert done.code == 0, done.err

"""What is written in any format reads back as the same records; what a format cannot hold is counted."""

import json

import numpy as np
import pytest

from tests.utils.datasets.sets import GOOD, coco_set, picture, tree_hash, voc_set, write, yolo_set
from utils.datasets.convert import convert, main
from utils.datasets.formats.description import known_splits
from utils.datasets.formats.writers import Placed, Split
from utils.datasets.limits import LIMITS
from utils.datasets.records import FORMATS, read_dataset
from utils.errors import QuarantineError, ResourceError, UserError
from utils.outlines import fill
from utils.structures import Outlines, Record

NAMES = ("cat", "dog & <co>", "no", "ähre", "7")
PLAIN = {"pictures": "copy", "masks": False, "limits": LIMITS}


def random_records(folder, *, num=40, masks=False) -> list[Record]:
    rng = np.random.default_rng(3)
    records = []
    for number in range(num):
        size = tuple(rng.integers(20, 1000, 2).tolist())
        path = picture(folder / f"{number:02d}.png", size)
        corners = np.sort(rng.uniform(-0.05, 1.05, (7, 2, 2)).clip(0, 1), axis=1).reshape(7, 4)
        boxes = (corners * np.array(size[::-1] * 2)).astype(np.float32)
        sides = boxes[:, 2:] - boxes[:, :2]
        boxes = boxes[(sides > 1).all(1)]
        outlines = None
        if masks:
            rings = [_rings(box, rng) for box in boxes]
            outlines = Outlines.of(rings)
            every = [np.concatenate(mine).astype(np.float32) for mine in rings]
            boxes = np.array([np.append(one.min(0), one.max(0)) for one in every], np.float32).reshape(-1, 4)
        count = len(boxes)
        records.append(
            Record(
                path=str(path),
                size=size,
                boxes=boxes,
                labels=rng.integers(0, len(NAMES), count),
                ignore=np.zeros(count, bool),
                crowd=np.zeros(count, bool),
                area=(boxes[:, 2:] - boxes[:, :2]).prod(1),
                outlines=outlines,
            )
        )
    return records


def _rings(box, rng):
    """Two triangles that do not meet, left and right in a box."""
    x1, y1, x2, y2 = box
    left, right = x1 + 0.4 * (x2 - x1), x1 + 0.6 * (x2 - x1)
    return [
        np.array([[x1, y1], [left, y1], [left, y2]]),
        np.array([[right, y1], [x2, rng.uniform(y1, y2)], [right, y2]]),
    ]


def written(folder, records, format, **options):
    """The records as they read back, by name."""
    placed = [Placed(record.path.rsplit("/", 1)[1], record) for record in records]
    writer = FORMATS[format].writer
    for name, record in placed:
        picture(folder / writer.pictures.format(split="train") / name, record.size)
    writer.write(folder, Split("train", placed, NAMES, tuple(range(3, 3 + len(NAMES)))))
    writer.describe(folder, ["train"], NAMES)
    again = read_dataset(folder / writer.description, "train", **options)
    assert again.names == NAMES and [p for p in again.problems if p.action != "kept"] == []
    return sorted(again.records, key=lambda record: record.path)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_reads_back_to_the_last_bit(tmp_path, format):
    records = random_records(tmp_path / "from")
    for before, after in zip(records, written(tmp_path / "to", records, format), strict=True):
        assert before.size == after.size
        np.testing.assert_array_equal(before.boxes, after.boxes)
        np.testing.assert_array_equal(before.labels, after.labels)


@pytest.mark.parametrize("format", ["yolo", "coco"])
def test_outlines_of_several_parts_cover_the_same_pixels(tmp_path, format):
    records = random_records(tmp_path / "from", num=12, masks=True)
    for before, after in zip(records, written(tmp_path / "to", records, format, masks=True), strict=True):
        np.testing.assert_array_equal(before.boxes, after.boxes)
        assert all(map(np.array_equal, fill(before.outlines, before.size), fill(after.outlines, before.size)))


def test_numbers_come_out_as_they_went_in(tmp_path):
    """Six decimals, whole VOC corners, COCO's two decimals and its own ids."""
    yolo_set(tmp_path / "yolo", {"a": "0 0.123457 0.500001 0.246913 0.333333\n", "b": GOOD})
    convert(str(tmp_path / "yolo"), tmp_path / "y", "yolo", **PLAIN)
    assert (tmp_path / "y/labels/train/a.txt").read_text() == "0 0.123457 0.500001 0.246913 0.333333\n"
    box = [1.37, 2.08, 10.11, 20.93]
    annotation = {"id": 1, "image_id": 7, "category_id": 90, "bbox": box, "area": 150.5, "iscrowd": 0}
    coco_set(tmp_path / "coco", [annotation], [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}])
    (line,) = convert(str(tmp_path / "coco/instances.json"), tmp_path / "c", "coco", **PLAIN)
    assert line.endswith("nothing lost")
    data = json.loads((tmp_path / "c/annotations/instances_train.json").read_text())
    assert data["annotations"] == [annotation]
    assert [(c["id"], c["name"]) for c in data["categories"]] == [(3, "cat"), (90, "dog")]
    voc_set(tmp_path / "voc", {"a": OBJECT_OF.format(difficult=1), "b": OBJECT_OF.format(difficult=0)})
    (line,) = convert(str(tmp_path / "voc"), tmp_path / "v", "voc", **PLAIN)
    assert line.endswith("nothing lost") and "<xmin>3</xmin>" in (tmp_path / "v/Annotations/a.xml").read_text()


OBJECT_OF = (
    "<object><name>cat</name><difficult>{difficult}</difficult>"
    "<bndbox><xmin>3</xmin><ymin>5</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>"
)


def test_what_a_format_cannot_hold_is_counted(tmp_path):
    crowd = {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 30, 30], "iscrowd": 1, "area": 900}
    plain = {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 150.5}
    coco_set(tmp_path / "coco", [plain, crowd], [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}])
    lost = {}
    for format in FORMATS:
        (lost[format],) = convert(str(tmp_path / "coco/instances.json"), tmp_path / "to" / format, format, **PLAIN)
    assert lost["coco"].endswith("nothing lost")
    assert lost["yolo"].endswith("not kept: 1 crowd regions, 1 mask areas, 2 picture ids") and "1 boxes" in lost["yolo"]
    assert lost["voc"].endswith("not kept: 1 crowd regions, 1 mask areas, 2 picture ids") and "2 boxes" in lost["voc"]
    again = read_dataset(tmp_path / "to/voc", "train")
    assert again.records[0].ignore.tolist() == [False, True]


def test_a_tour_of_all_formats_ends_where_it_began(data_dir, tmp_path):
    source = str(data_dir / "bccd")
    for format in ("darknet", "coco", "voc"):
        options = PLAIN | {"pictures": "link", "limits": LIMITS._replace(max_bad=0.02)}
        lines = convert(source, tmp_path / format, format, **options)
        assert len(lines) == 3
        source = str(tmp_path / format / FORMATS[format].writer.description)
    for split in ("train", "val", "test"):
        sets = [read_dataset(path, split) for path in (data_dir / "bccd", source)]
        by_name = [{record.path.rsplit("/", 1)[1]: record for record in data.records} for data in sets]
        assert by_name[0].keys() == by_name[1].keys()
        for name, record in by_name[0].items():
            rows = [sorted(zip(r.labels.tolist(), r.boxes.tolist())) for r in (record, by_name[1][name])]
            assert rows[0] == rows[1]


def test_pictures_of_one_name_and_split_stay_apart_and_the_source_is_not_touched(tmp_path):
    for folder in ("a", "b"):
        picture(tmp_path / "s" / folder / "images/x.png")
        write(tmp_path / "s" / folder / "labels/x.txt", GOOD if folder == "a" else "")
    write(tmp_path / "s/data.yaml", "train: [a/images, b/images]\nval: a/images\nnames: [cat]\n")
    before = tree_hash(tmp_path / "s")
    assert known_splits(tmp_path / "s") == ("train", "val")
    lines = convert(str(tmp_path / "s"), tmp_path / "v", "voc", **PLAIN)
    assert [line.endswith("nothing lost") for line in lines] == [True, True]
    assert (tmp_path / "v/ImageSets/Main/train.txt").read_text() == "x\nx_2\n"
    assert (tmp_path / "v/ImageSets/Main/val.txt").read_text() == "x\n"
    assert tree_hash(tmp_path / "s") == before


@pytest.mark.parametrize(
    ("yaml", "found"),
    [
        ("train: a\nval: b\n", "train val"),
        ("test: t\n", "test"),
        ("format: coco\nannotations: {val: x}\n", "val"),
    ],
)
def test_splits_of_a_yaml(tmp_path, yaml, found):
    assert known_splits(write(tmp_path / "data.yaml", yaml + "names: [a]\n")) == tuple(found.split())


def test_bad_input_is_one_line(tmp_path):
    yolo_set(tmp_path / "s", {"a": GOOD, "b": "0 7 nan\n" + GOOD})
    with pytest.raises(QuarantineError, match="--max-bad"):
        convert(str(tmp_path / "s"), tmp_path / "d", "coco", **PLAIN)
    assert not (tmp_path / "d").exists()
    with pytest.raises(UserError, match="holds boxes only"):
        convert(str(tmp_path / "s"), tmp_path / "d", "voc", **PLAIN | {"masks": True})
    with pytest.raises(UserError, match="exists already"):
        convert(str(tmp_path / "s"), tmp_path / "s", "yolo", **PLAIN)
    with pytest.raises(UserError, match="no such data set"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "d"), "--format", "yolo"])
    with pytest.raises(UserError, match="no data set"):
        main([str(tmp_path), str(tmp_path / "d"), "--format", "yolo"])
    write(tmp_path / "file", "")
    with pytest.raises(ResourceError, match="cannot write"):
        convert(str(tmp_path / "s"), tmp_path / "file/d", "yolo", **PLAIN | {"limits": LIMITS._replace(max_bad=1.0)})

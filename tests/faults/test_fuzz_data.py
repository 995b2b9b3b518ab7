"""Damaged labels, data files, XML and JSON: only a UserError comes out, and what is accepted is what it must be."""

import json
from pathlib import Path

import numpy as np
import pytest
from mutator import mutations, num_inputs

from tests.utils.datasets.sets import GOOD, GOOD_ANNOTATION, OBJECT, H, W
from utils import config
from utils.datasets.formats import coco, description, pictures, voc, yolo
from utils.datasets.formats.pictures import Source
from utils.datasets.formats.rows import DROPPED, MAX_ROWS, QUARANTINED, Problems
from utils.errors import UserError

NAMES = ("cat", "dog")
PICTURE = Path("images/a.jpg")


def check(record, problems: Problems, min_side: float = 0.0) -> None:
    """A record is whole; where there is none, somebody was told."""
    if record is None:
        assert any(problem.action == QUARANTINED for problem in problems.entries)
        return
    boxes = record.boxes
    assert np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= (W, H, W, H)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all() and np.isfinite(record.area).all() and (record.area >= 0).all()
    assert ((record.labels >= 0) & (record.labels < len(NAMES))).all()
    assert len(boxes) == len(record.labels) == len(record.ignore) == len(record.crowd) == len(record.area)


# ---------------------------------------------------------------------------------------------------------- YOLO labels

LABELS = (
    GOOD.encode() * 2,
    b"1 0.25 0.25 0.25 0.25\n0 0.5 0.5 0.2 0.2\n",
    b"\xef\xbb\xbf0 0.5 0.5 0.2 0.2\r\n\r\n# end\r\n",
    b"1 .1 .1 .5 .1 .5 .5\n0 .1 .1 .5 .1 .5 .5 .1 .5\n",
    b"0 1.0005 0.5 0.25 0.5\n",
    b"",
)
LABEL_WORDS = (
    b"0",
    b"1",
    b" 0.5",
    b"\n",
    b"\t",
    b"nan",
    b"inf",
    b"-0.1",
    b",",
    b"#",
    b"1e-3",
    b"+.5",
    b"0x1",
    b"\xd9\xa3",
    b"2",
)


def test_labels(monkeypatch):
    source, read = Path("a.txt"), {}
    monkeypatch.setattr(yolo, "read_annotation", lambda path: read["data"])
    accepted = 0
    for data in mutations(LABELS, LABEL_WORDS, num_inputs()):
        read["data"], problems = data, Problems()
        record = yolo.LabelReader(NAMES, problems).record(PICTURE, (H, W), source)
        check(record, problems)
        told = [problem for problem in problems.entries if problem.line is not None and problem.action != "clipped"]
        if record is not None:
            text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            lines = [number for number, line in enumerate(text.split("\n"), 1) if line.partition("#")[0].strip()]
            assert len(lines) <= MAX_ROWS and len(record.boxes) + len(told) == len(lines)
            assert {problem.line for problem in told} <= set(lines)
            accepted += len(record.boxes) > 0
            assert len(record.boxes) or not lines, "an annotated picture is no background"
    assert accepted > num_inputs() / 10


# ----------------------------------------------------------------------------------------------------------- data files

YAMLS = (
    b"path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\nnc: 2\n",
    b"train: [a, b]\nnames:\n  0: cat\n  1: dog\n",
    b"format: coco\nannotations: {train: a.json, val: b.json}\nnames:\n- cat\n- 'dog'\n",
    b"format: voc\ntrain: train\ndate: 2020-01-01\nroboflow:\n  license: {a: [1, 2.5, true, null]}\n",
)
YAML_WORDS = (
    b"*a",
    b"&a ",
    b"!!python/name:os.system ",
    b"!!binary ",
    b"[",
    b"{",
    b"}",
    b"]",
    b"? ",
    b": ",
    b"- ",
    b"\n  ",
    b"|\n",
    b"<<: ",
    b"2020-99-99",
    b"0x_",
    b"1:60",
    b"~nobody/x",
    b'"\\ud800"',
    b"%YAML 1.1\n",
    b"---\n",
    b"names",
    b"nc",
)
PLAIN = (str, int, float, bool, type(None))


def depth_of(value) -> int:
    """Of nested lists and mappings of plain values; anything else fails."""
    if isinstance(value, (dict, list)):
        assert type(value) in (config.Located, list)
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return 1 + max(map(depth_of, items), default=0)
    assert type(value) in PLAIN
    return 0


def test_yaml(monkeypatch, tmp_path):
    """5,000 inputs unless told otherwise: PyYAML takes a millisecond for each."""
    monkeypatch.chdir(tmp_path)
    read = {}
    monkeypatch.setattr(config, "read_bytes", lambda path, expected: read["data"])
    monkeypatch.setattr(description, "GENERATORS", {})
    described = 0
    for data in mutations(YAMLS, YAML_WORDS, num_inputs(5000)):
        read["data"] = data
        try:
            values = config.read_yaml("data.yaml")
            assert depth_of(values) <= config.MAX_DEPTH
            source = description.DESCRIBERS[".yaml"](tmp_path / "data.yaml", "train", Problems())
        except UserError as error:
            assert "\n" not in str(error) and str(error).encode("utf-8", "backslashreplace")
        else:
            described += 1
            assert source.names is None or all(isinstance(name, str) and name.strip() for name in source.names)
    assert described > 100 and list(tmp_path.iterdir()) == []


DATA_FILES = (
    b"classes = 2\ntrain = train.txt\nvalid = val.txt\nnames = obj.names\nbackup = backup/\n",
    b"train=a\r\nnames=b\r\n# comment\r\n\r\n",
    b"cat\ndog\n",
)


def test_data_and_names(monkeypatch, tmp_path):
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    real, read = pictures.read_bytes, {}
    fake = lambda path, expected: read["data"] if Path(path).suffix == ".data" else real(path, expected)  # noqa: E731
    monkeypatch.setattr(pictures, "read_bytes", fake)
    for data in mutations(DATA_FILES, (b"names", b"=", b"classes", b"../", b"\n", b";"), num_inputs(20_000)):
        read["data"] = data
        for look in (
            lambda: description.DESCRIBERS[".data"](tmp_path / "obj.data", "train", Problems()),
            lambda: description.read_names(tmp_path / "obj.data"),
        ):
            try:
                look()
            except UserError as error:
                assert "\n" not in str(error)


# ------------------------------------------------------------------------------------------------------------ XML, JSON

XMLS = (
    f"<annotation>\n<size><width>{W}</width><height>{H}</height></size>{OBJECT.format(5, 30)}</annotation>".encode(),
    f"<annotation>{OBJECT.format(5, 30)}\n{OBJECT.format(40, 60).replace('cat', 'dog')}</annotation>".encode(),
    b"<?xml version='1.0' encoding='utf-8'?><annotation><object><name>cat</name><difficult>1</difficult><bndbox>"
    b"<xmin>1.5</xmin><ymin>2</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object></annotation>",
)
XML_WORDS = (
    b"<object>",
    b"</object>",
    b"<!DOCTYPE a [",
    b"<!ENTITY x 'y'>",
    b"&x;",
    b"&#0;",
    b"&#xd800;",
    b"<![CDATA[",
    b"]]>",
    b"<a>",
    b"<xmin>",
    b"encoding='euc-jp'",
    b"encoding='utf-16'",
    b"nan",
    b"<name/>",
)


def test_xml(monkeypatch):
    read, used = {}, 0
    monkeypatch.setattr(voc, "read_annotation", lambda path: read["data"])
    for data in mutations(XMLS, XML_WORDS, num_inputs()):
        read["data"], problems = data, Problems()
        try:
            record = voc._read_record(Path("a.xml"), PICTURE, (H, W), NAMES, problems)
        except UserError as error:
            assert "has no place" in str(error)
            continue
        check(record, problems)
        if record is not None:
            used += 1
            lost = [problem for problem in problems.entries if problem.action == DROPPED]
            assert len(record.boxes) or not lost, "an annotated picture is no background"
    assert used > num_inputs() / 20


CROWD = {"id": 2, "image_id": "b", "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1}
COCO = {
    "images": [{"id": 7, "file_name": "a.jpg", "height": H, "width": W}, {"id": "b", "file_name": "b.jpg"}],
    "annotations": [GOOD_ANNOTATION, CROWD, {**GOOD_ANNOTATION, "id": 3, "segmentation": [[1, 1, 9, 1, 9, 9]]}],
    "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
}
JSONS = (json.dumps(COCO).encode(), json.dumps(COCO, indent=1).encode())
JSON_WORDS = (
    b"NaN",
    b"Infinity",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b'"\\ud800"',
    b'"id"',
    b"-1",
    b'"bbox"',
    b"1e999",
    b"[" * 50,
    b",",
    b'"image_id"',
)


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_json(monkeypatch, masks):
    """25,000 inputs each unless told otherwise: together what one parser takes."""
    read, used = {}, 0
    monkeypatch.setattr(coco, "read_bytes", lambda path, expected: read["data"])
    monkeypatch.setattr(coco, "kind", lambda path: "file")
    monkeypatch.setattr(coco, "probe_pictures", lambda found, source, problems: dict.fromkeys(found, (H, W)))
    source = Source(file=Path("c.json"), format="coco", split="train", annotations=Path("c.json"), masks=masks)
    for data in mutations(JSONS, JSON_WORDS, num_inputs(25_000)):
        read["data"], problems = data, Problems()
        try:
            annotated = coco.read_coco(source, problems)
        except UserError as error:
            assert str(error).startswith("c.json") and "\n" not in str(error)
            continue
        used += 1
        for record in annotated.records:
            check(record, Problems())
            assert not masks or len(record.outlines) == len(record.boxes)
        assert all(str(problem).isprintable() for problem in problems.entries)
    assert used > num_inputs(25_000) / 20

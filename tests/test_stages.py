"""The commands on a network in two stages, with masks: train, continue, test, detect, and what is refused."""

import csv
import json
import sys

import cv2
import numpy as np
import pytest

import detect
import test as script
import train
from tests.models.two_stage_case import BOXES, MASKS
from utils.errors import UserError

PLAIN = ["--device", "cpu", "--precision", "float32", "--workers", "0", "--batch-size", "4", "--hyp", "two-stage"]
NAMES = ("red", "green", "blue")


def write_pictures(folder):
    """Six pictures of two triangles, the last of none, as COCO with outlines; without them in ``boxes.json``."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(6):
        canvas = np.full((96, 128, 3), 110, np.uint8)
        for label in range(2 * (number < 5)):
            x, y, side = 8 + 60 * label, 10 + 6 * number, 40
            corners = np.array([[x, y], [x + side, y], [x, y + side]])
            cv2.fillPoly(canvas, [corners], [40 + 200 * (k == (label + number) % 3) for k in (2, 1, 0)])
            annotations.append(
                {
                    **{"id": len(annotations) + 1, "image_id": number, "category_id": (label + number) % 3 + 1},
                    **{"bbox": [x, y, side, side], "area": side**2 / 2, "iscrowd": 0},
                    "segmentation": [corners.ravel().tolist()],
                }
            )
        cv2.imwrite(str(folder / "images" / f"{number}.png"), canvas)
        images.append({"id": number, "file_name": f"{number}.png", "width": 128, "height": 96})
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(NAMES)]
    bare = [{key: value for key, value in one.items() if key != "segmentation"} for one in annotations]
    for name, rows in (("masks", annotations), ("boxes", bare)):
        text = json.dumps({"images": images, "annotations": rows, "categories": categories})
        (folder / f"{name}.json").write_text(text)
        yaml = f"path: {folder}\ntrain: images\nval: images\nformat: coco\n"
        (folder / f"{name}.yaml").write_text(yaml + f"annotations: {{train: {name}.json, val: {name}.json}}\n")


def run(monkeypatch, place, data, cfg, *more, name):
    argv = ["--cfg", str(place / cfg), "--data", str(place / data), "--project", str(place / "runs"), "--name", name]
    monkeypatch.setattr(sys, "argv", ["train.py", *PLAIN, *argv, *more])
    train.main()
    return place / "runs" / name


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    write_pictures(folder)
    (folder / "masks.cfg").write_text(MASKS)
    (folder / "boxes.cfg").write_text(BOXES.replace("classes=3", "classes=8"))
    return folder


@pytest.fixture(scope="module")
def finished(place):
    with pytest.MonkeyPatch.context() as patch:
        return run(patch, place, "masks.yaml", "masks.cfg", "--epochs", "2", name="masks")


def test_a_run_teaches_both_stages(finished):
    rows = list(csv.DictReader((finished / "results.csv").open()))
    assert len(rows) == 2
    for term in ("rpn_obj", "rpn_box", "cls", "box", "mask"):
        assert all(0 < float(row[f"train/{term}"]) < 20 for row in rows)
    assert not list((finished / "weights").glob("*.weights"))  # Darknet could not read them


def test_what_was_trained_is_tested_and_detects(finished, place, tmp_path):
    weights = str(next((finished / "weights").glob("*.safetensors")))
    common = ["--weights", weights, "--device", "cpu", "--project", str(tmp_path)]
    arguments = ["--data", str(place / "masks.yaml"), "--workers", "0", "--conf-thres", "0.01", "--save-json"]
    result = script.main(script.parse_args([*common, *arguments]))
    assert result.num_images == 6
    entries = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert entries and all(set(entry["segmentation"]) == {"size", "counts"} for entry in entries)
    detect.main(
        detect.parse_args([*common, "--source", str(place / "images"), "--conf-thres", "0.01", "--name", "seen"])
    )
    assert len(list((tmp_path / "seen").glob("*.png"))) == 6


def test_boxes_only_and_fewer_classes_than_the_cfg(place, monkeypatch, capsys):
    folder = run(monkeypatch, place, "boxes.yaml", "boxes.cfg", "--epochs", "1", name="boxes")
    assert "3 classes in the data; the network follows" in capsys.readouterr().out
    assert "mask" not in (folder / "results.csv").read_text().splitlines()[0]


def test_masks_are_asked_of_data_that_has_none(place, monkeypatch):
    with pytest.raises(UserError, match=r"boxes\.json"):
        run(monkeypatch, place, "boxes.yaml", "masks.cfg", "--epochs", "1", name="refused")
    assert not (place / "runs" / "refused").exists()


def test_recipes_of_one_stage_are_refused(place, monkeypatch):
    with pytest.raises(UserError, match=r"boxes\.cfg:\d+: loss 'yolo' does not teach \[roi\]"):
        run(monkeypatch, place, "boxes.yaml", "boxes.cfg", "--hyp", "yolov3", "--epochs", "1", name="refused")

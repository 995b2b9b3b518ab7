"""train.py, test.py and detect.py with a network that outlines: a tiny one, on generated pictures."""

import contextlib
import io
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import detect
import test as script
import train
from utils.datasets.shapes import ensure_shapes
from utils.errors import UserError
from utils.run_lengths import decode

NETWORK = """[net]
width=96
height=96
channels=3
letter_box=1
[convolutional]
batch_normalize=1
filters=16
size=3
stride=4
pad=1
activation=leaky
[convolutional]
batch_normalize=1
filters=16
size=3
stride=2
pad=1
activation=leaky
[convolutional]
filters=15
size=1
activation=linear
[rpn]
sizes=24
ratios=0.5,1,2
[roi]
from=-3
classes=3
pool=3
fc=1
units=16
post_nms=20
[mask]
classes=3
pool=4
convs=1
channels=8
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """The run folder of one epoch, and the data's yaml."""
    folder = tmp_path_factory.mktemp("masks")
    ensure_shapes(folder / "shapes", seed=1, num_pictures={"train": 8, "val": 6})
    (folder / "net.cfg").write_text(NETWORK)
    data = folder / "data.yaml"
    data.write_text(
        "path: shapes\ntrain: images/train\nval: images/val\nformat: coco\n"
        "annotations: {train: annotations/train.json, val: annotations/val.json}\n"
    )
    run_train(folder, data)
    return folder / "runs/exp", data


def run_train(folder: Path, data: Path) -> None:
    arguments = ["--cfg", folder / "net.cfg", "--hyp", "two-stage", "--data", data, "--epochs", 1, "--batch-size", 4]
    arguments += ["--workers", 0, "--device", "cpu", "--precision", "float32", "--project", folder / "runs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        train.main()


def test_training_shows_and_logs_masks(trained):
    run, _ = trained
    details = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert any("metrics/mask-mAP50-95" in line for line in details)
    assert "metrics/mask-mAP50" in (run / "results.csv").read_text().splitlines()[0]
    assert {"train_batch0.jpg", "val_batch0_labels.jpg", "val_batch0_pred.jpg"} <= {file.name for file in run.iterdir()}


def test_test_measures_and_writes_masks(trained, tmp_path):
    """The numbers are those of pycocotools on the file that is written and the annotations as they are."""
    run, data = trained
    common = ["--device", "cpu", "--workers", "0", "--project", str(tmp_path), "--save-json"]
    weights = ["--weights", str(run / "weights/last.safetensors"), "--data", str(data)]
    result = script.main(script.parse_args([*weights, *common]))
    assert result.segm is not None and "mask50" in result.table()
    entries = json.loads((tmp_path / "exp/predictions.json").read_text())
    assert len(entries) > 20
    alone = [{key: value for key, value in entry.items() if key != "bbox"} for entry in entries]
    for kind, mine, rows in (("segm", result.segm, alone), ("bbox", result.coco, entries)):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(data.parent / "shapes/annotations/val.json"))
            evaluation = COCOeval(truth, truth.loadRes(rows), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        expected = np.where(evaluation.stats < 0, np.nan, evaluation.stats)
        np.testing.assert_allclose(list(mine.values()), expected, rtol=0, atol=1e-6, err_msg=kind)


def test_detect_writes_and_draws_masks(trained, tmp_path):
    run, data = trained
    picture = sorted((data.parent / "shapes/images/val").iterdir())[0]
    arguments = [
        "--weights",
        run / "weights/last.safetensors",
        "--source",
        picture,
        "--conf-thres",
        0.01,
        "--device",
        "cpu",
    ]
    arguments += ["--project", tmp_path, "--save-json", "--hide-labels"]
    detect.main(detect.parse_args([*map(str, arguments)]))
    (entry,) = json.loads((tmp_path / "exp/detections.json").read_text())
    assert entry["detections"]
    for found in entry["detections"]:
        size = (entry["height"], entry["width"])
        assert found["segmentation"]["size"] == list(size)
        rows, columns = np.nonzero(decode(found["segmentation"]["counts"], size))
        if len(rows):
            x1, y1, x2, y2 = found["box"]
            assert columns.min() >= x1 - 1 and columns.max() <= x2 and rows.min() >= y1 - 1 and rows.max() <= y2
    drawn = cv2.imread(str(tmp_path / "exp" / picture.name))
    assert drawn.shape == cv2.imread(str(picture)).shape


def test_training_masks_on_boxes_names_the_annotation_file(trained, tmp_path):
    run, data = trained
    (tmp_path / "net.cfg").write_text((run / "network.cfg").read_text())
    with pytest.raises(UserError, match=r"\.txt:1: none of \d+ rows is a polygon"):
        run_train(tmp_path, data.parent / "shapes/data.yaml")
    assert not (tmp_path / "runs").exists()

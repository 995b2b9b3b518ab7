"""test.py as a person uses it: published levels, the COCO tools' verdict on its files, one class, and mistakes."""

import contextlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from grid_network import CFG, NAMES, grid_boxes, write_grid_network
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import test as script
from utils.datasets.records import read_dataset
from utils.errors import QuarantineError, UserError

# AP and AP50 measured with OpenCV and pycocotools (README of the data), and on which pictures
LEVELS = {
    "yolo-fastest-1.1": ((0.133, 0.298), "images"),
    "yolo-fastest-1.1-xl": ((0.222, 0.445), "val2017.txt"),
}
SIZES = {"a": (48, 96), "b": (64, 64), "c": (128, 64)}  # h, w


def run(*arguments: object):
    """Call test.py in this process; returns the evaluation."""
    return script.main(script.parse_args([*map(str, arguments), "--device", "cpu", "--workers", "0"]))


def coco_numbers(truth: dict, results: Path) -> np.ndarray:
    """The twelve numbers of pycocotools, nan where there is nothing to measure."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.where(evaluation.stats < 0, np.nan, evaluation.stats)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A network that finds a grid of squares everywhere, and pictures where every third of them is one."""
    folder = tmp_path_factory.mktemp("test")
    write_grid_network(folder / "net.safetensors")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for name, size in SIZES.items():
        cv2.imwrite(str(folder / "images" / f"{name}.png"), np.full((*size, 3), 100, np.uint8))
        lines = []
        for number, box in enumerate(grid_boxes(size, stretch=True)[::3]):
            x1, y1, x2, y2 = (box + number % 2).tolist()  # every other one a pixel off
            numbers = (x1 + x2) / 2 / size[1], (y1 + y2) / 2 / size[0], (x2 - x1) / size[1], (y2 - y1) / size[0]
            lines.append(f"{number % 3 == 2:d} " + " ".join(f"{value:.6f}" for value in numbers))
        (folder / "labels" / f"{name}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text("train: images\nval: images\nnames: [square, bar]\n")
    return folder


def truth_of(records, names) -> dict:
    """What a COCO file of these records says: positions as image ids, labels from 1."""
    images = [{"id": i, "height": record.size[0], "width": record.size[1]} for i, record in enumerate(records)]
    annotations = []
    for i, record in enumerate(records):
        for (x1, y1, x2, y2), label, area in zip(record.boxes.tolist(), record.labels.tolist(), record.area.tolist()):
            box = [x1, y1, x2 - x1, y2 - y1]
            row = {"image_id": i, "category_id": label + 1, "bbox": box, "area": area, "iscrowd": 0}
            annotations.append(row | {"id": len(annotations) + 1})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.mark.parametrize("model", LEVELS)
def test_published_level(model, data_dir, tmp_path, capsys):
    """Real weights on real pictures, stretched, with plain NMS as in that measurement; judged by pycocotools too."""
    expected, split = LEVELS[model]
    weights, coco = data_dir / "weights" / f"{model}.weights", data_dir / "coco-mini"
    cfg, data = tmp_path / "plain.cfg", tmp_path / "data.yaml"
    cfg.write_text(weights.with_suffix(".cfg").read_text().replace("nms_kind=greedynms", "nms_kind=default"))
    data.write_text(f"format: coco\nannotations: {coco / 'instances.json'}\nval: {coco / split}\n")
    flags = ["--conf-thres", 0.005, "--iou-thres", 0.45, "--save-json", "--verbose", "--project", tmp_path]
    result = run("--weights", weights, "--cfg", cfg, "--data", data, *flags)
    assert (result.map, result.map50) == pytest.approx(expected, abs=0.005)

    truth = json.loads((coco / "instances.json").read_text())
    seen = {record.image_id for record in read_dataset(data, "val").records}
    truth["images"] = [image for image in truth["images"] if image["id"] in seen]
    truth["annotations"] = [row for row in truth["annotations"] if row["image_id"] in seen]
    stats = coco_numbers(truth, tmp_path / "exp" / "predictions.json")
    np.testing.assert_allclose(list(result.coco.values()), stats, atol=1e-6)
    text = capsys.readouterr().out
    assert "\nClass " in text and "\nperson " in text and "\nspeed, ms per picture: " in text


def test_files_and_pycocotools_agree(place, tmp_path, capsys):
    flags = ("--save-json", "--save-txt", "--save-conf", "--protocol", "voc12", "--project", tmp_path)
    result = run("--weights", place / "net.safetensors", "--data", place / "data.yaml", *flags)
    folder = tmp_path / "exp"
    assert 0.1 < result.map < result.map50 < 0.9, "neither perfect nor hopeless, or the comparison is empty"
    words = capsys.readouterr().out.split()
    assert result.ranked is not None and "voc12" in words
    for name, value in result.coco.items():
        assert words[words.index(name) + 1] == ("n/a" if np.isnan(value) else f"{value:.3f}")

    data = read_dataset(place / "data.yaml", "val")
    stats = coco_numbers(truth_of(data.records, data.names), folder / "predictions.json")
    np.testing.assert_allclose(list(result.coco.values()), stats, atol=1e-6)

    for name, size in SIZES.items():
        rows = np.loadtxt(folder / "labels" / f"{name}.txt")
        expected = grid_boxes(size, stretch=True)
        relative = (expected[:, :2] + expected[:, 2:]) / 2 / torch.tensor([size[1], size[0]])
        squares = rows[rows[:, 0] == 0]
        np.testing.assert_allclose(squares[:, 1:3], relative, atol=2e-6)
        assert rows.shape[1] == 6
    wanted = {"val_batch0_labels.jpg", "val_batch0_pred.jpg", "confusion_matrix.png", "PR_curve.png"}
    assert wanted <= {file.name for file in folder.iterdir()}


def test_one_class(place, tmp_path):
    """Every box a square: recall is 1, and the bars count as found."""
    flags = ("--single-cls", "--project", tmp_path, "--save-json")
    result = run("--weights", place / "net.safetensors", "--data", place / "data.yaml", *flags)
    assert result.names == ("object",)
    assert result.coco["AR100"] > 0.7 and result.recall == pytest.approx([1.0])
    data = read_dataset(place / "data.yaml", "val").as_single_class()
    stats = coco_numbers(truth_of(data.records, data.names), tmp_path / "exp" / "predictions.json")
    np.testing.assert_allclose(list(result.coco.values()), stats, atol=1e-6)


def test_category_ids(data_dir, tmp_path):
    coco = read_dataset(data_dir / "coco-mini" / "instances.json", "val")
    assert coco.category_ids[:3] == (1, 2, 3) and coco.category_ids[-1] == 90 and len(set(coco.category_ids)) == 80
    assert coco.as_single_class().category_ids == (1,)


def test_category_ids_by_name(tmp_path):
    """Names of a yaml decide the labels; the ids stay those of the file, and a class it lacks gets another."""
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((9, 9, 3), np.uint8))
    box = {"id": 1, "image_id": 7, "category_id": 40, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
    categories = [{"id": 40, "name": "cat"}, {"id": 3, "name": "dog"}]
    image = {"id": 7, "file_name": "a.png", "height": 9, "width": 9}
    (tmp_path / "a.json").write_text(json.dumps({"images": [image], "annotations": [box], "categories": categories}))
    yaml = tmp_path / "data.yaml"
    yaml.write_text("format: coco\nannotations: a.json\nval: .\nnames: [cat, cow, dog]\n")
    data = read_dataset(yaml, "val")
    assert data.category_ids[0::2] == (40, 3) and data.category_ids[1] not in (40, 3)


def test_narrow_batches_change_little(place, tmp_path):
    """--rect leaves margins away and nothing else: a grid network finds fewer boxes in them, the same elsewhere."""
    flags = (
        "--weights",
        place / "net.safetensors",
        "--data",
        place / "data.yaml",
        "--resize",
        "letterbox",
        "--save-txt",
    )
    run(*flags, "--project", tmp_path / "square")
    run(*flags, "--rect", "--batch-size", 1, "--project", tmp_path / "rect")
    for name in SIZES:
        square, rect = (np.loadtxt(tmp_path / way / "exp" / "labels" / f"{name}.txt") for way in ("square", "rect"))
        np.testing.assert_allclose(square, rect, atol=2e-6)


def test_what_is_taken_when_the_data_is_read_is_measured(place, tmp_path):
    """--allow-truncated and --max-pixels hold for the pictures as for their headers."""
    write_grid_network(place / "net.safetensors")
    data = cv2.imencode(".jpg", np.full((64, 96, 3), 100, np.uint8))[1].tobytes()
    for name, start in {"whole": data, "cut": data[:-40]}.items():
        (tmp_path / f"{name}.jpg").write_bytes(start)
        (tmp_path / f"{name}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (tmp_path / "data.yaml").write_text("val: .\nnames: [square, bar]\n")
    flags = ("--weights", place / "net.safetensors", "--data", tmp_path / "data.yaml", "--project", tmp_path / "runs")
    with pytest.raises(QuarantineError, match="1 of 2 pictures are bad"):
        run(*flags)
    assert run(*flags, "--allow-truncated").num_images == 2


def test_strict_promises_only_what_is_checked(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    help = " ".join(capsys.readouterr().out.split())
    assert "nothing may be set aside" in help and "two splits" not in help


MISTAKES = {
    "protocol": (["--protocol", "voc11"], r"^--protocol: no such protocol: 'voc11' \(did you mean 'voc1?[0-9]+'\?\)"),
    "no weights": (["--weights", "none.weights"], r"^none\.weights: no such weights file"),
    "no data": (["--data", "none.yaml"], r"none\.yaml: no such data set"),
    "no split": (["--task", "test"], r"no 'test:'"),
    "other classes": (["--data", "PLACE/other.yaml"], r"trained on the classes square, bar; asked for are cat, dog"),
    "class count": (
        ["--weights", "PLACE/net.weights", "--cfg", "PLACE/net.cfg", "--data", "PLACE/three.yaml"],
        r"not for the 3 classes that are named",
    ),
    "size": (["--img-size", "60"], r"60x60 is no multiple of the network's stride 16"),
    "half": (["--half"], r"fp16: needs a CUDA device"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_folder(place, tmp_path, mistake):
    write_grid_network(place / "net.weights", text=CFG)
    (place / "other.yaml").write_text("val: images\nnames: [cat, dog]\n")
    (place / "three.yaml").write_text("val: images\nnames: [cat, dog, cow]\n")
    flags, pattern = MISTAKES[mistake]
    known = ["--weights", place / "net.safetensors", "--data", place / "data.yaml", "--project", tmp_path / "o"]
    with pytest.raises(UserError, match=pattern) as caught:
        run(*known, *(flag.replace("PLACE", str(place)) for flag in flags))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


assert NAMES == ["square", "bar"]  # the texts above spell them out

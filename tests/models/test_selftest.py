"""The self-test: what is healthy passes, and each sickness is found by its own question."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "utils"))

from tiny import CFG, SIZE, tiny_step, write_pictures  # noqa: E402

import train  # noqa: E402
from models.learn_by_heart import map50  # noqa: E402
from models.losses import build_criterion  # noqa: E402
from models.selftest import busiest, examine, plain_batches, refuse, verdict  # noqa: E402
from models.selftest_checks import (  # noqa: E402
    BAD,
    GOOD,
    UNSURE,
    check_ceiling,
    check_classes,
    check_gradient,
    check_sizes,
    check_way,
)
from utils.datasets.augment import Augment  # noqa: E402
from utils.datasets.dataset import DetectionDataset  # noqa: E402
from utils.datasets.loader import Draw  # noqa: E402
from utils.datasets.splits import build_loaders, read_splits  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.structures import Detections, Record  # noqa: E402

NAMES = ["square", "bar"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return read_splits(write_pictures(tmp_path_factory.mktemp("selftest")))


@pytest.fixture(scope="module")
def batches(data):
    dataset = DetectionDataset(data.val)
    return plain_batches(dataset, [[Draw(0, row, row, (SIZE, SIZE)) for row in range(len(dataset))]])


def record(boxes, labels, size=(SIZE, SIZE)) -> Record:
    boxes, nobody = np.array(boxes, np.float32).reshape(-1, 4), np.zeros(len(labels), bool)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return Record(
        path="x", size=size, boxes=boxes, labels=np.array(labels, np.int64), ignore=nobody, crowd=nobody, area=area
    )


def test_a_healthy_training_passes_every_question(data):
    step, told = tiny_step(), []
    before = copy.deepcopy(step.state_dict())
    options = {"rect": False, "balance": False, "cache": None, "seed": 0, "epochs": 1, "workers": 0}
    _, val = build_loaders(
        data, Augment(), batch_size=4, size=(SIZE, SIZE), stride=16, channels=3, stretch=False, pin_memory=False,
        **options,
    )  # fmt: skip
    checks, story = examine(step, data, val, (SIZE, SIZE), say=told.append, seconds=6)
    assert told == checks and len(checks) == 6
    assert [check.state for check in checks[:5]] == [GOOD] * 5
    assert checks[5].state in (GOOD, UNSURE) and story.losses[-1] < story.losses[0]  # UNSURE: a slow machine
    assert all(torch.equal(value, before[name]) for name, value in step.state_dict().items())
    assert "Nothing here keeps mAP at zero" in verdict(checks)
    refuse(checks, "nothing")


def test_no_objects():
    with_one, without = record([[1, 1, 20, 20]], [0]), record([], [])
    for train_records, val_records, word in (
        ([without], [with_one], "training"),
        ([with_one], [without], "validation"),
    ):
        check = check_classes(NAMES, train_records, val_records)
        assert check.state == BAD and word in check.answer
        with pytest.raises(UserError, match=f"page.html: the {word} pictures have no object"):
            refuse([check], "page.html")
        assert verdict([check]).startswith("This is why mAP stays low: ")


def test_classes_that_are_never_shown():
    square, bar = record([[1, 1, 20, 20]], [0]), record([[1, 1, 20, 20]], [1])
    assert check_classes(NAMES, [square], [bar]).state == BAD
    check = check_classes(NAMES, [square], [square, bar])
    assert check.state == UNSURE and "never shown: bar" in check.answer
    assert check_classes(NAMES, [square, bar, record([], []), record([], []), record([], [])], [bar]).state == UNSURE


@pytest.mark.parametrize(
    ("boxes", "state", "word"),
    [
        ([[0.1 * k, 0.2, 0.1 * k + 0.4, 0.9] for k in range(8)], BAD, "below 4"),  # fractions read as pixels
        ([[0, 0, 640, 480]] * 8, BAD, "cover the whole picture"),
        ([[100, 100, 300, 300]] * 8, BAD, "at the same place"),
        ([[60 * k, 40 * k, 60 * k + 90, 40 * k + 90] for k in range(8)], GOOD, "416 x 416"),
        ([[60 * k, 40 * k, 60 * k + (90 if k > 2 else 4), 40 * k + 90] for k in range(8)], UNSURE, "below 4"),
    ],
)
def test_sizes(boxes, state, word):
    check = check_sizes([record(boxes, [0] * 8, size=(480, 640))], (416, 416))
    assert check.state == state and word in check.answer


def test_truth_as_predictions_scores_one_and_moved_labels_do_not(batches, data):
    assert "1.000" in check_way(batches, data.val, NAMES).answer
    batches[0].targets.boxes.add_(20)
    try:
        assert check_way(batches, data.val, NAMES).state == BAD
    finally:
        batches[0].targets.boxes.sub_(20)


def test_a_perfect_network_scores_one_unless_nobody_answers(batches, data):
    step = tiny_step()
    assert check_ceiling(step, batches, data.val, NAMES).state == GOOD
    step = tiny_step(CFG.replace("anchors=12,12, 24,12", "anchors=60,2, 2,60"))
    check = check_ceiling(step, batches, data.val, NAMES)
    assert check.state == BAD and "nobody answers for 12 of 12" in check.answer and "--anchors" in check.cure


def test_a_head_without_gradient_is_named(batches):
    step = tiny_step()
    assert check_gradient(step, batches[0]).state == GOOD
    silent = {"name": "yolo", "box": 0.0, "obj": 0.0, "cls": 0.0}
    step.criterion = build_criterion({"name": "wh_iou", "iou_t": 0.2}, silent, 2)
    check = check_gradient(step, batches[0])
    assert check.state == BAD and "no gradient reaches [yolo]" in check.answer
    assert [row[-1] for row in check.rows] == ["learns", "no"]
    with torch.no_grad():
        next(step.model.parameters()).fill_(float("nan"))
    step.criterion = tiny_step().criterion
    assert "no number" in check_gradient(step, batches[0]).answer


def test_map50_of_a_batch(batches):
    targets = batches[0].targets
    found = [
        Detections(boxes=targets.boxes[mine], scores=torch.ones(int(mine.sum())), labels=targets.labels[mine])
        for mine in (targets.image == row for row in range(len(batches[0])))
    ]
    assert map50(found, batches[0], NAMES) == pytest.approx(1.0)
    assert map50([one[:0] for one in found], batches[0], NAMES) == 0


def test_pictures_to_learn_show_all_classes_and_some_object():
    records = [record([], []), *(record([[0, 0, 9, 9]], [0]) for _ in range(9)), record([[0, 0, 9, 9]], [1])]
    chosen = busiest(records)
    assert len(chosen) == len(set(chosen)) == 4 and 10 in chosen and 0 not in chosen


def test_the_command_leaves_a_page_and_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    yaml, cfg = write_pictures(tmp_path), tmp_path / "tiny.cfg"
    cfg.write_text(CFG)
    monkeypatch.setattr("models.selftest.HEART_SECONDS", 1.0)
    for label in (tmp_path / "labels" / "val").iterdir():
        label.write_text("")
    argv = ["train.py", "--selftest", "--data", str(yaml), "--cfg", str(cfg), "--device", "cpu", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", [*argv, "--project", str(tmp_path / "runs")])
    with pytest.raises(UserError, match="the validation pictures have no object at all"):
        train.main()
    page = (tmp_path / "runs" / "exp-selftest" / "index.html").read_text()
    assert "This is why mAP stays low: the validation pictures have no object" in page and "http" not in page
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["exp-selftest"]
    capsys.readouterr()
    for label in (tmp_path / "labels" / "train").iterdir():
        (tmp_path / "labels" / "val" / label.name).write_text(label.read_text())
    train.main()
    page = (tmp_path / "runs" / "exp-selftest2" / "index.html").read_text()
    assert page.count("<img") == 4 * 3 + 2 + 6
    assert "Can it learn a few pictures by heart?" in capsys.readouterr().out

"""The logs are whole, continue where a checkpoint does, and cannot stop a run."""

import csv
import json
import sys

import numpy as np
import pytest

from utils.errors import UserError
from utils.fitness import Best
from utils.logger import Logger
from utils.resume import SUMMARY, write_summary


@pytest.fixture
def quiet(monkeypatch):
    """Loggers without TensorBoard: its import is slow."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def row(epoch, **more):
    return {"epoch": epoch, "train/box": 0.5 / (epoch + 1), **more}


def test_rows_reach_both_files(tmp_path, quiet):
    logger = Logger(tmp_path)
    logger.epoch(row(0), {})
    logger.epoch(row(1), {"metrics/mAP50": 0.25})
    table = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [line["epoch"] for line in table] == ["0", "1"]
    assert table[0]["metrics/mAP50"] == "" and float(table[1]["metrics/mAP50"]) == 0.25
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[1]["train/box"] == 0.25


def test_resume_leaves_no_epoch_twice(tmp_path, quiet):
    logger = Logger(tmp_path)
    for epoch in range(4):
        logger.epoch(row(epoch), {})
    resumed = Logger(tmp_path, start_epoch=2)
    resumed.epoch(row(2), {})
    epochs = [line["epoch"] for line in csv.DictReader((tmp_path / "results.csv").open())]
    assert epochs == ["0", "1", "2"]


def test_wall_times_are_in_the_log_only(tmp_path, quiet):
    Logger(tmp_path).epoch(row(0) | {"time/seconds": 1.5}, {"time/wait": 0.1})
    assert (tmp_path / "results.csv").read_text() == "epoch,train/box\n0,0.5\n"
    assert json.loads((tmp_path / "log.jsonl").read_text())["time/wait"] == 0.1


@pytest.mark.parametrize(
    "line", ["{", "[1]", "3", "null", '{"epoch": 1.5}', '{"epoch": true}', '{"box": 1}', "\x00", "[" * 5000]
)
def test_a_line_that_is_no_row_is_named(tmp_path, quiet, line):
    (tmp_path / "log.jsonl").write_text(f'{{"epoch": 0}}\n{line}\n')
    with pytest.raises(UserError, match=r"log.jsonl:2: not the row of an epoch"):
        Logger(tmp_path, start_epoch=2)


def test_console_columns_are_aligned(tmp_path, quiet, capsys):
    logger = Logger(tmp_path)
    capsys.readouterr()
    logger.epoch(row(0, images=7), {})
    logger.epoch(row(1, images=123), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["epoch", "box", "images"]


def test_missing_tensorboard_is_said_once_and_survived(tmp_path, quiet, capsys):
    logger = Logger(tmp_path)
    for epoch in range(2):
        logger.picture("x", np.zeros((2, 2, 3), np.uint8), epoch)
        logger.epoch(row(epoch), {})
    assert capsys.readouterr().out.count("TensorBoard failed") == 1


def test_decoration_that_fails_is_said_once(tmp_path, quiet, capsys):
    logger = Logger(tmp_path)
    for _ in range(3):
        with logger.guard("results.png"):
            raise ZeroDivisionError("no curve")
    assert capsys.readouterr().out.count("results.png failed") == 1


def test_other_ranks_are_silent(tmp_path, capsys):
    logger = Logger(None)
    logger.epoch(row(0), {})
    logger.say("hello")
    logger.close()
    assert capsys.readouterr().out == ""


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    logger = Logger(tmp_path)
    logger.epoch(row(0), {})
    logger.picture("train_batch", np.zeros((4, 4, 3), np.uint8), 0)
    logger.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/box")[0].value == 0.5
    assert events.Tags()["images"] == ["train_batch"]


def test_what_is_no_number_is_null(tmp_path):
    """NaN and Infinity are no JSON: a run without anything to find has neither a best epoch nor an mAP."""
    write_summary(tmp_path, {"epochs": 3, "best": Best().as_dict(), "mAP": float("nan"), "lr": 0.5})
    values = json.loads((tmp_path / SUMMARY).read_text(), parse_constant=pytest.fail)
    assert values == {"epochs": 3, "best": {"fitness": None, "epoch": -1}, "mAP": None, "lr": 0.5}

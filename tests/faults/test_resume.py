"""A run that continues ends, bit by bit, as one that never stopped; it keeps what it began with, and counts no epoch
twice.
"""

import csv
import json
import os
import random
import shutil
import signal

import pytest
from harness import command, refused
from run_state import differences, state
from tiny import write_pictures

from utils.checkpoint import read_checkpoint
from utils.failpoints import VARIABLE
from utils.interrupts import EXIT_CODES
from utils.resume import MAY_CHANGE, find_resumed, refuse_changes

STEPS = 9  # of a whole run: three epochs of three


def test_the_undisturbed_run_is_what_it_seems(runs):
    whole = runs.undisturbed()
    assert whole["step"] == STEPS and whole["epoch"] == 3 and any("running_var" in name for name in whole)
    assert any(name.startswith("optim.") for name in whole) and len(whole["results.csv"].splitlines()) == 4
    assert b"time/" not in whole["results.csv"]


@pytest.mark.parametrize("step", range(1, STEPS + 1), ids=lambda step: f"T11-stop-after-step-{step}")
def test_a_run_stopped_after_any_step(step, runs, seen):
    """The last step of an epoch, too, whose evaluation is still to come."""
    run = runs.new()
    stopped = runs.begin(run, env={VARIABLE: f"step:{step}:SIGTERM"})
    assert stopped.code == 75, stopped.err
    meta = read_checkpoint(run / "weights" / "last.safetensors")[1]
    assert (meta["step"], meta["epoch"], meta["steps_done"]) == (step, (step - 1) // 3, (step - 1) % 3 + 1)
    runs.assert_ends_equal(run)
    seen("sha256 of weights, average, optimiser, results.csv equal after a stop at every step of three epochs")


@pytest.mark.parametrize("step", [5, 6], ids=lambda step: f"T11-killed-in-step-{step}")
def test_a_run_killed_in_a_step(step, runs):
    """kill -9 with a save after every step loses the step that was under way, and it is taken again."""
    run = runs.new()
    killed = runs.begin(run, "--save-interval", "0", env={VARIABLE: f"step:{step}:SIGKILL"})
    assert killed.code == -signal.SIGKILL
    assert read_checkpoint(run / "weights" / "last.safetensors")[1]["step"] == step - 1
    runs.assert_ends_equal(run)


def shallow_prefetch() -> None:
    from utils.datasets import workers

    workers.PREFETCH = 1


@pytest.mark.parametrize(
    ("workers", "before"),
    [
        pytest.param(1, None, id="T12-one-worker"),
        pytest.param(2, None, id="T12-two-workers"),
        pytest.param(2, shallow_prefetch, id="T12-other-prefetch"),
    ],
)
def test_other_workers(workers, before, runs, seen):
    run = runs.new()
    assert runs.begin(run, env={VARIABLE: "step:5:SIGTERM"}).code == 75
    runs.assert_ends_equal(run, "--workers", str(workers), before=before)
    seen("equal with 0, 1, 2 workers and another prefetch")


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] * (n > 2), id=f"T11-drawn-{n}") for n in range(12)]
)
def test_equal_whatever_happens(seed, runs):
    """Property 7: any stop step, any kind of end, any workers, several times."""
    draw, run, end = random.Random(seed), runs.new(), 0
    kinds = {"SIGTERM": 75, "SIGINT": 130, "SIGKILL": -signal.SIGKILL}
    first = True
    while end < STEPS - 1:
        end, kind = draw.randint(end + 1, STEPS), draw.choice(sorted(kinds))
        how = ["--workers", str(draw.randint(0, 2)), "--save-interval", draw.choice(["0", "1"])]
        call, first = (runs.begin if first else runs.resume), False
        ended = call(run, *how, env={VARIABLE: f"step:{end}:{kind}"})
        assert ended.code == kinds[kind], ended.err
        if not list(run.glob("weights/*.safetensors")):
            shutil.rmtree(run)  # killed before its first save: the user starts again
            first = True
    if first:
        runs.begin(run)
    runs.assert_ends_equal(run, "--workers", str(draw.randint(0, 2)))


@pytest.mark.parametrize(
    "point", ["csv.append:2", "save.open:2", "save.replace:2", "file.replace:11"], ids=lambda p: f"T15-{p}"
)
def test_no_epoch_twice(point, runs, seen):
    """Killed between the log, the table and the checkpoint."""
    run = runs.new()
    assert runs.begin(run, env={VARIABLE: f"{point}:SIGKILL"}).code == -signal.SIGKILL
    runs.assert_ends_equal(run)
    rows = list(csv.DictReader((run / "results.csv").open()))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and [row["epoch"] for row in log] == [0, 1, 2]
    seen("every epoch once")


def never_better() -> None:
    """Every epoch as good as the first, which stays the best."""
    from utils import fitness

    fitness.fitness = lambda scalars: 0.5


def test_the_best_epoch_is_remembered(runs):
    run = runs.new()
    assert runs.begin(run, before=never_better, env={VARIABLE: "step:5:SIGTERM"}).code == 75
    assert runs.resume(run, before=never_better).code == 0
    last, best = (read_checkpoint(run / "weights" / f"{name}.safetensors")[1] for name in ("last", "best"))
    assert last["best"] == best["best"] == {"fitness": 0.5, "epoch": 0} and (last["step"], best["step"]) == (9, 3)


def test_t15_tensorboard(runs):
    """Every epoch once, also where the run was killed after it had been drawn."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = runs.new()
    assert runs.begin(run, env={VARIABLE: "save.open:2:SIGKILL"}).code == -signal.SIGKILL
    assert runs.resume(run).code == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/box")] == [0, 1, 2]


@pytest.fixture(scope="module")
def stopped(runs):
    """A run that stopped in its second epoch. Not to be continued: copy it."""
    run = runs.new()
    assert runs.begin(run, env={VARIABLE: "step:5:SIGTERM"}).code == 75
    return run


CHANGES = {
    "batch": ["--batch-size", "4"],
    "fewer-epochs": ["--epochs", "2"],
    "cfg": ["--cfg", "yolov3.cfg"],
    "data": ["--data", "other.yaml"],
    "hyp": ["--hyp", "yolov5"],
    "set": ["--set", "lr0=0.5"],
    "size": ["--img-size", "32"],
    "seed": ["--seed", "1"],
    "classes": ["--single-cls"],
    "weights": ["--weights", "x.weights"],
    "rect": ["--rect"],
    "balance": ["--image-weights"],
    "freeze": ["--freeze", "1"],
}


@pytest.mark.parametrize("flags", [pytest.param(flags, id=f"T13-{name}") for name, flags in CHANGES.items()])
def test_what_decides_the_numbers_may_not_change(flags, runs, stopped, seen):
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    ended = runs.resume(stopped, *flags)
    line = ended.error_line()
    name = flags[0].removeprefix("--").replace("-", "_")
    assert ended.code == 2 and "a run that continues keeps its arguments" in line and f" {name} " in line
    assert before == {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    seen(line[line.index("a run that") :])


@pytest.mark.parametrize(
    "flags",
    [["--epochs", "4"], ["--device", "cpu", "--workers", "1"], ["--nosave"]],
    ids=lambda f: f"T13-allowed{''.join(f)}",
)
def test_what_may_change(flags, runs, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "exp")
    assert runs.resume(run, *flags).code == 0
    assert read_checkpoint(run / "weights" / "last.safetensors")[1]["epoch"] == (4 if flags[0] == "--epochs" else 3)


def test_t13_every_argument_is_decided_upon(runs, stopped):
    """A new flag must not change a run that continues by oversight."""
    arguments = read_checkpoint(stopped / "weights" / "last.safetensors")[1]["args"]
    for name, value in arguments.items():
        other = arguments | {name: "something else"}
        if name in MAY_CHANGE - {"epochs"}:
            refuse_changes(arguments, other, stopped)
        elif name != "epochs":
            refused(
                lambda other=other: refuse_changes(arguments, other, stopped),
                where=str(stopped),
                says=f"{name} {value}",
            )


def test_t13_changed_data(server, tiny_run, tmp_path, seen):
    data = write_pictures(tmp_path / "data")
    arguments = [*tiny_run, "--data", str(data), "--project", str(tmp_path / "runs")]
    assert server.run("train.py", *arguments, env={VARIABLE: "step:2:SIGTERM"}).code == 75
    run, label = tmp_path / "runs" / "exp", tmp_path / "data" / "labels" / "train" / "0.txt"
    label.write_text("\n".join(label.read_text().splitlines()[:1]) + "\n")
    ended = server.run("train.py", "--resume", run)
    assert ended.code == 2 and "the data set has changed since the run began" in ended.error_line()
    seen(ended.error_line())
    assert server.run("train.py", "--resume", run, "--allow-data-change").code == 0


def test_t14_a_finished_run(runs, seen):
    run = runs.new()
    assert runs.begin(run).code == 0
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    again = runs.resume(run)
    assert again.code == 0 and "nothing to do" in again.out
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    seen(f"exit 0, {again.out.strip().splitlines()[-1].partition(': ')[2]}")
    (run / "summary.json").unlink()  # stopped in its last chapter: that alone is done again
    (run / "weights" / "best.weights").unlink()
    assert runs.resume(run).code == 0
    assert (run / "summary.json").exists() and (run / "weights" / "best.weights").exists()
    assert not differences(state(run), runs.undisturbed())


def test_t14_an_early_stopped_run_is_finished(runs):
    run = runs.new()
    assert (
        runs.begin(run, "--epochs", "9", "--patience", "1", "--set", "lr0=1e-9", "--set", "warmup_epochs=0").code == 0
    )
    meta = read_checkpoint(run / "weights" / "last.safetensors")[1]
    assert meta["epoch"] < 9
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    again = runs.resume(run)
    assert again.code == 0 and "nothing to do" in again.out
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert runs.resume(run, "--patience", str(meta["epoch"] + 1)).code == 0  # a larger patience goes on
    assert read_checkpoint(run / "weights" / "last.safetensors")[1]["epoch"] > meta["epoch"]


def test_auto_begins_continues_and_ends(runs):
    """One command for a queue that starts it again and again."""
    run = runs.new()
    assert runs.begin(run, "--resume", "auto", env={VARIABLE: "step:4:SIGTERM"}).code == 75
    again = runs.begin(run, "--resume", "auto")
    assert again.code == 0 and not differences(state(run), runs.undisturbed())
    last = runs.begin(run, "--resume", "auto")
    assert last.code == 0 and "nothing to do" in last.out
    assert [folder.name for folder in run.parent.iterdir()] == ["exp"]


def test_what_torchrun_starts_again_continues(runs):
    run = runs.new()
    assert runs.begin(run, env={VARIABLE: "step:4:SIGTERM"}).code == 75
    assert runs.begin(run, env={"TORCHELASTIC_RESTART_COUNT": "1"}).code == 0
    assert not differences(state(run), runs.undisturbed())


def test_what_torchrun_starts_again_is_no_older_run(tmp_path, stopped, monkeypatch):
    """Killed before its first save, a run has nothing to continue; last week's of the same name is another one."""
    shutil.copytree(stopped, tmp_path / "exp")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_resumed(str(tmp_path), "exp", None).path.parents[1].name == "exp"
    (tmp_path / "exp2" / "weights").mkdir(parents=True)
    assert find_resumed(str(tmp_path), "exp", None) is None
    assert find_resumed(str(tmp_path), "exp", "auto").path.parents[1].name == "exp"


def test_auto_finds_a_name_with_brackets(tmp_path, stopped):
    shutil.copytree(stopped, tmp_path / "yolo[416]*")
    assert find_resumed(str(tmp_path), "yolo[416]*", "auto").path.parents[1].name == "yolo[416]*"


def test_auto_takes_the_newest_by_number(tmp_path, stopped):
    """Not by a clock (T27), and not a run whose name only begins alike."""
    for name in ("exp", "exp2", "exp10", "exp10b", "expert"):
        shutil.copytree(stopped, tmp_path / name)
    for name, clock in (("exp10", 1), ("exp2", 2**31), ("expert", 2**31 + 1)):
        os.utime(tmp_path / name / "weights", (clock, clock))
    assert find_resumed(str(tmp_path), "exp", "auto").path.parents[1].name == "exp10"
    assert find_resumed(str(tmp_path), "nobody", "auto") is None


OTHER_PLACES = [
    {},
    {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "LANG": "C", "PYTHONHASHSEED": "7", "HOSTNAME": "elsewhere"},
]


def test_t16_the_same_seed_twice(runs, tmp_path, seen):
    """Two interpreters, other working folder, host name, locale, time zone and hash seed."""
    states = []
    for number, env in enumerate(OTHER_PLACES):
        cwd = tmp_path / str(number)
        cwd.mkdir()
        ended = command("train.py", *runs.arguments, "--project", cwd / "runs", cwd=cwd, timeout=120, **env)
        assert ended.code == 0, ended.err
        states.append(state(cwd / "runs" / "exp"))
    assert not differences(*states) and not differences(states[0], runs.undisturbed())
    seen("bitwise equal under other cwd, host name, locale, time zone, hash seed")


def test_exit_codes_are_those_of_the_contract():
    assert EXIT_CODES == {signal.SIGTERM: 75, signal.SIGINT: 130}

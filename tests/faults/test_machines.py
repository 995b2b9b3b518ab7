"""A run on a strange machine: clocks that jump, decoration that fails, no reader, no asserts, other libraries."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import ROOT, command, refused
from run_state import differences, state

from utils.fitness import Best
from utils.optim import SCHEDULES, Optim, rates
from utils.run import select_device
from utils.timing import Timer, Waiting

SOURCES = [ROOT / "train.py", *sorted((ROOT / "utils").rglob("*.py")), *sorted((ROOT / "models").rglob("*.py"))]


# ---------------------------------------------------------------------------------------------- clocks


def jumping_clock() -> None:
    """A wall clock that goes back an hour at every look."""
    start, looks = time.time(), []

    def jump() -> float:
        looks.append(1)
        return start - 3600 * len(looks)

    time.time = jump


def test_t27_a_clock_that_jumps(runs, seen):
    run = runs.new()
    ended = runs.begin(run, before=jumping_clock)
    assert ended.code == 0 and not differences(state(run), runs.undisturbed())
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(0 <= row["time/wait"] <= 1 and 0 < row["time/seconds"] < 60 for row in rows)
    seen("durations are monotonic, the result is equal")


def test_t27_nobody_asks_the_wall_clock():
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                asked = (node.value.id, node.attr)
                told = file.name == "train.py" and asked == ("datetime", "now")  # --dry-run says when a run would end
                assert told or asked not in {("time", "time"), ("datetime", "now"), ("datetime", "today")}, (
                    f"{file}:{node.lineno}"
                )


def test_t27_stopwatches(monkeypatch):
    jumping_clock_values = iter([5.0, 4.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr(time, "time", lambda: next(jumping_clock_values))
    timer, waiting = Timer(), Waiting([1, 2])
    with timer("x"):
        assert list(waiting) == [1, 2]
    assert timer.seconds["x"] >= waiting.seconds >= 0


def test_property_13_rates_depend_on_the_step_alone():
    for schedule in SCHEDULES:
        optim = Optim(schedule=schedule)
        forward = [rates(optim, step, 7, 5) for step in range(35)]
        assert [rates(optim, step, 7, 5) for step in reversed(range(35))] == forward[::-1]


def test_nan_is_never_best():
    best = Best()
    assert not best.update(float("nan"), 0) and best.epoch == -1
    assert best.update(0.5, 1) and not best.update(0.5, 2) and not best.update(float("nan"), 3)
    other = Best()
    other.restore(best.as_dict())
    assert other == best and best.epoch == 1


# ---------------------------------------------------------------------------------------------- decoration


def broken_tensorboard() -> None:
    from torch.utils import tensorboard

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    tensorboard.SummaryWriter.add_scalar = fail


def broken_plots() -> None:
    from utils import gallery, plots

    def fail(*args, **options):
        raise ZeroDivisionError("no curve")

    plots.save_results_png = plots.save_evaluation_plots = plots.save_labels_png = gallery.batch_mosaic = fail


def no_tensorboard() -> None:
    sys.modules["torch.utils.tensorboard"] = None
    sys.modules["tensorboard"] = None


def no_matplotlib() -> None:
    for name in ("matplotlib", "pandas", "seaborn", "scipy"):
        sys.modules[name] = None


@pytest.mark.parametrize(
    ("before", "warnings"),
    [
        pytest.param(broken_tensorboard, 1, id="T28-tensorboard-fails"),
        pytest.param(no_tensorboard, 1, id="T28-no-tensorboard"),
        pytest.param(broken_plots, 6, id="T28-plots-fail"),
        pytest.param(no_matplotlib, 0, id="T28-no-matplotlib"),
    ],
)
def test_decoration_cannot_end_a_run(before, warnings, runs, seen):
    run = runs.new()
    ended = runs.begin(run, before=before, pictures=before is broken_plots)
    assert ended.code == 0, ended.err
    said = [line for line in ended.out.splitlines() if "failed and is left out" in line]
    assert len(said) == len(set(said)) == warnings, said
    assert not differences(state(run), runs.undisturbed())
    seen("; ".join(said) or "not needed")


# ---------------------------------------------------------------------------------------------- libraries


def without_torchvision() -> None:
    """As where its wheel does not fit the one of torch: importing it fails."""

    class Refusing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.meta_path.insert(0, Refusing())


def test_t30_torchvision_is_not_needed(runs, seen):
    run = runs.new()
    ended = runs.begin(run, before=without_torchvision)
    assert ended.code == 0 and not differences(state(run), runs.undisturbed())
    seen("not needed")


@pytest.mark.slow
def test_t29_no_warning_of_what_libraries_will_take_away(runs, tmp_path, seen):
    """One epoch, a resume, an evaluation and a detection: nothing of ours calls what will not be there next year."""
    data = Path(runs.arguments[runs.arguments.index("--data") + 1])
    run, weights = (
        tmp_path / "train" / "exp",
        ["--weights", tmp_path / "train" / "exp" / "weights" / "best.safetensors"],
    )
    steps = [
        ["train.py", *runs.arguments, "--epochs", "1", "--project", tmp_path / "train"],
        ["train.py", "--resume", run, "--epochs", "2"],
        ["test.py", *weights, "--data", data, "--project", tmp_path / "test"],
        ["detect.py", *weights, "--source", data.parent / "images" / "val", "--project", tmp_path / "detect"],
    ]
    for arguments in steps:
        ended = command(*arguments, timeout=120, PYTHONWARNINGS="default")
        assert ended.code == 0, ended.err
        assert not [line for line in ended.err.splitlines() if str(ROOT) in line and ".venv" not in line], ended.err
    seen(f"no warning from train, resume, test, detect with torch {torch.__version__}")


@pytest.mark.parametrize("text", ["3", "cuda:7", "99"], ids=lambda text: f"T31-{text}")
def test_no_such_device(text, seen):
    if torch.cuda.device_count() > int(text.removeprefix("cuda:")):
        pytest.skip("this machine has so many GPUs")
    line = refused(lambda: select_device(text), where=f"--device {text}", says="no such GPU")
    assert f"{torch.cuda.device_count()} found" in line and "--device cpu" in line
    seen(line)


@pytest.mark.parametrize("text", ["gpu", "-1", "0,1", "cuda:x", "mps"], ids=lambda text: f"T31-{text}")
def test_no_device_at_all(text):
    refused(lambda: select_device(text), where=f"--device {text}")


def test_t31_as_a_user_sees_it(runs):
    run = runs.new()
    ended = runs.begin(run, "--device", "63")
    assert ended.code == 2 and "no such GPU" in ended.error_line() and not run.exists()


OPTIMISED = [
    (["--cfg", "nonesuch.cfg"], 2),
    (["--set", "loss.gian=1"], 2),
    (["--batch-size", "0"], 2),
    (["--img-size", "65"], 2),
    ([], 0),
]


def test_t32_without_asserts(runs, tmp_path, seen):
    """python -O: the same refusals, the same result."""
    script = f"""
import contextlib, io, sys
sys.path.insert(0, {str(ROOT)!r})
assert False, "-O is not on"
import train
from utils.errors import run_main
for number, flags in enumerate({[flags for flags, _ in OPTIMISED]!r}):
    sys.argv = ["train.py", *{runs.arguments!r}, "--project", {str(tmp_path / "runs")!r}, *flags]
    try:
        run_main(train.main)
        print("CODE", 0)
    except SystemExit as stop:
        print("CODE", stop.code or 0)
"""
    ended = command("-O", "-c", script, timeout=120)
    codes = [int(line.split()[1]) for line in ended.out.splitlines() if line.startswith("CODE")]
    assert codes == [code for _, code in OPTIMISED], ended.err
    assert "Traceback" not in ended.err and not differences(state(tmp_path / "runs" / "exp"), runs.undisturbed())
    seen("python -O: the same exit codes, an equal result")


# ---------------------------------------------------------------------------------------------- nobody reads


def start(arguments: list[object], project: Path, stdout, **env: str) -> subprocess.Popen:
    line = [sys.executable, str(ROOT / "train.py"), *map(str, arguments), "--project", str(project)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(line, stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT, env=env)


def test_t33_the_reader_leaves(runs, tmp_path, seen):
    """As ``train.py | head -1`` in a terminal that knows only ASCII."""
    running = start(
        runs.arguments, tmp_path, subprocess.PIPE, LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    )
    running.stdout.readline()
    running.stdout.close()
    err = running.stderr.read().decode()
    assert running.wait(60) == 0, err
    assert not differences(state(tmp_path / "exp"), runs.undisturbed())
    assert "BrokenPipe" not in err and "UnicodeEncodeError" not in err
    seen("goes on, exit 0, an equal result")


STEADY = """
import os, signal, sys
sys.path.insert(0, {root!r})
from utils.console import steady_output
{before}
steady_output()
for number in range(3):
    print("name with ünïcödé \\u2603 \\udc80", "x" * 100_000)
    print("to stderr", file=sys.stderr)
sys.stdout.flush()
"""


@pytest.mark.parametrize(
    ("redirect", "env"),
    [
        pytest.param(">&-", {}, id="T33-stdout-closed"),
        pytest.param(">&- 2>&-", {}, id="T33-both-closed"),
        pytest.param("> /dev/full", {}, id="T33-disk-full"),
        pytest.param("| true", {}, id="T33-broken-pipe"),
        pytest.param("2>&1 | true", {}, id="T33-both-broken"),
        pytest.param("> /dev/null", {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, id="T33-ascii"),
    ],
)
def test_output_that_goes_nowhere(redirect, env, tmp_path):
    if "/dev/full" in redirect and not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "x.py").write_text(STEADY.format(root=str(ROOT), before=""))
    line = f"set -o pipefail; {sys.executable} {tmp_path / 'x.py'} {redirect}"
    ended = subprocess.run(["bash", "-c", line], env={**os.environ, **env}, capture_output=True, text=True)
    assert ended.returncode == 0 and "Error" not in ended.stderr, ended.stderr

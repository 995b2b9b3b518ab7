"""train.py as a person uses it: a run on a few pictures, its files, its continuation, two processes, and mistakes."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "utils"))

from tiny import CFG, write_pictures  # noqa: E402

import train  # noqa: E402
from utils.checkpoint import read_checkpoint, without_prefix  # noqa: E402
from utils.errors import UserError  # noqa: E402

PLAIN = ["--device", "cpu", "--precision", "float32", "--workers", "0", "--batch-size", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with tiny.cfg, data.yaml and its pictures."""
    folder = tmp_path_factory.mktemp("train")
    write_pictures(folder)
    (folder / "tiny.cfg").write_text(CFG)
    return folder


def run(monkeypatch, place: Path, *more: str, name: str = "exp") -> Path:
    """Call train.py in this process; returns the run's folder."""
    argv = ["train.py", "--cfg", str(place / "tiny.cfg"), "--data", str(place / "data.yaml"), *PLAIN]
    argv += ["--project", str(place / "runs"), "--name", name, *more]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    return place / "runs" / name


def rows(folder: Path) -> list[dict]:
    return list(csv.DictReader((folder / "results.csv").open()))


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """A run of three epochs."""
    with pytest.MonkeyPatch.context() as patch:
        return run(patch, place, "--epochs", "3", name="finished")


def test_a_run_leaves_what_it_promises(finished):
    assert [row["epoch"] for row in rows(finished)] == ["0", "1", "2"]
    for name in ("args.yaml", "recipe.yaml", "network.cfg", "log.jsonl", "results.png", "labels.png", "tensorboard"):
        assert (finished / name).exists(), name
    for name in (
        "train_batch0.jpg",
        "val_batch0_labels.jpg",
        "val_batch0_pred.jpg",
        "confusion_matrix.png",
        "report.html",
    ):
        assert (finished / name).stat().st_size > 0, name
    page = (finished / "report.html").read_text()
    assert page.count("<h2>") == 9 and "data:image/png" in page and "started from: scratch" in page
    events = b"".join(file.read_bytes() for file in (finished / "tensorboard").iterdir())
    assert events.count(b"val_batch0_epoch") == events.count(b"head/stride16/obj") == 3
    names = {file.name for file in (finished / "weights").iterdir()}
    assert names >= {"last.safetensors", "best.safetensors", "best.weights"}
    tensors, meta = read_checkpoint(finished / "weights" / "last.safetensors")
    assert meta["names"] == ["square", "bar"] and meta["epoch"] == 3 and meta["cfg"].count("[convolutional]") == 3
    assert without_prefix("ema", tensors).keys() == without_prefix("model", tensors).keys()


def test_resume_extends_a_finished_run(place, finished, monkeypatch):
    shutil.copytree(finished, place / "runs" / "more")
    folder = run(monkeypatch, place, "--resume", str(place / "runs" / "more"), "--epochs", "5", name="more")
    assert [row["epoch"] for row in rows(folder)] == ["0", "1", "2", "3", "4"]
    assert rows(folder)[:3] == rows(finished)
    meta = read_checkpoint(folder / "weights" / "last.safetensors")[1]
    assert meta["epoch"] == 5 and meta["args"]["epochs"] == 5


def test_resume_falls_back_to_an_older_good_checkpoint(place, finished, monkeypatch, capsys):
    folder = place / "runs" / "damaged"
    shutil.copytree(finished, folder)
    last = folder / "weights" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-50])
    os.utime(folder / "weights" / "best.safetensors", (1, 1))
    run(monkeypatch, place, "--resume", str(folder), "--epochs", "4", name="damaged")
    assert "passed over" in capsys.readouterr().err
    assert [row["epoch"] for row in rows(folder)] == ["0", "1", "2", "3"]


def test_a_finished_run_is_not_repeated(place, finished, monkeypatch, capsys):
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    run(monkeypatch, place, "--resume", str(finished), "--epochs", "3")
    assert "3 epochs are done, nothing to do" in capsys.readouterr().out
    assert before == {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "flags",
    [
        ["--nosave", "--noval"],
        ["--nosave", "--patience", "1"],
        ["--patience", "1"],
        ["--rect", "--image-weights", "--cache"],
    ],
)
def test_flags(place, monkeypatch, flags):
    folder = run(monkeypatch, place, "--epochs", "3", *flags, name="".join(flags).replace("-", "")[:20])
    assert (folder / "weights" / "last.safetensors").exists()


def test_assignments_are_shown_after_every_evaluation(place, monkeypatch):
    folder = run(monkeypatch, place, "--epochs", "1", "--show-assignments", name="shown")
    assert (folder / "assignments0.jpg").stat().st_size > 10_000
    events = b"".join(file.read_bytes() for file in (folder / "tensorboard").iterdir())
    assert b"assignments0" in events


def test_start_from_weights_with_one_class_and_frozen_layers(place, finished, monkeypatch, capsys):
    weights = finished / "weights" / "best.weights"
    folder = run(
        monkeypatch, place, "--weights", str(weights), "--single-cls", "--freeze", "1", "--epochs", "1", name="single"
    )
    said = capsys.readouterr().out
    assert "classes 2 -> 1" in said and "filters 14 -> 12" in said and "transferred" in said
    tensors, meta = read_checkpoint(folder / "weights" / "last.safetensors")
    assert meta["names"] == ["object"]
    before = read_checkpoint(finished / "weights" / "best.safetensors")[0]
    assert torch.equal(tensors["model.layers.0.conv.weight"], before["ema.layers.0.conv.weight"])


def test_other_sizes_reach_the_checkpoint(place, monkeypatch):
    folder = run(monkeypatch, place, "--img-size", "64", "96", "--epochs", "1", name="wide")
    cfg = read_checkpoint(folder / "weights" / "last.safetensors")[1]["cfg"]
    assert "width=96" in cfg and "height=64" in cfg and "letter_box=1" in cfg


def test_two_processes_equal_one(place, monkeypatch):
    """The same global batches on two gloo processes: the same weights up to the order of sums."""
    options = ["--epochs", "2", "--set", "lr0=0.02", "--set", "nominal_batch=4"]
    one = run(monkeypatch, place, *options, name="one")
    script = [str(ROOT / "train.py"), "--cfg", str(place / "tiny.cfg"), "--data", str(place / "data.yaml"), *PLAIN]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, *script, "--project", str(place / "runs"), "--name", "two", *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (read_checkpoint(folder / "weights/last.safetensors")[0] for folder in (one, place / "runs" / "two"))
    for name, tensor in ours.items():
        if name.startswith(("model.", "ema.", "optim.")):
            torch.testing.assert_close(
                theirs[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert len(rows(place / "runs" / "two")) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cfg", "nonesuch.cfg"], "no such cfg"),
        (["--data", "nonesuch.yaml"], "no such data set"),
        (["--weights", "nonesuch.weights"], "no such weights file"),
        (["--hyp", "nonesuch"], "no such recipe"),
        (["--set", "learning_rate=1"], "unknown hyper-parameter"),
        (["--set", "loss.gian=1"], "unknown key 'gian'"),
        (["--set", "assigner=simotta"], "unknown assigner 'simotta'"),
        (["--img-size", "65"], "65x65 is no multiple of the network's stride 16"),
        (["--freeze", "0", "99"], "no such layer"),
        (["--freeze", "4"], "nothing is left to be taught"),
        (["--device", "99"], "no such GPU"),
        (["--sync-bn"], "on GPUs only"),
        (["--precision", "fp16"], "needs a CUDA device"),
        (["--resume", "nonesuch"], "no readable checkpoint"),
        (["--resume", __file__], "not in the weights folder of a run"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(place, monkeypatch, flags, message, tmp_path):
    with pytest.raises(UserError) as error:
        run(monkeypatch, place, "--project", str(tmp_path / "runs"), *flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_mistake_on_the_command_line_is_one_line_and_exit_2(tmp_path):
    (tmp_path / "file").write_text("x")
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", str(tmp_path / "none.cfg")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_project_that_cannot_be_written_is_exit_5(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot make the run folder") as error:
        run(monkeypatch, place, "--project", str(tmp_path / "file"))
    assert error.value.exit_code == 5


def test_help_needs_no_torch():
    code = (
        "import sys, train\ntry: train.parse_args(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "--epochs" in done.stdout

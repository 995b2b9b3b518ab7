"""What the end of a run consists of, so that two runs can be compared, and how the tests start and continue one."""

from pathlib import Path

import numpy as np
from harness import Finished
from server import Server

from utils.checkpoint import read_checkpoint

COMPARED = (
    "cfg",
    "names",
    "recipe",
    "epoch",
    "step",
    "steps_done",
    "batches_done",
    "sums",
    "ema_updates",
    "best",
    "data",
)
WITH_NORM = ("filters=8\n", "filters=8\nbatch_normalize=1\n")  # of tiny.CFG: what a batch norm measures is state, too


def state(run: Path) -> dict[str, object]:
    """Every tensor's bytes, every counter, the table of results."""
    tensors, meta = read_checkpoint(run / "weights" / "last.safetensors")
    parts = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    best = {
        f"best {name}": tensor.numpy().tobytes()
        for name, tensor in read_checkpoint(run / "weights" / "best.safetensors")[0].items()
    }
    return parts | best | {key: meta[key] for key in COMPARED} | {"results.csv": (run / "results.csv").read_bytes()}


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of what is not the same."""
    return [
        name for name in one.keys() | other.keys() if name not in one or name not in other or one[name] != other[name]
    ]


def close(one: Path, other: Path, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Assert that two runs' weights, averages and optimisers are equal up to the order of sums."""
    ours, theirs = (read_checkpoint(run / "weights" / "last.safetensors")[0] for run in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name.startswith(("model.", "ema.", "optim.")):
            np.testing.assert_allclose(theirs[name].numpy(), tensor.numpy(), rtol=rtol, atol=atol, err_msg=name)


class Runs:
    """Runs of one command line, each in a project of its own."""

    def __init__(self, server: Server, arguments: list[str], folder: Path):
        self.server, self.arguments, self.folder, self.number = server, arguments, folder, 0
        self.whole = None

    def new(self) -> Path:
        """The folder that the next run will have."""
        self.number += 1
        return self.folder / str(self.number) / "exp"

    def begin(self, run: Path, *more: str, **options) -> Finished:
        return self.server.run("train.py", *self.arguments, "--project", run.parent, *more, **options)

    def resume(self, run: Path, *more: str, **options) -> Finished:
        return self.server.run("train.py", "--resume", run, *more, **options)

    def undisturbed(self) -> dict[str, object]:
        """The state at the end of a run that nothing happened to."""
        if self.whole is None:
            run = self.new()
            ended = self.begin(run)
            assert ended.code == 0, ended.err
            self.whole = state(run)
        return self.whole

    def assert_ends_equal(self, run: Path, *more: str, **options) -> Finished:
        """Continue a run that was stopped: it ends as the undisturbed one."""
        ended = self.resume(run, *more, **options)
        assert ended.code == 0, ended.err
        assert not differences(state(run), self.undisturbed())
        return ended

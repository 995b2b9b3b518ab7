"""Two gloo processes on the CPU: uneven data, one that dies, is told to stop, sees a NaN, or sees other data."""

import json
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from harness import command, refused
from run_state import Runs, close, differences, state
from server import Running
from tiny import write_pictures

from utils import distributed
from utils.checkpoint import read_checkpoint
from utils.datasets.loader import TrainSampler
from utils.failpoints import VARIABLE

LIMIT = 30  # seconds in which survivors must have ended


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_two(
    runs: Runs, run: Path, *more: str, plans: tuple[str, str] = ("", ""), arguments=None, **options
) -> list[Running]:
    """A run of two processes under way; ``plans``: what each of them suffers."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    arguments = arguments or [runs.arguments] * 2
    return [
        runs.server.start(
            "train.py",
            *arguments[rank],
            *("--project", run.parent),
            *more,
            env=group | {"RANK": str(rank), "LOCAL_RANK": str(rank), VARIABLE: plans[rank]},
            **options,
        )
        for rank in range(2)
    ]


def both(running: list[Running], timeout: float = 60) -> list:
    return [process.wait(timeout) for process in running]


def meta(run: Path) -> dict:
    return read_checkpoint(run / "weights" / "last.safetensors")[1]


@pytest.fixture(scope="module")
def two(runs):
    """An undisturbed run of two processes."""
    run = runs.new()
    ended = both(start_two(runs, run))
    assert [end.code for end in ended] == [0, 0], ended
    return run


def test_p8_two_equal_one(runs, two, tmp_path, seen):
    """The same global batches, without a batch norm, which would measure halves of them."""
    plain = Runs(runs.server, [*runs.arguments, "--cfg", str(tmp_path / "plain.cfg")], tmp_path)
    text = (runs.folder / "norm.cfg").read_text().replace("batch_normalize=1\n", "")
    (tmp_path / "plain.cfg").write_text(text)
    one, pair = plain.new(), plain.new()
    assert plain.begin(one).code == 0 and [end.code for end in both(start_two(plain, pair))] == [0, 0]
    close(one, pair, rtol=1e-5, atol=1e-6)
    assert meta(one)["step"] == meta(pair)["step"] == 9
    seen("equal to 1e-6; with a batch norm each process measures its half (--sync-bn on GPUs)")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("num", [1, 2, 5, 16, 33])
def test_p1_every_picture_once_and_equal_steps(num, world):
    """Property 8, for batch sizes and epochs, too; and no rank waits for another."""
    for batch in (1, 2, 7):
        for epoch in (0, 3):
            draws = []
            for rank in range(world):
                sampler = TrainSampler(num, batch, size=(64, 64), seed=5, rank=rank, world=world)
                sampler.set_epoch(epoch)
                draws.append(list(sampler))
                assert draws[-1] == list(sampler) and len(draws[-1]) == len(sampler)
            assert len({len(mine) for mine in draws}) == 1
            assert all(len({len(batches[n]) for batches in draws}) == 1 for n in range(len(draws[0])))
            seen_indices = [draw.index for mine in draws for group in mine for draw in group]
            assert set(seen_indices) == set(range(num)) and len(seen_indices) == -(-num // world) * world
            positions = [draw.position for mine in draws for group in mine for draw in group]
            assert sorted(positions) == list(range(len(seen_indices)))


def test_p1_uneven_data_does_not_hang(runs, tmp_path, seen):
    """Five pictures, batches of two on two processes: both make the same steps."""
    data = write_pictures(tmp_path / "data", num=5)
    run = runs.new()
    arguments = [*runs.arguments, "--data", str(data), "--epochs", "2"]
    ended = both(start_two(runs, run, arguments=[arguments] * 2))
    assert [end.code for end in ended] == [0, 0], ended
    assert meta(run)["step"] == 6
    seen("equal step counts, exit 0")


@pytest.mark.parametrize("rank", [0, 1])
def test_p2_a_killed_process(rank, runs, two, seen):
    """The other one ends by itself; started again, the run ends as if nothing had happened."""
    run = runs.new()
    plans = ["", ""]
    plans[rank] = "step:5:SIGKILL"
    ended = both(start_two(runs, run, plans=tuple(plans)), LIMIT)
    survivor = ended[1 - rank]
    assert ended[rank].code == -signal.SIGKILL and survivor.code == 5, survivor.err
    assert "another process of this run is gone" in survivor.error_line()
    again = both(start_two(runs, run, plans=("", ""), arguments=[[*runs.arguments, "--resume", "auto"]] * 2))
    assert [end.code for end in again] == [0, 0], again
    assert not differences(state(run), state(two))
    seen(survivor.error_line())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("rank", [0, 1])
def test_p3_a_signal_at_one_process(rank, name, runs, two, seen):
    run, plans = runs.new(), ["", ""]
    plans[rank] = f"step:5:{name}"
    code = {"SIGTERM": 75, "SIGINT": 130}[name]
    ended = both(start_two(runs, run, plans=tuple(plans)), LIMIT)
    assert [end.code for end in ended] == [code, code], ended
    assert meta(run)["step"] == 5
    again = both(start_two(runs, run, arguments=[[*runs.arguments, "--resume", "auto"]] * 2))
    assert [end.code for end in again] == [0, 0] and not differences(state(run), state(two))
    seen(f"both stop at the same step, exit {code}")


def test_p3_a_signal_while_the_first_evaluates(runs, two):
    from test_signals import signal_in_evaluation

    run = runs.new()
    ended = both(start_two(runs, run, before=signal_in_evaluation), LIMIT)
    assert [end.code for end in ended] == [75, 75], ended
    assert (meta(run)["epoch"], meta(run)["steps_done"]) == (0, 3)
    again = both(start_two(runs, run, arguments=[[*runs.arguments, "--resume", "auto"]] * 2))
    assert [end.code for end in again] == [0, 0] and not differences(state(run), state(two))


@pytest.mark.parametrize("rank", [0, 1])
def test_p4_nan_on_one_process(rank, runs, seen):
    """Left out on both: their weights stay the same, so the run can be continued by one process."""
    run, plans = runs.new(), ["", ""]
    plans[rank] = "step:5:nan"
    ended = both(start_two(runs, run, plans=tuple(plans)))
    assert [end.code for end in ended] == [0, 0], ended
    assert "epoch 1, step 4 is left out: loss 'box' is nan" in ended[0].out
    facts = json.loads((run / "bad_batch.json").read_text())
    assert len(facts["pictures"]) == 2  # of the batch of both
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["steps/skipped"] for row in rows] == [0, 1, 0]
    seen("left out on both")


def test_p4_three_in_a_row_end_both(runs):
    run = runs.new()
    ended = both(start_two(runs, run, plans=("", "step:7+:nan")))
    assert [end.code for end in ended] == [4, 4], ended
    assert ended[0].out.count("learning rate halved") == 1


def forbid_writing() -> None:
    """On all processes but the first, every write into a run is an error."""
    import os

    if os.environ["RANK"] == "0":
        return
    from utils import files, store

    def forbidden(*args, **options):
        raise AssertionError("a process that is not the first writes")

    files.atomic_write = store.atomic_write = files.write_text = forbidden


def test_p5_only_the_first_process_writes(runs, two, seen):
    run = runs.new()
    ended = both(start_two(runs, run, before=forbid_writing))
    assert [end.code for end in ended] == [0, 0] and not differences(state(run), state(two))
    seen("one writer")


def test_p5_other_checkpoints_are_noticed(runs, tmp_path):
    """Two machines whose file systems do not show the same run."""
    run = runs.new()
    assert both(start_two(runs, run, plans=("step:5:SIGTERM", "")))[0].code == 75
    other = shutil.copytree(run, tmp_path / "exp")
    shutil.copyfile(other / "weights" / "previous.safetensors", other / "weights" / "last.safetensors")
    ended = both(start_two(runs, run, arguments=[["--resume", str(run)], ["--resume", str(other)]]), LIMIT)
    assert [end.code for end in ended] == [2, 2] and "checkpoint is not that of process 0" in ended[0].error_line()


def slow_evaluation() -> None:
    from datetime import timedelta

    from models import predictor
    from utils import distributed

    distributed.TIMEOUT = timedelta(seconds=1)
    predict = predictor.Predictor.__call__

    def slowly(self, images):
        import time

        time.sleep(1.5)
        return predict(self, images)

    predictor.Predictor.__call__ = slowly


@pytest.mark.slow
def test_p6_the_first_process_evaluates_for_long(runs, seen):
    """Longer than a collective may take: none is pending."""
    run = runs.new()
    ended = both(start_two(runs, run, "--epochs", "2", before=slow_evaluation), 120)
    assert [end.code for end in ended] == [0, 0], ended
    seen("the others wait at a store, as long as it takes")


def test_p7_other_data_on_one_machine(runs, tmp_path, seen):
    one, other = (write_pictures(tmp_path / name) for name in ("one", "other"))
    label = other.parent / "labels" / "train" / "0.txt"
    label.write_text("\n".join(label.read_text().splitlines()[:1]) + "\n")
    arguments = [[*runs.arguments, "--data", str(data)] for data in (one, other)]
    run = runs.new()
    ended = both(start_two(runs, run, arguments=arguments), LIMIT)
    assert [end.code for end in ended] == [2, 2]
    assert ended[0].error_line().startswith("error: process 1: data is not that of process 0") and not run.exists()
    seen(ended[0].error_line())


def test_p7_a_missing_file_on_one_machine(runs, tmp_path, seen):
    one, other = (write_pictures(tmp_path / name) for name in ("one", "other"))
    (other.parent / "images" / "train" / "0.png").unlink()
    (other.parent / "labels" / "train" / "0.txt").unlink()
    arguments = [[*runs.arguments, "--data", str(data)] for data in (one, other)]
    run = runs.new()
    ended = both(start_two(runs, run, arguments=arguments), LIMIT)
    assert [end.code for end in ended] == [2, 2] and "data is not that of process 0" in ended[1].error_line()
    assert not run.exists()


def test_p7_one_process_that_fails_ends_the_others(runs, tmp_path):
    arguments = [[*runs.arguments], [*runs.arguments, "--data", "nonesuch.yaml"]]
    run = runs.new()
    ended = both(start_two(runs, run, arguments=arguments), LIMIT)
    assert [end.code for end in ended] == [5, 2] and not run.exists()
    assert "another process failed: process 1: nonesuch.yaml" in ended[0].error_line()


@pytest.fixture
def quick_join(monkeypatch):
    from datetime import timedelta

    monkeypatch.setattr(distributed, "JOIN", timedelta(seconds=2))
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, value)


def join():
    with distributed.process_group(torch.device("cpu")):
        raise AssertionError("joined nobody")


def test_p9_a_port_in_use(quick_join, monkeypatch, seen):
    monkeypatch.setenv("RANK", "0")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        line = refused(join, where="127.0.0.1:", says="cannot join the other processes", exit_code=5)
    seen(line)


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"], ids=["P9-nobody-there", "P9-no-such-host"])
def test_a_wrong_address(address, quick_join, monkeypatch, seen):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", address)
    line = refused(join, where=address, says="cannot join the other processes", exit_code=5)
    assert "MASTER_ADDR" in line
    seen(line)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT", "RANK"], ids=lambda name: f"P9-no-{name}")
def test_an_incomplete_environment(missing, quick_join, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv(missing)
    refused(join, says=missing, exit_code=5)


def test_p10_another_number_of_processes(runs, two, seen):
    """Begun by two, continued by one: the same order of pictures and the same chance, so the same up to sums."""
    run = runs.new()
    ended = both(start_two(runs, run, plans=("step:5:SIGTERM", "")))
    assert [end.code for end in ended] == [75, 75]
    assert runs.resume(run).code == 0
    assert meta(run)["step"] == 9 and len((run / "results.csv").read_text().splitlines()) == 4
    # the batch norm measures whole batches from there on: the weights are near, not equal
    close(run, two, rtol=0.5, atol=0.05)
    pair = [TrainSampler(12, 2, size=(64, 64), seed=1, rank=rank, world=2) for rank in range(2)]
    alone = TrainSampler(12, 4, size=(64, 64), seed=1)
    for sampler in (*pair, alone):
        sampler.set_epoch(2, 1)
    assert [[*one, *other] for one, other in zip(*pair)] == list(alone)
    seen("allowed; the same draws from the same place on")


@pytest.mark.slow
def test_p2_what_torchrun_starts_again(runs, two, tmp_path, seen):
    """The real launcher: a process dies, torchrun starts all again, the run ends as if nothing had happened."""
    run, once = runs.new(), tmp_path / "once"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    script = [str(Path(__file__).with_name("killed_once.py")), *runs.arguments, "--project", run.parent]
    done = command(*launch, *script, timeout=120, KILLED_ONCE=str(once))
    assert done.code == 0 and once.exists(), done.err[-3000:]
    assert [folder.name for folder in run.parent.iterdir()] == ["exp"]
    assert not differences(state(run), state(two))
    seen("torchrun --max-restarts 1: the same run goes on, equal")

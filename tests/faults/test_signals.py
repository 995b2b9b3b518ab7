"""SIGTERM, SIGINT and SIGUSR1 at any moment: the step is finished, the state saved, the exit code says why."""

import os
import signal
import sys

import pytest
from run_state import differences, state

from utils.checkpoint import read_checkpoint
from utils.errors import Stopped
from utils.failpoints import VARIABLE
from utils.interrupts import EXIT_CODES, Interrupts

AT_ONCE = 8  # seconds in which a run must have ended that would otherwise sleep much longer


def meta(run):
    return read_checkpoint(run / "weights" / "last.safetensors")[1]


def signal_in_evaluation() -> None:
    """SIGTERM while the second picture of a validation is looked at."""
    from models import predictor

    predict = predictor.Predictor.__call__

    def disturbed(self, images):
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, images)

    predictor.Predictor.__call__ = disturbed


def signal_in_last_chapter() -> None:
    """SIGTERM when the best weights are written for Darknet."""
    from models import darknet_weights

    write = darknet_weights.write_weights

    def disturbed(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*args)

    darknet_weights.write_weights = disturbed


def signal_in_scan() -> None:
    """SIGTERM while the data set is read."""
    from utils.datasets import splits

    read = splits.read_dataset

    def disturbed(*args, **options):
        found = read(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    splits.read_dataset = disturbed


IN_TRAINING = {  # phase: the plan, the step that is saved
    "T3-warm-up": ("step:1:SIGTERM", 1),
    "T3-step": ("step:5:SIGTERM", 5),
    "T3-save": ("save.fsync:1:SIGTERM", 4),  # in the save of the first epoch's end: the next step is finished, too
    "T3-log": ("csv.append:1:SIGTERM", 4),
    "T4-once": ("step:5:SIGINT", 5),
}


@pytest.mark.parametrize(("plan", "step"), [pytest.param(*row, id=name) for name, row in IN_TRAINING.items()])
def test_a_signal_loses_no_step(plan, step, runs, seen):
    run = runs.new()
    ended = runs.begin(run, env={VARIABLE: plan}, timeout=10)
    name = plan.rpartition(":")[2]
    assert ended.code == EXIT_CODES[signal.Signals[name]] and "Traceback" not in ended.err
    assert f"stopped by {name}: saved at epoch" in ended.err and meta(run)["step"] == step
    runs.assert_ends_equal(run)
    seen(f"exit {ended.code}, {ended.err.strip().splitlines()[-1].partition('; ')[0]}")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"], ids=["T3-T7-full", "T4-T7-full"])
def test_a_save_that_fails_is_not_called_saved(name, runs, seen):
    """There is no later save to try again: exit 5, and what was saved before stays."""
    run = runs.new()
    ended = runs.begin(run, env={VARIABLE: f"step:5:{name},save.open:2:enospc"}, timeout=10)
    assert ended.code == 5 and "the last save failed" in ended.error_line() and "saved at" not in ended.err
    assert "warning: not saved" in ended.out and meta(run)["step"] == 3
    runs.assert_ends_equal(run)
    seen(f"exit {ended.code}, the save before it stays")


def test_t7_a_row_that_did_not_fit_is_written_before_the_end(runs):
    """The run that continues does not make that epoch again."""
    run = runs.new()
    assert runs.begin(run, env={VARIABLE: "csv.append:1:enospc,step:5:SIGTERM"}).code == 75
    assert len((run / "results.csv").read_text().splitlines()) == 2
    runs.assert_ends_equal(run)


def test_t3_in_an_evaluation(runs, seen):
    """The epoch's steps are kept, its evaluation is made again."""
    run = runs.new()
    ended = runs.begin(run, before=signal_in_evaluation, timeout=10)
    assert ended.code == 75, ended.err
    assert (meta(run)["epoch"], meta(run)["steps_done"], meta(run)["step"]) == (0, 3, 3)
    assert not (run / "results.csv").exists()
    runs.assert_ends_equal(run)
    seen("in an evaluation: exit 75, no step lost")


def test_t3_in_the_data_scan(runs, seen):
    run = runs.new()
    ended = runs.begin(run, before=signal_in_scan, timeout=10)
    assert ended.code == 75 and "stopped by SIGTERM: nothing to save" in ended.err
    assert not run.parent.exists()
    seen("in the data scan: exit 75, nothing written")


def test_t3_in_the_last_chapter(runs):
    """After the last epoch all is saved; the pictures and the summary are made when it continues."""
    run = runs.new()
    ended = runs.begin(run, before=signal_in_last_chapter)
    assert ended.code == 75 and meta(run)["epoch"] == 3 and not (run / "summary.json").exists()
    runs.assert_ends_equal(run)
    assert (run / "summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["T3-second-at-once", "T4-twice"])
def test_the_second_signal_ends_at_once(number, runs, tmp_path, seen):
    run = runs.new()
    running = runs.server.start(
        "train.py", *runs.arguments, "--project", run.parent, env={VARIABLE: "step:5:sleep=600"}
    )
    running.wait_for("epoch")
    while not (run / "results.csv").exists() and running.process.exitcode is None:
        running.process.join(0.05)
    running.process.join(0.3)  # until it sleeps in the fifth step
    running.signal(number)
    running.process.join(0.3)
    assert running.process.exitcode is None
    running.signal(number)
    assert running.wait(AT_ONCE).code == EXIT_CODES[number]
    assert meta(run)["step"] in (3, 4)  # what was saved stays
    runs.assert_ends_equal(run)
    seen("a second one ends the program at once")


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 on this system")
def test_t5_usr1_saves_and_goes_on(runs, seen):
    run = runs.new()
    ended = runs.begin(run, env={VARIABLE: "step:5:SIGUSR1,step:6:SIGKILL"})
    assert ended.code == -signal.SIGKILL and meta(run)["step"] == 5  # else it would be 3, the epoch's end
    runs.assert_ends_equal(run)
    undisturbed = runs.new()
    assert runs.begin(undisturbed, env={VARIABLE: "step:2:SIGUSR1"}).code == 0
    assert not differences(state(undisturbed), runs.undisturbed())
    seen("saved after the step, went on")


def test_t5_also_where_nothing_else_is_saved(runs):
    run = runs.new()
    runs.begin(run, "--nosave", env={VARIABLE: "step:2:SIGUSR1,step:3:SIGKILL"})
    assert meta(run)["step"] == 2


@pytest.mark.slow
def test_t6_stopped_for_ten_seconds(runs, seen):
    run = runs.new()
    running = runs.server.start("train.py", *runs.arguments, "--workers", "1", "--project", run.parent)
    running.wait_for("epoch")
    running.signal(signal.SIGSTOP)
    running.process.join(10)
    running.signal(signal.SIGCONT)
    ended = running.wait()
    assert ended.code == 0 and "warning" not in ended.err
    assert not differences(state(run), runs.undisturbed())
    seen("goes on, the result is equal")


# ---------------------------------------------------------------------------------------------- the noting itself


def test_before_the_first_step_a_request_is_followed_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught, Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")
    assert caught.value.exit_code == 75 and signal.getsignal(signal.SIGTERM) is before


def test_between_steps_a_request_is_noted_and_evaluations_end():
    with Interrupts() as interrupts, interrupts.between_steps():
        items = interrupts.watched(range(5))
        assert [next(items), next(items)] == [0, 1]
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.stop == signal.SIGINT
        with pytest.raises(Stopped) as caught:
            next(items)
    assert caught.value.exit_code == 130


def test_other_threads_install_nothing():
    import threading

    before, found = signal.getsignal(signal.SIGTERM), []

    def enter():
        with Interrupts():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before] and sys.exc_info()[0] is None

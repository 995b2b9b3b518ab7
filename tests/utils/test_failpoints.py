"""A failpoint does what the plan says, at the time it says, and nothing without a plan."""

import errno
import signal

import pytest

from utils.errors import UserError
from utils.failpoints import VARIABLE, failpoint


def test_nothing_without_a_plan(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert [failpoint("step", number) for number in range(3)] == [None] * 3


def test_the_nth_time_and_from_then_on(monkeypatch):
    monkeypatch.setenv(VARIABLE, "here:2:nan,there:3+:oom")
    assert [failpoint("here") for _ in range(4)] == [None, "nan", None, None]
    assert [failpoint("there", number) for number in (2, 3, 9)] == [None, "oom", "oom"]
    assert failpoint("elsewhere") is None


def test_errors_and_signals(monkeypatch):
    monkeypatch.setenv(VARIABLE, "disk:1:enospc,stop:1:SIGUSR1")
    with pytest.raises(OSError, match="No space left on device") as caught:
        failpoint("disk")
    assert caught.value.errno == errno.ENOSPC
    got = []
    old = signal.signal(signal.SIGUSR1, lambda *_: got.append("signal"))
    try:
        failpoint("stop")
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert got == ["signal"]


@pytest.mark.parametrize("plan", ["step", "step:x:nan", "step:1:rm", "step:1"])
def test_plans_that_cannot_be_read(monkeypatch, plan):
    monkeypatch.setenv(VARIABLE, plan)
    with pytest.raises(UserError, match="expected name:nth:action"):
        failpoint("step", 1)

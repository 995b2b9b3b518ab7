"""Places where a test makes the machine fail: a disk that fills, a process that is killed, a loss that is no number.

``MATCHBOX_FAULT="save.write:3:SIGKILL"`` kills the process at the third block that a save writes; several are joined by
commas. Without the variable a failpoint costs one look at the environment. ``docs/reliability.md`` lists the names.
"""

import errno
import os
import signal
import time
from collections import Counter

from utils.errors import UserError

VARIABLE = "MATCHBOX_FAULT"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1")
ERRORS = ("enospc", "eio", "eacces", "erofs")
CALLERS = ("nan", "oom")  # what only the caller can do

_passed: Counter[tuple[str, str]] = Counter()  # how often each failpoint was passed, under each plan


def failpoint(name: str, number: int | None = None) -> str | None:
    """Fail here if ``MATCHBOX_FAULT`` says so: ``name:nth:action``, ``nth`` counted from 1, ``nth+`` from there on.

    Actions: a signal to this process (SIGKILL SIGTERM SIGINT SIGUSR1), an OSError (enospc eio eacces erofs),
    ``sleep=SECONDS``, or one that the caller carries out (nan, oom), whose name is returned.

    Args:
        number: what ``nth`` is compared with; None: how often this process was here, this time included.

    Raises:
        OSError: the one asked for.
        UserError: the plan cannot be read.
    """
    plan = os.environ.get(VARIABLE)
    if not plan:
        return None
    if number is None:
        _passed[plan, name] += 1
        number = _passed[plan, name]
    for part in plan.split(","):
        place, nth, action = _parse(part)
        if place == name and (number >= int(nth[:-1]) if nth.endswith("+") else number == int(nth)):
            return _act(action, name)
    return None


def _parse(part: str) -> tuple[str, str, str]:
    """``"save.write:3+:eio"`` -> its three fields, checked."""
    fields = part.split(":")
    known = (*SIGNALS, *ERRORS, *CALLERS)
    if (
        len(fields) != 3
        or not fields[1].removesuffix("+").isdecimal()
        or not (fields[2] in known or fields[2].startswith("sleep="))
    ):
        raise UserError(VARIABLE, f"{part!r}, expected name:nth:action", f"actions: {', '.join(known)}, sleep=SECONDS")
    return fields[0], fields[1], fields[2]


def _act(action: str, name: str) -> str | None:
    if action in CALLERS:
        return action
    if action in ERRORS:
        number = getattr(errno, action.upper())
        raise OSError(number, f"{os.strerror(number)} (failpoint {name})")
    if action in SIGNALS:
        os.kill(os.getpid(), getattr(signal, action))
        return None
    time.sleep(float(action.removeprefix("sleep=")))
    return None

"""What a user sees when something is wrong: one line that says where, what was found, what was expected, and a cure."""

import difflib
import re
import sys
from collections.abc import Callable, Iterable

from utils.console import steady_output

# ends a line, drives a terminal, or cannot be encoded
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(ValueError):
    """Bad input from a user: a file, a flag, a value. Its text is complete; no traceback is needed to act on it.

    Args:
        where: file, ``file:line`` or flag that is wrong.
        message: what was found and what was expected.
        hint: the cure, if there is an obvious one.
    """

    exit_code = 2

    def __init__(self, where: object, message: str, hint: str = ""):
        self.where, self.message, self.hint = printable(where), message, hint
        super().__init__(printable(f"{self.where}: {message}" + (f" ({hint})" if hint else "")))

    def __reduce__(self):
        # from its text, not through __init__, which takes other arguments: a data worker's error must arrive as itself
        return _restore, (type(self), self.args, vars(self))


def _restore(cls, args, state):
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class QuarantineError(UserError):
    """Too much of a data set had to be set aside."""

    exit_code = 3


class DivergenceError(UserError):
    """The numbers of a run became non-finite and could not be recovered."""

    exit_code = 4


class ResourceError(UserError):
    """Disk, memory, shared memory or file descriptors ran out."""

    exit_code = 5


def printable(text: object) -> str:
    """``text`` on one line of any terminal: a file name may hold line ends, escape sequences and bytes of no text."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


class Stopped(BaseException):
    """A signal ended the program. Not an Exception: what survives failures must not survive this.

    Args:
        message: which signal, and what became of the work.
        exit_code: 75 (SIGTERM: to be continued) or 130 (SIGINT).
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'filters'?"`` for the closest known name, or the known names when nothing is close."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def run_main(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and leave with its exit code; a UserError is one line on stderr (``--debug``: in full).

    0 ended well; 2 bad input, 3 too much bad data, 4 diverged, 5 out of resources (the classes above); 75 stopped by
    SIGTERM, to be continued; 130 interrupted.
    """
    steady_output()
    try:
        main()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Stopped as stopped:
        print(f"stopped by {stopped}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

"""What a user sees when something is wrong: one line that says where, what was found, what was expected, and a cure."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input from a user: a file, a flag, a value. Its text is complete; no traceback is needed to act on it.

    Args:
        where: file, ``file:line`` or flag that is wrong.
        message: what was found and what was expected.
        hint: the cure, if there is an obvious one.
    """

    exit_code = 2

    def __init__(self, where: object, message: str, hint: str = ""):
        self.where, self.message, self.hint = str(where), message, hint
        super().__init__(f"{where}: {message}" + (f" ({hint})" if hint else ""))


class QuarantineError(UserError):
    """Too much of a data set had to be set aside."""

    exit_code = 3


class DivergenceError(UserError):
    """The numbers of a run became non-finite and could not be recovered."""

    exit_code = 4


class ResourceError(UserError):
    """Disk, memory, shared memory or file descriptors ran out."""

    exit_code = 5


def nearest(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'filters'?"`` for the closest known name, or the known names when nothing is close."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"

"""What a user sees when something is wrong: one line that says where, what was found, what was expected, and a cure."""

import difflib
import sys
from collections.abc import Callable, Iterable


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


def nearest(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'filters'?"`` for the closest known name, or the known names when nothing is close."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def run_main(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and leave with its exit code; a UserError is one line on stderr (``--debug``: in full).

    0 ended well; 2 bad input, 3 too much bad data, 4 diverged, 5 out of resources (the classes above); 130 interrupted.
    """
    try:
        main()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

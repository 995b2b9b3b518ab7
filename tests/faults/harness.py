"""What tests of faults share: a refusal is one line that names the place; a command is run as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COLLECTED = pytest.StashKey[list[tuple[Path, str]]]()  # (file, node) of every test of faults, the slow ones too


def refused(call: Callable[[], object], *, where: str = "", says: str = "", exit_code: int = 2) -> str:
    """The one line of the UserError that ``call`` must raise; it starts with ``where`` and contains ``says``."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert caught.value.exit_code == exit_code
    assert text.startswith(where), f"{text!r} does not start with {where!r}"
    assert says in text, f"{text!r} does not say {says!r}"
    return text


class Finished(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    def error_line(self) -> str:
        """The error as a user sees it: the last line, ``error: ...``, and no traceback above it."""
        assert "Traceback" not in self.err, self.err
        line = self.err.strip().splitlines()[-1]
        assert line.startswith("error: "), self.err
        return line


def command(*args: object, cwd: Path | None = None, timeout: float = 60, **env: str) -> Finished:
    """Run ``python ARGS`` (a script is named relative to the checkout), one thread, and wait for its end."""
    script, *rest = map(str, args)
    script = str(ROOT / script) if (ROOT / script).is_file() else script
    done = subprocess.run(
        [sys.executable, script, *rest],
        cwd=cwd or ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Finished(done.returncode, done.stdout, done.stderr)

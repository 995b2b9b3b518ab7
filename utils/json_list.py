"""A json file of a list that is written entry by entry: what comes without an end fills no memory."""

import json
from contextlib import ExitStack
from pathlib import Path

from utils.files import atomic_write


class JsonList:
    """``json.dumps(entries, indent=1)`` in a file, whole when it is closed; until then it is a ``.part`` beside it.

    Raises:
        ResourceError: it cannot be written; then nothing of it is left.
    """

    def __init__(self, path: Path):
        self._stack, self._before = ExitStack(), "[\n "
        self._file = self._stack.enter_context(atomic_write(path))

    def append(self, entry: object) -> None:
        """Write one more entry."""
        text = json.dumps(entry, indent=1).replace("\n", "\n ")  # strings hold no line end as it is
        with self._stack.pop_all() as unless_written:
            self._file.write((self._before + text).encode("utf-8"))
            self._stack, self._before = unless_written.pop_all(), ",\n "

    def close(self) -> None:
        """End the list and give the file its name; nothing more where it could not be written."""
        with self._stack:
            if not self._file.closed:
                self._file.write(b"[]" if self._before.startswith("[") else b"\n]")

"""What is on a disk when everything stops: after a kill, and after a power failure.

A ``Recorder`` notes what a program does to a folder, call by call. From the notes the folder is made again as a kill
after any call leaves it (all calls so far, no later one), or as a power failure may leave it: of a file's bytes those
that were fsynced, of its names those of an fsynced folder and any number of the first changes after it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


class Recorder:
    """Use as a context. Notes ``(call, inode or name, ...)`` for files of one folder; the calls are carried out."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, []
        self.numbers: dict[int, int] = {}  # open descriptor -> inode, a number of ours

    def __enter__(self) -> "Recorder":
        self.before = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        self.patch = pytest.MonkeyPatch()
        real_open, real_fdopen, real_fsync = os.open, os.fdopen, os.fsync
        replace, unlink, link, close = Path.replace, Path.unlink, os.link, os.close

        def open_(path, flags, mode=0o777, **rest):
            descriptor = real_open(path, flags, mode, **rest)
            if Path(path) == self.folder:
                self.numbers[descriptor] = -1
            elif flags & (os.O_WRONLY | os.O_RDWR) and Path(path).parent == self.folder:
                self.numbers[descriptor] = self.create(Path(path).name)
            return descriptor

        def fdopen(descriptor, *args, **options):
            file = real_fdopen(descriptor, *args, **options)
            return File(file, self, self.numbers[descriptor]) if descriptor in self.numbers else file

        def fsync(descriptor):
            real_fsync(descriptor)
            if descriptor in self.numbers:
                number = self.numbers[descriptor]
                self.calls.append(("dirsync",) if number == -1 else ("fsync", number))

        def named(call, real):
            def change(old, *new, **options):
                new = tuple(map(Path, new))
                result = real(old, *new, **options)
                if Path(old).parent == self.folder:
                    self.calls.append((call, Path(old).name, *(path.name for path in new)))
                return result

            return change

        def close_(descriptor):
            self.numbers.pop(descriptor, None)
            close(descriptor)

        for owner, name, new in (
            (os, "open", open_),
            (os, "fdopen", fdopen),
            (os, "fsync", fsync),
            (os, "close", close_),
            (os, "link", named("link", link)),
            (Path, "replace", named("rename", replace)),
            (Path, "unlink", named("unlink", unlink)),
        ):
            self.patch.setattr(owner, name, new)
        return self

    def __exit__(self, *error) -> None:
        self.patch.undo()

    def create(self, name: str) -> int:
        number = sum(call[0] == "create" for call in self.calls)
        self.calls.append(("create", name, number))
        return number

    # ------------------------------------------------------------------------------------------------- what is left

    def after_kill(self, count: int) -> dict[str, bytes]:
        """The folder's files after the first ``count`` calls."""
        contents = self._contents(count, "write")
        return {name: contents[inode] for name, inode in self._names(count, count).items()}

    def after_power_failure(self, count: int) -> Iterator[dict[str, bytes]]:
        """The folder's files as a failure after ``count`` calls may leave them, names changed as far as any number."""
        contents = self._contents(count, "fsync")
        synced = max((at + 1 for at in range(count) if self.calls[at] == ("dirsync",)), default=0)
        for known in range(synced, count + 1):
            yield {name: contents[inode] for name, inode in self._names(known, count).items()}

    def _contents(self, count: int, when: str) -> dict[object, bytes]:
        """Bytes of each inode: all written, or those that were fsynced. An old file's inode is its old name."""
        written, kept = {}, dict(self.before)
        for call, key, *rest in (tuple(call) + (None,) for call in self.calls[:count]):
            if call == "create":
                written[rest[0]] = kept[rest[0]] = b""
            elif call == "write":
                written[key] += rest[0]
            if call == when:
                kept[key] = written[key]
        return kept

    def _names(self, known: int, count: int) -> dict[str, object]:
        """Which inode each name leads to, after the first ``known`` calls."""
        names: dict[str, object] = {name: name for name in self.before}
        for call, *args in self.calls[: min(known, count)]:
            if call == "create":
                names[args[0]] = args[1]
            elif call == "rename":
                names[args[1]] = names.pop(args[0])
            elif call == "link":
                names[args[1]] = names[args[0]]
            elif call == "unlink":
                names.pop(args[0], None)
        return names


class File:
    """A binary file whose writes are noted."""

    def __init__(self, file, recorder: Recorder, number: int):
        self.file, self.recorder, self.number = file, recorder, number

    def write(self, data: bytes) -> int:
        self.file.write(data)
        self.file.flush()
        self.recorder.calls.append(("write", self.number, bytes(data)))
        return len(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.recorder.numbers.pop(self.file.fileno(), None)
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def lay_out(files: dict[str, bytes], folder: Path) -> Path:
    """A folder with these files, its former ones gone."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder

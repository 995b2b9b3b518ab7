"""Files that are either the old one or the new one, never half of either."""

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from utils.errors import ResourceError, UserError
from utils.failpoints import failpoint

PART = ".part"  # ends the name of a file that is being written


def read_bytes(path: str | Path, expected: str, limit: int = -1) -> bytes:
    """The bytes of an ordinary file, at most ``limit`` of them; ``expected`` is what a user calls such a file.

    Raises:
        UserError: no such file, a folder, a pipe or a device (to open one may wait for ever), or unreadable.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                return file.read(limit)
    except FileNotFoundError as error:
        raise UserError(path, f"no such file, expected {expected}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    raise UserError(path, f"{'a folder' if stat.S_ISDIR(mode) else 'not an ordinary file'}, expected {expected}")


@contextmanager
def atomic_write(
    path: str | Path, *, point: str = "file", before_rename: Callable[[Path], None] = lambda part: None
) -> Iterator[BinaryIO]:
    """Open a new binary file that takes the place of ``path`` when the block ends well.

    A temporary file in the same folder (O_EXCL: nobody else's) is written, fsynced, renamed over ``path``, and the
    folder is fsynced. A crash or an exception at any moment leaves the old file as it was. A link at ``path`` is
    replaced, never written through. A folder that is not there, or no longer, is made.

    Args:
        point: what the failpoints of this write are called: ``point.open``, ``.fsync``, ``.replace``, ``.dirsync``.
        before_rename: called with the temporary file when all of it is on the disk.

    Raises:
        ResourceError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        failpoint(f"{point}.open")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise ResourceError(path, f"cannot write: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            failpoint(f"{point}.fsync")
            os.fsync(file.fileno())
        before_rename(part)
        failpoint(f"{point}.replace")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ResourceError(path, f"cannot write: {error.strerror or error}", "the old file is untouched") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    try:
        failpoint(f"{point}.dirsync")
        _sync_folder(path.parent)
    except OSError as error:
        found = f"written, but a power failure may undo it: {error.strerror or error}"
        raise ResourceError(path, found, "is the disk still there?") from error


def remove_parts(folder: Path) -> None:
    """Remove what killed writers left in a folder that is ours alone: ``.NAME.xxxxxxxx.part``."""
    for part in folder.glob(f".*.????????{PART}"):
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replace a text file (UTF-8) in one piece."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def _sync_folder(folder: Path) -> None:
    """Make a rename itself survive a power cut, where the file system can (some network ones cannot sync a folder)."""
    if os.name != "posix":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def distrust(path: str | Path) -> str:
    """Why somebody else may have written this file; nothing where only its reader and root can."""
    if os.name != "posix":
        return ""
    about = Path(path).stat()
    if about.st_uid not in (0, os.geteuid()):
        return f"belongs to another user (number {about.st_uid})"
    return "anybody on this machine may change it (chmod o-w)" if about.st_mode & stat.S_IWOTH else ""

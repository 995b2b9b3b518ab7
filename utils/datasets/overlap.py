"""Pictures that are in two splits: what is measured on them says nothing."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.structures import Record


def shared_pictures(train: Sequence[Record], val: Sequence[Record]) -> list[tuple[str, str]]:
    """Pairs (training, validation) of paths to the same bytes, by sha256; a file is read only where sizes agree.

    Raises:
        UserError: a picture cannot be read any more.
    """
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in _paths(val):
        by_size[_size(path)].append(path)
    likely = [path for path in _paths(train) if _size(path) in by_size]
    known = {_digest(path): path for size in {_size(path) for path in likely} for path in by_size[size]}
    return [(path, known[digest]) for path in likely if (digest := _digest(path)) in known]


def _paths(records: Iterable[Record]) -> list[str]:
    return [record.path for record in records]


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise UserError(path, error.strerror or str(error)) from error


def _digest(path: str) -> bytes:
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError as error:
        raise UserError(path, error.strerror or str(error)) from error

"""Which picture files a split consists of: folders, list files, and where relative names start."""

import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from utils.datasets.formats.rows import KEPT, QUARANTINED, Problems
from utils.datasets.images import IMAGE_SUFFIXES, Header, ImageError, inspect
from utils.datasets.limits import LIMITS, Limits
from utils.errors import UserError, printable
from utils.files import read_bytes

PROBE_THREADS = 8  # the work is waiting for disks
PROGRESS_FROM = 1000  # pictures; fewer are done before a bar could be read


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a data file says about one split, before any picture or annotation is opened."""

    file: Path  # the yaml, .data or json, or the folder
    format: str  # a key of FORMATS
    split: str
    entries: tuple[str, ...] = ()  # folders, list files or names of a split, as written
    where: str = ""  # file:line of the entries
    bases: tuple[Path, ...] = ()  # where relative entries may start, best first
    names: tuple[str, ...] | None = None  # class names, where they are given
    annotations: Path | None = None  # COCO: the json; VOC: the folder with Annotations/ and JPEGImages/
    masks: bool = False  # whether outlines are wanted, too
    limits: Limits = LIMITS  # which pictures are taken


def kind(path: Path) -> str:
    """``file``, ``folder``, ``other`` (a pipe, a device), or nothing where there is none or there can be none."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # also a name too long, or no name at all
        return ""
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def is_there(path: Path) -> bool:
    """Whether there is something, or nobody can say: what may not be looked at is not the same as missing."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def find(text: str, bases: Iterable[Path], where: str, what: str) -> Path:
    """The existing path that ``text`` means under one of ``bases``.

    Leading ``../`` are tried as they stand, then without: exports are often moved one folder up (the Roboflow layout
    writes ``../train/images`` for a folder beside the yaml).

    Raises:
        UserError: nothing is there; the text lists every place looked at.
    """
    tried = [path for base in bases for path in _spellings(text, base)]
    found = next((path for path in tried if kind(path)), None)
    if found is None:
        places = ", ".join(dict.fromkeys(str(_absolute(path)) for path in tried))
        raise UserError(where, printable(f"no such {what}: '{text}'; looked at {places}"), "correct the path")
    return found


def _spellings(text: str, base: Path) -> list[Path]:
    """The ways to read a path: as written, with Windows separators, without leading ``../``."""
    paths = [base / text]
    if "\\" in text:
        text = text.replace("\\", "/")
        paths.append(base / text)
    shorter = text
    while shorter.startswith("../"):
        shorter = shorter[3:]
    return paths if shorter == text else [*paths, base / shorter]


def _absolute(path: Path) -> Path:
    return Path(os.path.normpath(Path.cwd() / path))


def find_pictures(source: Source, problems: Problems) -> list[Path]:
    """The picture files of a split, each once: folders in sorted order, lists in their own.

    Raises:
        UserError: an entry does not exist, or all together name no picture; the text lists the places looked at.
    """
    pictures: list[Path] = []
    places = [find(entry, source.bases, source.where, "folder or list of pictures") for entry in source.entries]
    for place in places:
        pictures += _scan_folder(place) if kind(place) == "folder" else _read_picture_list(place, source)
    if not pictures:
        looked = ", ".join(str(_absolute(place)) for place in places)
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(source.where, f"no picture found; looked in {looked}", f"for files ending in {suffixes}")
    unique = dict.fromkeys(pictures)
    if len(unique) < len(pictures):
        num = len(pictures) - len(unique)
        problems.add(source.where, None, "pictures named more than once", f"{num}, each is used once", KEPT)
    return list(unique)


def _scan_folder(folder: Path) -> list[Path]:
    """Every file with an image suffix under a folder; folder links are not followed, so there are no loops.

    Raises:
        UserError: a folder below it cannot be read, whose pictures would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise UserError(error.filename, f"the folder cannot be read: {error.strerror}", "may you read it?") from error

    return sorted(
        Path(root, name)
        for root, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )


def _read_picture_list(path: Path, source: Source) -> list[Path]:
    """The pictures a text file names, one path a line, relative to the list, then to the data set.

    A picture that is nowhere stays in the answer under its first spelling and is quarantined when it is opened.
    """
    pictures = []
    bases = (path.parent, *source.bases)
    try:
        lines = read_lines(path)
    except UserError as error:
        found = f"neither a folder nor a list of pictures: {_absolute(path)}: {error.message}"
        raise UserError(source.where, found, "write one path a line") from error
    for text, _ in lines:
        tried = [spelling for base in bases for spelling in _spellings(text, base)]
        pictures.append(Path(os.path.normpath(next((p for p in tried if kind(p) == "file"), tried[0]))))
    return pictures


def read_lines(path: Path) -> list[tuple[str, int]]:
    """The lines of a UTF-8 list that hold anything, stripped, with their numbers. LF, CRLF, CR and a BOM are fine."""
    try:
        text = read_bytes(path, "one path or name a line").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(path, "not UTF-8 text", "expected one path or name a line") from error
    if "\0" in text:
        raise UserError(path, "not text: holds NUL bytes", "expected one path or name a line")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(line.strip(), number) for number, line in enumerate(lines, 1) if line.strip()]


def probe_pictures(pictures: Sequence[Path], source: Source, problems: Problems) -> dict[Path, tuple[int, int]]:
    """The upright (H, W) of every picture that can be opened; the others are quarantined, with the reason."""

    def look(picture: Path) -> tuple[Header, bool] | ImageError:
        try:
            return inspect(picture, source.limits)
        except ImageError as error:
            return error

    sizes, turned, animated = {}, [], []
    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        answers = pool.map(look, pictures)
        hide = len(pictures) < PROGRESS_FROM
        for picture, answer in zip(pictures, tqdm(answers, "pictures", len(pictures), leave=False, disable=hide)):
            if isinstance(answer, ImageError):
                problems.add(picture, None, "picture cannot be used", answer.message, QUARANTINED)
                continue
            header, more = answer
            sizes[picture] = header.upright
            turned += [picture] * header.turned
            animated += [picture] * more
    problems.add_some(source.file, "pictures turned upright by their EXIF orientation", turned)
    problems.add_some(source.file, "files of several pictures, of which the first is used", animated)
    return sizes

"""What kind of data set a path is, and what its splits consist of; nothing of the data itself is opened here.

==================  ============================================================================================
``data.yaml``       ``path``, ``train``, ``val``, ``test`` (folders, lists of them, or .txt lists), ``names``, ``nc``;
                    ``format: coco`` with ``annotations: {train: a.json, val: b.json}`` (or one file for all), or
                    ``format: voc`` with ``train: train`` naming a list of ``ImageSets/Main``
``obj.data``        Darknet: ``classes``, ``train``, ``valid``, ``names``
``instances.json``  COCO; a file is one split, whichever is asked for
folder              with a ``data.yaml``, or with ``ImageSets/Main`` (Pascal VOC)
==================  ============================================================================================
"""

import os
from collections import Counter
from pathlib import Path

from utils.config import Located, read_yaml
from utils.datasets.formats.pictures import Source, find, kind, read_lines
from utils.datasets.formats.rows import KEPT, Problems, is_name
from utils.datasets.formats.voc import SPLITS
from utils.datasets.shapes import ensure_shapes
from utils.errors import UserError, nearest, printable

GENERATORS = {"shapes": ensure_shapes}  # data sets that are made at first use
YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml")
YAML_FORMATS = ("yolo", "coco", "voc")
ENTRY_KEYS = ("train", "val", "test")
KNOWN_KEYS = {*ENTRY_KEYS, "path", "names", "nc", "format", "annotations", "generator", "download", "roboflow"}
VOC_LISTS = {"val": ("val", "valid")}
DARKNET_KEYS = {"val": "valid"}


def describe(path: Path, split: str, problems: Problems) -> Source:
    """What kind of data set a path is and what its split consists of. Raises UserError where it is none."""
    found = kind(path)
    if found == "folder":
        return _describe_folder(path, split, problems)
    if not found:
        raise UserError(path, "no such data set", f"looked at {Path.cwd() / path}")
    if found == "other":
        raise UserError(path, "not a data set: not a regular file", f"expected {', '.join(DESCRIBERS)} or a folder")
    suffix = path.suffix.lower()
    if suffix not in DESCRIBERS:
        raise UserError(path, f"not a data set: suffix '{suffix}'", f"expected {', '.join(DESCRIBERS)} or a folder")
    return DESCRIBERS[suffix](path, split, problems)


def _describe_folder(folder: Path, split: str, problems: Problems) -> Source:
    file = next((folder / name for name in YAML_NAMES if (folder / name).is_file()), None)
    if file is not None:
        return _describe_yaml(file, split, problems)
    if (folder / SPLITS).is_dir():
        listed = [name for name in VOC_LISTS.get(split, (split,)) if (folder / SPLITS / f"{name}.txt").is_file()]
        if not listed:
            known = sorted(file.stem for file in (folder / SPLITS).glob("*.txt"))
            raise UserError(folder / SPLITS, f"no list '{split}.txt'", f"there is: {', '.join(known)}")
        where = str(folder / SPLITS / f"{listed[0]}.txt")
        return Source(
            file=folder,
            format="voc",
            split=split,
            entries=(listed[0],),
            where=where,
            bases=(folder,),
            annotations=folder,
        )
    raise UserError(
        folder, f"no data set: neither {YAML_NAMES[0]} nor {SPLITS}", "write a data.yaml with train, val, names"
    )


def _describe_json(path: Path, split: str, problems: Problems) -> Source:
    return Source(file=path, format="coco", split=split, where=str(path), annotations=path)


def _describe_darknet(path: Path, split: str, problems: Problems) -> Source:
    """A Darknet .data file. Darknet starts relative paths at its working folder, usually the one above this file."""
    key = DARKNET_KEYS.get(split, split)
    options = _darknet_options(path, "names", key)
    entry, line = options[key]
    return Source(
        file=path,
        format="darknet",
        split=split,
        entries=(entry,),
        where=f"{path}:{line}",
        bases=_darknet_bases(path),
        names=_darknet_names(path),
    )


def _darknet_bases(path: Path) -> tuple[Path, ...]:
    return path.parent, path.parent.parent, Path.cwd()


def _darknet_options(path: Path, *needed: str) -> dict[str, tuple[str, int]]:
    """Key -> value and line of a .data file."""
    options: dict[str, tuple[str, int]] = {}
    for text, line in read_lines(path):
        key, equals, value = text.partition("=")
        if text[0] not in "#;" and equals:
            options.setdefault(key.strip(), (value.strip(), line))  # the first one wins, as in Darknet
    for key in needed:
        if key not in options:
            example = "data/my.names" if key == "names" else f"data/{key}.txt"
            raise UserError(path, f"no '{key}'", f"add the line: {key} = {example}")
    return options


def _darknet_names(path: Path) -> tuple[str, ...]:
    """The class names a .data file points to."""
    options = _darknet_options(path, "names")
    file, line = options["names"]
    names = _listed_names(find(file, _darknet_bases(path), f"{path}:{line}", "names file"))
    classes, line = options.get("classes", (str(len(names)), 0))
    if classes != str(len(names)):
        raise UserError(
            f"{path}:{line}", f"classes = {classes}, but {file} has {len(names)} names", "correct one of them"
        )
    return names


def _describe_yaml(path: Path, split: str, problems: Problems) -> Source:
    data = read_yaml(path)
    place = data.places.get
    format = data.get("format", "yolo")
    if format not in YAML_FORMATS:
        raise UserError(place("format"), f"no such format: {format!r}", nearest(str(format), YAML_FORMATS))
    for key in sorted(data.keys() - KNOWN_KEYS, key=str):
        problems.add(place(key, path), None, "key is not used", f"'{key}', {nearest(key, KNOWN_KEYS)}", KEPT)
    if "download" in data:
        problems.add(place("download"), None, "'download' is ignored", "nothing is fetched or run", KEPT)
    root = _root(data, path)
    annotations = _annotations(data, path, root, split) if format == "coco" else root
    entries = _entries(data, path, split)
    return Source(
        file=path,
        format=format,
        split=split,
        entries=entries,
        where=place(split, str(path)),
        bases=(root, path.parent),
        names=_names(data, path, problems, required=format == "yolo"),
        annotations=annotations,
    )


DESCRIBERS = {
    ".yaml": _describe_yaml,
    ".yml": _describe_yaml,
    ".data": _describe_darknet,
    ".json": _describe_json,
}


def known_splits(path: str | Path) -> tuple[str, ...]:
    """Which of train, val and test a data set has; a COCO file is one split, called train here.

    Raises:
        UserError: no data set, or none of them.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111
    file = next((path / name for name in YAML_NAMES if (path / name).is_file()), path)
    splits = SPLITS_OF.get(file.suffix.lower() if kind(file) == "file" else "", _voc_splits)(file)
    if not splits:
        describe(path, "train", Problems())  # says what is missing
    return splits or ("train",)


def _yaml_splits(path: Path) -> tuple[str, ...]:
    data = read_yaml(path)
    files = data.get("annotations")
    named = files if isinstance(files, dict) and data.get("format") == "coco" else {}
    return tuple(key for key in ENTRY_KEYS if data.get(key) is not None or key in named)


def _darknet_splits(path: Path) -> tuple[str, ...]:
    options = _darknet_options(path)
    return tuple(key for key in ENTRY_KEYS if DARKNET_KEYS.get(key, key) in options)


def _voc_splits(folder: Path) -> tuple[str, ...]:
    lists = folder / SPLITS
    return tuple(key for key in ENTRY_KEYS if any(kind(lists / f"{name}.txt") for name in VOC_LISTS.get(key, (key,))))


SPLITS_OF = {
    ".yaml": _yaml_splits,
    ".yml": _yaml_splits,
    ".data": _darknet_splits,
    ".json": lambda path: ("train",),
}


def _root(data: Located, path: Path) -> Path:
    """The folder ``path:`` names, relative to the yaml or to the working folder; generated data is made there."""
    text = data.get("path", ".")
    where = data.places.get("path", str(path))
    if not isinstance(text, str):
        raise UserError(where, f"path: expected text, found {text!r}", "quote it")
    folder = Path(os.path.expanduser(text))  # noqa: PTH111  (pathlib's raises where there is no such user)
    if "generator" in data:
        name = data["generator"]
        if not isinstance(name, str) or name not in GENERATORS:
            raise UserError(data.places["generator"], f"no such generator: {name!r}", nearest(str(name), GENERATORS))
        GENERATORS[name](path.parent / folder)
    places = [path.parent / folder, Path.cwd() / folder]
    root = next((place for place in places if kind(place) == "folder"), None)
    if root is None:
        found = printable(f"no such folder: '{text}'; looked at {places[0]}, {places[1]}")
        raise UserError(where, found, "correct 'path:'")
    return root


def _entries(data: Located, path: Path, split: str) -> tuple[str, ...]:
    """The folders and lists of a split, as written."""
    entry = data.get(split)
    if entry is None and data.get("format") == "coco" and "annotations" in data:
        return ()  # the JSON names its pictures
    if entry is None:
        known = [key for key in ENTRY_KEYS if data.get(key) is not None]
        raise UserError(
            path, f"no '{split}:'", f"there is: {', '.join(known) or 'no split at all'}; add '{split}: images/{split}'"
        )
    entries = entry if isinstance(entry, list) else [entry]
    if not entries or not all(isinstance(item, str) and item for item in entries):
        raise UserError(data.places[split], f"{split}: expected a folder or a list file, found {entry!r}", "quote it")
    return tuple(entries)


def _annotations(data: Located, path: Path, root: Path, split: str) -> Path:
    """The COCO file of a split."""
    value = data.get("annotations")
    if isinstance(value, dict):
        value = value.get(split)
    where = data.places.get("annotations", str(path))
    if not isinstance(value, str):
        raise UserError(
            where, f"no annotation file for '{split}'", f"add 'annotations: {{{split}: instances_{split}.json}}'"
        )
    return find(value, (root, path.parent), where, "annotation file")


def _names(data: Located, path: Path, problems: Problems, *, required: bool) -> tuple[str, ...] | None:
    """Class names from a list, a map from id to name, or a file of names; None where a format knows them itself."""
    names, where = data.get("names"), data.places.get("names", str(path))
    if names is None:
        if required:
            raise UserError(path, "no 'names:', the classes have no names", "add the line: names: [cat, dog]")
        return None
    if isinstance(names, str):
        names = list(_listed_names(find(names, (path.parent, Path.cwd()), where, "names file")))
    if isinstance(names, dict):
        holes = sorted(set(range(len(names))) - set(names))
        if holes or any(isinstance(key, str) for key in names):
            raise UserError(where, f"names: ids must run from 0 to {len(names) - 1}, found {sorted(names, key=str)}")
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(where, f"names: expected a list of class names, found {names!r}", "names: [cat, dog]")
    for name in names:
        if not is_name(name):
            raise UserError(where, f"names: expected text of one line, found {name!r}", "quote it")
    num = data.get("nc", len(names))
    if num != len(names):
        raise UserError(data.places["nc"], f"nc is {num!r}, but there are {len(names)} names", "correct one of them")
    double = [name for name, count in Counter(names).items() if count > 1]
    if double:
        problems.add(where, None, "two classes have the same name", ", ".join(double), KEPT)
    return tuple(names)


def read_names(path: str | Path) -> tuple[str, ...]:
    """The class names in a data .yaml, a Darknet .data, or a text file with one name a line, whatever its suffix.

    Raises:
        UserError: unreadable, no names, an empty line between them.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111
    return NAME_READERS.get(path.suffix.lower(), _listed_names)(path)


def _listed_names(path: Path) -> tuple[str, ...]:
    lines = read_lines(path)
    if not lines:
        raise UserError(path, "no class name", "write one name a line")
    for expected, (_, number) in enumerate(lines, 1):
        if number != expected:
            raise UserError(f"{path}:{expected}", "an empty line between the names", "remove it")
    return tuple(text for text, _ in lines)


def _yaml_names(path: Path) -> tuple[str, ...]:
    return _names(read_yaml(path), path, Problems(), required=True)


NAME_READERS = {".yaml": _yaml_names, ".yml": _yaml_names, ".data": _darknet_names}

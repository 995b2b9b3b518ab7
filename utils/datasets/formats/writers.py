"""Records -> annotation files of every format, beside the readers.

Law: what is written reads back as the same records. Numbers are the shortest that do so: labels of six decimals, whole
VOC corners and COCO's two decimals come out as they went in. What a format cannot hold is in its docstring.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from utils.datasets.formats.voc import SPLITS
from utils.datasets.formats.yolo import corners_of
from utils.errors import ResourceError
from utils.structures import Record

DECIMALS = 6  # of a YOLO label, at least
MOST_DECIMALS = 17


class Placed(NamedTuple):
    """A record and the name of its picture where it is written."""

    name: str
    record: Record


class Split(NamedTuple):
    """What is written of one split."""

    split: str
    pictures: Sequence[Placed]
    names: tuple[str, ...]
    category_ids: tuple[int, ...]


def write_new(path: Path, text: str) -> None:
    """A file of a new folder. Not synced, one by one that would take hours: a folder that was cut off is made again.

    Raises:
        ResourceError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))
    except OSError as error:
        raise ResourceError(path, f"cannot write: {error.strerror}") from error


def write_yolo(folder: Path, part: Split) -> None:
    """``labels/SPLIT/*.txt``. Holds no ignore regions (left out), areas or ids; of outlines one ring an object."""
    for name, record in part.pictures:
        write_new(folder / "labels" / part.split / f"{Path(name).stem}.txt", "".join(yolo_rows(record)))


def yolo_rows(record: Record) -> Iterable[str]:
    """A row per object that is not to be ignored."""
    height, width = record.size
    for row in np.flatnonzero(~record.ignore):
        if record.outlines is None:
            numbers = yolo_numbers(record.boxes[row], record.size)
        else:
            numbers = [
                _share(edge, side) for corner in _one_ring(record, row) for edge, side in zip(corner, (width, height))
            ]
        yield " ".join([str(record.labels[row]), *numbers]) + "\n"


def yolo_numbers(box: np.ndarray, size: tuple[int, int]) -> list[str]:
    """Box float32 xyxy in a picture of ``size`` (H, W) -> ``x y w h`` of a label, relative, with enough decimals."""
    height, width = size
    limits = np.array([width, height] * 2)
    x1, y1, x2, y2 = (box.astype(np.float64) / limits).tolist()
    for decimals in range(DECIMALS, MOST_DECIMALS):
        texts = [f"{number:.{decimals}f}" for number in ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)]
        read = np.clip(corners_of(*map(float, texts), size), 0, limits)
        if (read.astype(np.float32) == box).all():
            break
    return texts


def _share(edge: np.float32, side: int) -> str:
    """A coordinate in pixels as a share of its side, with enough decimals."""
    for decimals in range(DECIMALS, MOST_DECIMALS):
        text = f"{float(edge) / side:.{decimals}f}"
        if np.float32(float(text) * side) == edge:
            break
    return text


def _one_ring(record: Record, row: int) -> np.ndarray:
    """The rings of an object as one [k, 2]: to each further one and back. Ways walked twice enclose nothing."""
    rings = _rings(record, row)
    start = rings[0][:1]
    further = [part for ring in rings[1:] for part in (start, ring, ring[:1])]
    return np.concatenate([rings[0], *further])


def _rings(record: Record, row: int) -> list[np.ndarray]:
    mine = record.outlines.between(row, row + 1)
    return [mine.corners[start:stop] for start, stop in zip(mine.starts, mine.starts[1:])]


def write_voc(folder: Path, part: Split) -> None:
    """``Annotations/*.xml`` and the list of the split. Ignore regions are ``difficult``; no areas, ids, outlines."""
    for name, record in part.pictures:
        write_new(folder / "Annotations" / f"{Path(name).stem}.xml", _xml(name, record, part.names))
    stems = "".join(f"{Path(name).stem}\n" for name, _ in part.pictures)
    write_new(folder / SPLITS / f"{part.split}.txt", stems)


def _xml(name: str, record: Record, names: tuple[str, ...]) -> str:
    height, width = record.size
    lines = [
        "<annotation>",
        f"\t<filename>{escape(name)}</filename>",
        f"\t<size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for box, label, ignore in zip(record.boxes, record.labels, record.ignore):
        corners = zip(("xmin", "ymin", "xmax", "ymax"), map(_number, box))
        lines += [
            "\t<object>",
            f"\t\t<name>{escape(names[label])}</name>",
            f"\t\t<difficult>{int(ignore)}</difficult>",
            f"\t\t<bndbox>{''.join(f'<{key}>{value}</{key}>' for key, value in corners)}</bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>\n"])


def write_coco(folder: Path, part: Split) -> None:
    """``annotations/instances_SPLIT.json``. Every ignore region is a crowd; ids that are whole numbers are kept."""
    ids = picture_ids([record for _, record in part.pictures])
    images, annotations = [], []
    for (name, record), image_id in zip(part.pictures, ids):
        height, width = record.size
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for row in range(len(record.labels)):
            about = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append(about | _coco_object(record, row, part.category_ids))
    categories = [{"id": key, "name": name} for key, name in zip(part.category_ids, part.names)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    write_new(folder / "annotations" / f"instances_{part.split}.json", json.dumps(data, ensure_ascii=False))


def picture_ids(records: Sequence[Record]) -> list[int | str]:
    """The data set's own ids where each picture has one of its own, else 1, 2, ..."""
    ids = [record.image_id for record in records]
    return ids if None not in ids and len(set(ids)) == len(ids) else list(range(1, len(ids) + 1))


def _coco_object(record: Record, row: int, category_ids: tuple[int, ...]) -> dict:
    written = {
        "category_id": category_ids[record.labels[row]],
        "bbox": coco_box(record.boxes[row]),
        "area": _number(record.area[row]),
        "iscrowd": int(record.ignore[row]),
    }
    if record.outlines is not None:
        written["segmentation"] = [[_number(edge) for edge in ring.ravel()] for ring in _rings(record, row)]
    return written


def coco_box(box: np.ndarray) -> list[float]:
    """Box float32 xyxy -> ``x y w h`` as COCO writes it."""
    x1, y1, x2, y2 = box
    (x, w), (y, h) = _start_and_length(x1, x2), _start_and_length(y1, y2)
    return [x, y, w, h]


def _start_and_length(low: np.float32, high: np.float32) -> tuple[float, float]:
    """Two edges as COCO writes them: the shortest numbers whose sum is the second edge again."""
    start = _number(low)
    for decimals in range(MOST_DECIMALS):
        length = round(float(high) - start, decimals)
        if np.float32(start + length) == high:
            break
    return start, int(length) if length == int(length) else length


def _number(value: np.float32) -> int | float:
    """The shortest decimal that is this float32, whole where it is."""
    number = float(str(np.float32(value)))
    return int(number) if number == int(number) else number


# ---- what describes the whole


def yolo_yaml(folder: Path, splits: Sequence[str], names: tuple[str, ...]) -> None:
    _write_yaml(folder, {split: f"images/{split}" for split in splits}, names)


def voc_yaml(folder: Path, splits: Sequence[str], names: tuple[str, ...]) -> None:
    """A VOC folder does not say which number a class has, nor that there are classes without a box."""
    _write_yaml(folder, {"format": "voc"} | {split: split for split in splits}, names)


def coco_yaml(folder: Path, splits: Sequence[str], names: tuple[str, ...]) -> None:
    files = {split: f"annotations/instances_{split}.json" for split in splits}
    _write_yaml(folder, {"format": "coco", "annotations": files}, names)


def _write_yaml(folder: Path, entries: dict, names: tuple[str, ...]) -> None:
    text = yaml.safe_dump(entries | {"names": list(names)}, sort_keys=False, allow_unicode=True)
    write_new(folder / "data.yaml", text)


def darknet_data(folder: Path, splits: Sequence[str], names: tuple[str, ...]) -> None:
    """``obj.data``, the names and lists of pictures; Darknet is to be started in ``folder``."""
    lists = [f"{'valid' if split == 'val' else split} = {split}.txt\n" for split in splits]
    for split in splits:
        pictures = sorted((folder / "images" / split).iterdir())
        write_new(folder / f"{split}.txt", "".join(f"images/{split}/{picture.name}\n" for picture in pictures))
    write_new(folder / "obj.names", "".join(f"{name}\n" for name in names))
    write_new(folder / "obj.data", f"classes = {len(names)}\n{''.join(lists)}names = obj.names\nbackup = .\n")


class Writer(NamedTuple):
    """How a format is written."""

    pictures: str  # folder of a split's pictures
    write: Callable[[Path, Split], None]
    describe: Callable[[Path, Sequence[str], tuple[str, ...]], None]
    description: str  # the file that ``describe`` writes, last of all


YOLO = Writer("images/{split}", write_yolo, yolo_yaml, "data.yaml")
DARKNET = Writer("images/{split}", write_yolo, darknet_data, "obj.data")
COCO = Writer("images/{split}", write_coco, coco_yaml, "data.yaml")
VOC = Writer("JPEGImages", write_voc, voc_yaml, "data.yaml")

"""A data set in another format, pictures and all: ``python -m utils.datasets.convert SRC DST --format coco``.

What was written is read back and compared: what the new format cannot hold is counted, not guessed.
"""

import argparse
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.arguments import add_bad_data
from utils.datasets.formats.description import known_splits
from utils.datasets.formats.writers import Placed, Split
from utils.datasets.limits import Limits
from utils.datasets.quarantine import refuse_bad
from utils.datasets.records import FORMATS, WITH_OUTLINES, DataSet, read_dataset
from utils.errors import ResourceError, UserError, run_main
from utils.metrics.flat import box_areas
from utils.results import Stems
from utils.structures import Record

PLACE = {"copy": shutil.copyfile, "link": lambda source, place: place.symlink_to(Path(source).resolve())}


# what a record says, as things that can be compared: not all formats hold all of them
ASPECTS = {
    "boxes": lambda record: _rows(record, ~record.ignore),
    "ignore regions": lambda record: _rows(record, record.ignore & ~record.crowd),
    "crowd regions": lambda record: _rows(record, record.crowd),
    "mask areas": lambda record: record.area[record.area != box_areas(record.boxes)].tolist(),
    "picture ids": lambda record: [record.image_id] * (record.image_id is not None),
    "outlines of one part": lambda record: _outlines(record, 1),
    "outlines of several parts": lambda record: _outlines(record, 2),
}


def convert(source: str, folder: Path, format: str, *, pictures: str, masks: bool, limits: Limits) -> list[str]:
    """Write every split of ``source`` into ``folder``; a line per split: what reads back, and what does not.

    Args:
        folder: new or empty.
        format: a key of ``FORMATS``.
        pictures: a key of ``PLACE``.
        masks: outlines as well as boxes.

    Raises:
        UserError: as ``read_dataset``; a folder that holds something; splits with other classes; no room for masks.
        QuarantineError: too much of a split is bad.
        ResourceError: the folder cannot be written.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(folder, "exists already", "name a new folder: nothing is overwritten")
    if masks and format not in WITH_OUTLINES:
        raise UserError(
            "--masks", f"format '{format}' holds boxes only", f"known to hold more: {', '.join(WITH_OUTLINES)}"
        )
    sets = [read_dataset(source, split, masks=masks, limits=limits) for split in known_splits(source)]
    for data in sets:
        print(data.summary())
        refuse_bad(data, limits.max_bad)
        if data.names != sets[0].names:
            found = f"[{data.split}] has the classes {', '.join(data.names)}, [{sets[0].split}] has others"
            raise UserError(source, found, "write them into a data yaml: names: [...]")
    writer, stem_of = FORMATS[format].writer, Stems()
    written = []
    for data in sets:
        placed = [Placed(stem_of(record.path) + Path(record.path).suffix, record) for record in data.records]
        _place(placed, folder / writer.pictures.format(split=data.split), pictures)
        writer.write(folder, Split(data.split, placed, data.names, data.category_ids))
        written.append(placed)
    writer.describe(folder, [data.split for data in sets], sets[0].names)
    lines = []
    for data, placed in zip(sets, written):
        again = read_dataset(folder / writer.description, data.split, masks=masks, limits=limits)
        lines.append(f"[{data.split}] {_compared(placed, again)}")
    return lines


def _place(placed: list[Placed], folder: Path, how: str) -> None:
    """The pictures of a split under their new names."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, record in tqdm(placed, f"{how} pictures", leave=False, disable=None):
            if not os.path.lexists(folder / name):  # of a VOC folder, two splits may share a picture
                PLACE[how](record.path, folder / name)
    except OSError as error:
        raise ResourceError(folder, f"cannot write: {error.strerror}") from error


def _compared(placed: list[Placed], again: DataSet) -> str:
    """What was written beside what is read now."""
    found = {Path(record.path).name: record for record in again.records}
    lost: Counter = Counter(pictures=len(placed) - len(found))
    for name, record in placed:
        for what, things in ASPECTS.items():
            now = things(found[name]) if name in found else []
            lost[what] += sum((Counter(things(record)) - Counter(now)).values())
    told = ", ".join(f"{count} {what}" for what, count in lost.items() if count)
    return (
        f"{len(found)} pictures, {again.num_boxes} boxes read back; {f'not kept: {told}' if told else 'nothing lost'}"
    )


def _rows(record: Record, kept: np.ndarray) -> list[tuple]:
    return [(label, *box) for label, box in zip(record.labels[kept].tolist(), record.boxes[kept].tolist())]


def _outlines(record: Record, parts: int) -> list[bytes]:
    """The outlines of ``parts`` rings, 2 or more counting as 2."""
    objects = (
        [] if record.outlines is None else (record.outlines.between(row, row + 1) for row in range(len(record.labels)))
    )
    return [mine.corners.tobytes() for mine in objects if min(len(mine.starts) - 1, 2) == parts]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.datasets.convert", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="data .yaml, Darknet .data, COCO .json or VOC folder")
    parser.add_argument("folder", type=Path, help="a new folder for the data set in its new format")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--pictures", choices=PLACE, default="copy", help="how they get there (default: copy)")
    parser.add_argument("--masks", action="store_true", help="outlines, too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_bad_data(parser)
    args = parser.parse_args(arguments)
    options = {"pictures": args.pictures, "masks": args.masks, "limits": Limits.of(args)}
    for line in convert(args.source, args.folder, args.format, **options):
        print(line)
    print(f"Written: {args.folder / FORMATS[args.format].writer.description}")


if __name__ == "__main__":
    run_main(main)

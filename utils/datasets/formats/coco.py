"""COCO instances JSON: ``images``, ``annotations`` with ``bbox`` x y w h in pixels, ``categories`` with any ids.

Labels are the positions of the category ids in sorted order (or of their names in the data yaml): COCO's own ids run
from 1 to 90 with gaps. A box is taken as published, however small, and repeated ones stay, because evaluation counts
them all; only what has no width or height is dropped, and, where masks are wanted, what has none that can be used.
"""

import json
import os
from collections import Counter
from pathlib import Path

from utils.datasets.formats.pictures import Source, find_pictures, kind, probe_pictures
from utils.datasets.formats.rows import KEPT, QUARANTINED, Annotated, Problems, Row, is_name, make_record
from utils.datasets.formats.segmentation import outline_rows
from utils.errors import UserError, printable
from utils.files import read_bytes


def read_coco(source: Source, problems: Problems) -> Annotated:
    """Class names, records in the order of the file (or of the pictures the yaml names), the ids of the categories.

    Raises:
        UserError: not a COCO file, no picture of it found, an annotation whose category has no name, masks wanted of a
            file without any.
    """
    assert source.annotations is not None
    path = source.annotations
    data = load(path)
    names, labels = class_labels(data["categories"], source)
    images = _by_id(data["images"], path, problems)
    if source.masks and not any(annotation.get("segmentation") for annotation in data["annotations"]):
        found = f"none of its {len(data['annotations'])} annotations has a 'segmentation'"
        raise UserError(
            path, f"{found}, which a network with masks learns from", "annotate polygons, or train boxes only"
        )
    pictures = _locate(images, source, problems)
    rows, num_bad = _rows(data["annotations"], images, labels, path, problems)
    sizes = probe_pictures(list(pictures.values()), source, problems)
    records = []
    for image_id, picture in pictures.items():
        if picture not in sizes:
            continue
        image, size = images[image_id], sizes[picture]
        stated = (image.get("height"), image.get("width"))
        if None not in stated and stated != size:
            found = f"annotated {stated[1]} x {stated[0]}, found {size[1]} x {size[0]}"
            problems.add(picture, None, "picture has another size than its annotation says", found, QUARANTINED)
            continue
        mine, bad, where = rows[image_id], num_bad[image_id], f"{path} image {image_id}"
        if source.masks:
            mine, num_shapeless = outline_rows(mine, size, where, problems)
            bad += num_shapeless
        record = make_record(
            picture,
            size,
            mine,
            num_bad=bad,
            source=where,
            problems=problems,
            min_area=0.0,
            image_id=image_id,
            masks=source.masks,
        )
        if record is not None:
            records.append(record)
    return Annotated(names, records, category_ids=_category_ids(names, labels))


def load(path: Path) -> dict:
    """The three lists of a COCO file. Raises UserError where it is none."""
    try:
        data = json.loads(read_bytes(path, "a COCO instances file"), object_pairs_hook=_unique)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}", f"not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not text, a number of 5000 digits, 5000 brackets
        raise UserError(path, f"not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        items = data.get(key) if isinstance(data, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(path, f"not a COCO instances file: no list of objects named '{key}'")
    return data


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON, whose parser would let the last of several equal keys win without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        (double, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {double!r} is given twice in one object")
    return values


def class_labels(categories: list[dict], source: Source) -> tuple[tuple[str, ...], dict[int, int]]:
    """Class names, and category id -> label."""
    path = source.annotations
    for category in categories:
        if not _is_id(category.get("id")) or not is_name(category.get("name")):
            raise UserError(path, f"a category needs an id (a number) and a name, found {category}")
    by_id = {category["id"]: category["name"] for category in sorted(categories, key=lambda item: item["id"])}
    if len(by_id) < len(categories):
        (double, _), *_ = Counter(category["id"] for category in categories).most_common(1)
        raise UserError(path, f"category id {double} is given twice")
    if source.names is None:
        return tuple(by_id.values()), {key: label for label, key in enumerate(by_id)}
    return source.names, {key: source.names.index(name) for key, name in by_id.items() if name in source.names}


def _category_ids(names: tuple[str, ...], labels: dict[int, int]) -> tuple[int, ...]:
    """Category id of every label; one that the file does not know gets a number of its own."""
    ids = {label: key for key, label in reversed(labels.items())}
    free = max(labels, default=0) + 1
    return tuple(ids.get(label, free + label) for label in range(len(names)))


def _by_id(images: list[dict], path: Path, problems: Problems) -> dict[int | str, dict]:
    known: dict[int | str, dict] = {}
    owner: dict[str, int | str] = {}  # file name -> id
    for image in images:
        key, name = image.get("id"), image.get("file_name")
        if not (_is_id(key) or isinstance(key, str)) or not _is_path(name):
            problems.add(path, None, "image without id or file_name", str(image)[:80], QUARANTINED)
        elif key in known:
            problems.add(path, None, "image id given twice", f"{key}: {name}", QUARANTINED)
        elif owner.setdefault(name, key) != key:  # each would be background for what the other one annotates
            problems.add(path, None, "file_name given twice", f"{name}: images {owner[name]} and {key}", QUARANTINED)
        else:
            known[key] = image
    return known


def _locate(images: dict, source: Source, problems: Problems) -> dict[int | str, Path]:
    """Image id -> picture file: of those the data yaml names, or under the folder that holds the JSON's pictures."""
    if not source.entries:
        root = _picture_root(images, source)
        return {key: root / image["file_name"] for key, image in images.items()}
    by_name = {image["file_name"].replace("\\", "/"): key for key, image in images.items()}
    located, unknown = {}, []
    for picture in find_pictures(source, problems):
        tails = ("/".join(picture.parts[-depth:]) for depth in range(1, len(picture.parts) + 1))
        key = next((by_name[tail] for tail in tails if tail in by_name), None)
        if key is None:
            unknown.append(picture)
        else:
            located[key] = picture
    if not located:
        raise UserError(source.where, f"none of {len(unknown)} pictures is in {source.annotations}, e.g. {unknown[0]}")
    if unknown:
        found = f"{len(unknown)}, such as {unknown[0].name}; left out"
        problems.add(source.annotations, None, "pictures without an entry in the JSON", found, KEPT)
    return located


def _picture_root(images: dict, source: Source) -> Path:
    """The folder the file names are relative to: the first usual one that holds any of the pictures."""
    path = source.annotations
    if not images:
        raise UserError(path, "no picture: the list 'images' is empty")
    here, split = path.parent, path.stem.removeprefix("instances_")
    places = [here, here / "images", here / split, here.parent / "images", here.parent / split]
    places += [here.parent / "images" / split, here.parent]
    names = [image["file_name"] for image in images.values()]
    for place in places:
        if any(kind(place / name) == "file" for name in names[:100]):
            return place
    tried = ", ".join(str(place) for place in places)
    found = printable(f"no picture found, e.g. {names[0]}; looked in {tried}")
    raise UserError(path, found, "name their folder in a data yaml")


def _rows(annotations: list[dict], images: dict, labels: dict[int, int], path: Path, problems: Problems):
    """Usable rows and the number of others, per image id."""
    rows: dict[int | str, list[Row]] = {key: [] for key in images}
    num_bad: Counter = Counter()
    seen = set()
    for annotation in annotations:
        key, image_id = annotation.get("id"), annotation.get("image_id")
        reason = fault(annotation, image_id in rows if _is_id(image_id) or isinstance(image_id, str) else False)
        if not reason and key is not None and key in seen:
            reason = "annotation id given twice"
        if reason:
            problems.add(path, None, reason, f"annotation {key} of image {image_id}")
            num_bad[str(image_id) if not _is_id(image_id) else image_id] += 1
            continue
        seen.add(key)
        category = annotation["category_id"]
        if category not in labels:
            hint = f"known ids: {sorted(labels)[:10]}"
            raise UserError(path, f"annotation {key}: category {category} has no name", hint)
        rows[image_id].append(to_row(annotation, labels))
    return rows, num_bad


def to_row(annotation: dict, labels: dict[int, int]) -> Row:
    """An annotation without `fault` as a row."""
    x, y, w, h = map(float, annotation["bbox"])
    crowd, area = annotation.get("iscrowd") == 1, annotation.get("area")
    area = float(area) if _is_finite(area) and area >= 0 else None
    box, shape = (x, y, x + w, y + h), annotation.get("segmentation")
    return Row(labels[annotation["category_id"]], box, None, crowd, crowd, area, shape)


def fault(annotation: dict, known: bool) -> str:
    """Why an annotation is none, if so; ``known``: whether its picture is."""
    box = annotation.get("bbox")
    if not known:
        return "annotation of an unknown image"
    if not isinstance(box, list) or len(box) != 4:
        return "bbox is not 4 numbers"
    if not all(map(_is_finite, box)):
        return "bbox is not 4 finite numbers"
    if not _is_id(annotation.get("category_id")):
        return "category_id is not a number"
    return "" if annotation.get("id") is None or _is_id(annotation["id"]) else "annotation id is not a number"


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_path(value: object) -> bool:
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        return bool(os.fsencode(value))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15

"""Small data sets of every format, and what they look like from outside."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np

H, W = 48, 64
GOOD = "0 0.5 0.5 0.25 0.5\n"  # the box 24 12 40 36
GOOD_BOX = [24, 12, 40, 36]
OBJECT = "<object><name>cat</name><bndbox><xmin>{}</xmin><ymin>5</ymin><xmax>{}</xmax><ymax>20</ymax></bndbox></object>"
GOOD_ANNOTATION = {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 150.5}


def picture(path: Path, size=(H, W), shade: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.full((*size, 3), shade, np.uint8))[1].tobytes())
    return path


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def yolo_set(folder: Path, labels: dict[str, str | bytes | None], yaml: str = "names: [cat, dog]\n") -> Path:
    """A data set with one picture per label text; the names of pictures end in .jpg although they are PNG."""
    for name, text in labels.items():
        picture(folder / "images" / "train" / f"{name}.jpg")
        if text is not None:
            write(folder / "labels" / "train" / f"{name}.txt", text)
    return write(folder / "data.yaml", "train: images/train\n" + yaml)


def voc_set(folder: Path, annotations: dict[str, str], head: str = "") -> None:
    size = f"<size><width>{W}</width><height>{H}</height></size>"
    for name, objects in annotations.items():
        picture(folder / "JPEGImages" / f"{name}.jpg")
        write(folder / "Annotations" / f"{name}.xml", f"{head}<annotation>\n{size}{objects}\n</annotation>")
    write(folder / "ImageSets" / "Main" / "train.txt", "\n".join(annotations))


def coco_set(folder: Path, annotations: list[dict], images: list[dict] | None = None) -> Path:
    for name in ("a.jpg", "b.jpg"):
        picture(folder / "images" / name)
    plain = [{"id": 7, "file_name": "a.jpg", "height": H, "width": W}, {"id": "b", "file_name": "b.jpg"}]
    categories = [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}]
    data = {"images": plain if images is None else images, "annotations": annotations, "categories": categories}
    return write(folder / "instances.json", json.dumps(data))


def tree_hash(folder: Path) -> str:
    """Of every name, byte and time of change under a folder."""
    digest = hashlib.sha256()
    for file in [folder, *sorted(folder.rglob("*"))]:
        state = file.lstat()
        digest.update(f"{file} {state.st_mtime_ns} {state.st_mode}".encode("utf-8", "surrogateescape"))
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()

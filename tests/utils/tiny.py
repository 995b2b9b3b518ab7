"""What the tests of training share: a network without batch norm, small enough to train in a test, and its data."""

from pathlib import Path

import cv2
import numpy as np
import torch

from models.cfg import parse_cfg
from models.darknet import Darknet
from models.losses import TrainStep, build_criterion
from utils.structures import Batch, Targets

SIZE, NAMES = 64, ["square", "bar"]

CFG = """
[net]
width=64
height=64
channels=3

[convolutional]
filters=8
size=3
stride=4
pad=1
activation=leaky

[convolutional]
filters=16
size=3
stride=4
pad=1
activation=leaky

[convolutional]
filters=14
size=1
stride=1
pad=1
activation=linear

[yolo]
mask=0,1
anchors=12,12, 24,12
classes=2
num=2
"""


def tiny_step(text: str = CFG) -> TrainStep:
    """The network and YOLOv3's criterion, always from the same initial weights."""
    torch.manual_seed(0)
    model = Darknet(parse_cfg(text))
    return TrainStep(model, build_criterion({"name": "wh_iou", "iou_t": 0.2}, {"name": "yolo"}, model.num_classes))


def tiny_batch(rows, num_images: int = 8) -> Batch:
    """Pictures ``rows`` of ``num_images`` random ones with a box each."""
    draw = np.random.default_rng(5)
    images = draw.integers(0, 255, (num_images, 3, SIZE, SIZE), dtype=np.uint8)[list(rows)]
    corner = draw.integers(0, SIZE - 24, (num_images, 2))[list(rows)].astype(np.float32)
    size = np.tile(np.float32([14, 13]), (len(corner), 1))
    boxes = torch.from_numpy(np.concatenate([corner, corner + size], axis=1))
    image = torch.arange(len(corner))
    return Batch(images=torch.from_numpy(images), targets=Targets.of(image, image % 2, boxes), infos=())


def write_pictures(folder: Path, num: int = 6) -> Path:
    """A data set of coloured squares and bars in the ordinary layout; returns its data.yaml."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for number in range(num):
            image = draw.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
            lines = []
            for label, (width, height) in enumerate(((12, 12), (26, 10))):
                x, y = draw.integers(0, SIZE - width), draw.integers(0, SIZE - height)
                image[y : y + height, x : x + width] = (60, 60, 250) if label else (250, 250, 60)
                numbers = [(x + width / 2) / SIZE, (y + height / 2) / SIZE, width / SIZE, height / SIZE]
                lines.append(f"{label} " + " ".join(map(str, numbers)))
            cv2.imwrite(str(folder / "images" / split / f"{number}.png"), image)
            (folder / "labels" / split / f"{number}.txt").write_text("\n".join(lines) + "\n")
    yaml = folder / "data.yaml"
    yaml.write_text("train: images/train\nval: images/val\nnames: [square, bar]\n")
    return yaml

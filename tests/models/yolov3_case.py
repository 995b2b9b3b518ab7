"""What the tests of assigners and losses share: raw maps -> Predictions, golden cases, and made-up batches."""

import json

import numpy as np
import torch

from models.coders import SigmoidExp
from models.heads import YoloHead
from models.raw_predictions import RawPredictions
from models.section import Option, Section
from utils.boxes import xywh_to_xyxy
from utils.structures import Targets

YOLOV3 = SigmoidExp()
ANCHORS = [[(62, 45), (59, 119), (116, 90)], [(30, 61), (45, 20), (33, 23)], [(10, 13), (16, 30), (23, 29)]]


def make_heads(anchors=ANCHORS, num_classes=3, coder=YOLOV3, **keys) -> tuple[YoloHead, ...]:
    """Heads of one table of anchors, each with its part of it; ``keys`` stand in every section."""
    table = [tuple(map(float, pair)) for sizes in anchors for pair in sizes]
    keys = {"classes": num_classes, **keys}
    section = Section(
        "yolo", 7, "test.cfg", {key: Option(key, str(value), 8, str(value)) for key, value in keys.items()}
    )
    heads, start = [], 0
    for sizes in anchors:
        mask = range(start, start + len(sizes))
        start += len(sizes)
        heads.append(YoloHead(anchors=table, mask=mask, num_classes=num_classes, coder=coder, section=section))
    return tuple(heads)


def decode(raws, anchors, size, coder=YOLOV3) -> RawPredictions:
    """Raw outputs, per head [B, A, h, w, 5 + C], through the real heads, as in training."""
    heads = make_heads(anchors, raws[0].shape[-1] - 5, coder)
    maps = [raw.permute(0, 1, 4, 2, 3).flatten(1, 2) for raw in raws]
    return RawPredictions(heads, maps, size)


class Golden:
    """One file of golden/yolov3 or yolov5 as tensors of ``dtype`` on ``device``; raw maps are leaves.

    ``prefix`` picks one of several successive calls (``s0/``).
    """

    def __init__(self, path, dtype=torch.float32, device="cpu", coder=YOLOV3, prefix=""):
        self.data = {key.removeprefix(prefix): value for key, value in np.load(path).items()}
        meta = json.loads(str(self.data["meta"]))
        self.hyp, self.gr, self.size, self.num_classes = meta["hyp"], meta["gr"], tuple(meta["img_hw"]), meta["nc"]
        self.num_levels = len(self.data["strides"])
        self.anchors = [self.data[f"anchors_px{level}"].tolist() for level in range(self.num_levels)]
        self.raws = [
            torch.tensor(self.data[f"p{level}"], dtype=dtype, device=device).requires_grad_()
            for level in range(self.num_levels)
        ]
        rows = torch.tensor(self.data["targets"], device=device)
        height, width = self.size
        boxes = xywh_to_xyxy(rows[:, 2:] * rows.new_tensor([width, height, width, height]))
        self.targets = Targets.of(rows[:, 0].long(), rows[:, 1].long(), boxes)
        self.preds = decode(self.raws, self.anchors, self.size, coder)

    def rows(self) -> dict[str, np.ndarray]:
        """The peer's assignment in our words: image, prior, target of all levels."""
        columns = {"image": [], "prior": [], "target": []}
        for level, grid in enumerate(self.preds.priors.grids):
            image, anchor, row, column, target = (
                self.data[f"l{level}_{key}"] for key in ("b", "a", "gj", "gi", "target_row")
            )
            columns["image"].append(image)
            columns["prior"].append(grid.start + (anchor * grid.rows + row) * grid.columns + column)
            columns["target"].append(target)
        return {name: np.concatenate(parts) for name, parts in columns.items()}


def make_raws(num_images=2, num_classes=3, size=(96, 128), seed=0, dtype=torch.float64, scale=1.0):
    """Random raw outputs of three heads, strides 32, 16, 8; leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_images, 3, size[0] // s, size[1] // s, 5 + num_classes) for s in (32, 16, 8)]
    raws = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes]
    return [raw.to(dtype).requires_grad_() for raw in raws]


def make_targets(rows, ignore=()) -> Targets:
    """Targets from (image, label, x1, y1, x2, y2) rows and ignore regions from (image, x1, y1, x2, y2) rows."""
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    ignore = torch.tensor(ignore, dtype=torch.float32).reshape(-1, 5)
    return Targets.of(rows[:, 0].long(), rows[:, 1].long(), rows[:, 2:], ignore[:, 0].long(), ignore[:, 1:])


# two objects in one slot (rows 1 and 2), one on the lower right border, one of a shape like no anchor, a tiny one
OBJECTS = [
    (0, 0, 10, 10, 60, 70),
    (0, 1, 65, 20, 100, 50),
    (0, 2, 66, 21, 100, 50),
    (0, 1, 100, 70, 128, 96),
    (1, 2, 0, 40, 128, 42),
    (1, 0, 30, 30, 34, 34),
    (1, 1, 40, 35, 50, 50),
]

"""Golden cases of YOLOX as ours, and its two generations of assignment."""

import json

import numpy as np
import torch

from models.assigners.simota import SimOTA
from models.coders import CornerOffsetExp
from models.heads import YoloxHead
from models.structures import Predictions
from utils.boxes import xywh_to_xyxy
from utils.structures import Targets

GENERATIONS = {"main": SimOTA(), "v030": SimOTA(region="box_or_center", center_radius=2.5, penalty=1e5)}


def decode(raws, size) -> Predictions:
    """Raw maps [B, 5 + C, h, w] through the real head."""
    heads = [YoloxHead(num_classes=raw.shape[1] - 5, coder=CornerOffsetExp(), section=None) for raw in raws]
    return Predictions.cat([head.decode(raw, size) for head, raw in zip(heads, raws)])


def make_raws(num_images=2, num_classes=3, size=(96, 128), seed=0, dtype=torch.float32, scale=1.0):
    """Random raw maps at strides 8, 16, 32; leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_images, 5 + num_classes, size[0] // s, size[1] // s) for s in (8, 16, 32)]
    return [(torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_() for shape in shapes]


class Golden:
    """One file of golden/yolox as tensors of ``dtype`` on ``device``; raw maps are leaves."""

    def __init__(self, path, dtype=torch.float32, device="cpu"):
        self.data = dict(np.load(path))
        meta = json.loads(str(self.data["meta"]))
        self.num_classes, self.size, self.use_l1 = meta["nc"], tuple(meta["img_hw"]), meta["use_l1"]
        self.raws = [torch.tensor(self.data[f"raw{i}"], dtype=dtype, device=device).requires_grad_() for i in range(3)]
        labels = torch.tensor(self.data["labels"])
        image, self.label_row = (labels.sum(2) > 0).nonzero(as_tuple=True)  # rows of zeros are padding
        rows = labels[image, self.label_row]
        self.targets = Targets.of(image, rows[:, 0].long(), xywh_to_xyxy(rows[:, 1:])).to(device)
        self.preds = decode(self.raws, self.size)

    def matched(self, assignment) -> np.ndarray:
        """Label row [B, P] of each slot, -1 for none: the peer's way to write an assignment down."""
        rows = assignment.compact()
        matched = torch.full(assignment.ignore.shape, -1)
        matched[rows.image.cpu(), rows.prior.cpu()] = self.label_row[rows.target.cpu()]
        return matched.numpy()

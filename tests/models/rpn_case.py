"""One file of golden/rpn as our nouns. The peer's slots run row, column, anchor; ours anchor, row, column."""

import json
from types import SimpleNamespace

import numpy as np
import torch

from models.anchors import cell_anchors, grid_priors
from models.coders import AnchorDeltas
from models.structures import Assignment, Predictions, Priors
from utils.structures import Targets


class GoldenRPN:
    """Tensors of ``dtype``; raw maps are leaves. ``ours(x)`` brings [..., R] of the peer into our order of slots."""

    def __init__(self, path, dtype=torch.float32):
        data = self.data = dict(np.load(path))
        meta = json.loads(str(data["meta"]))
        self.hyp, self.size, self.num_images = meta["hyp"], tuple(meta["img_hw"]), meta["bs"]
        height, width = self.size
        self.grids = [(height // stride, width // stride) for stride in data["strides"].tolist()]
        ratios = self.hyp["aspect_ratios"][0]
        self.cells = [cell_anchors(sizes, ratios) for sizes in self.hyp["anchor_sizes"]]
        offset = self.hyp["anchor_offset"]
        cpu = torch.device("cpu")
        parts = [grid_priors(c, offset, g, self.size, cpu, dtype) for c, g in zip(self.cells, self.grids)]
        self.priors = Priors.cat(parts)
        orders, start = [], 0
        for (rows, columns), cells in zip(self.grids, self.cells):
            number = np.arange(rows * columns * len(cells)).reshape(rows, columns, len(cells))
            orders.append(start + number.transpose(2, 0, 1).ravel())
            start += number.size
        self.order = np.concatenate(orders)

        boxes = [data[f"gt_boxes{k}"].reshape(-1, 4) for k in range(self.num_images)]
        image = np.repeat(np.arange(self.num_images), [len(rows) for rows in boxes])
        self.starts = np.cumsum([0, *map(len, boxes)])
        boxes = torch.tensor(np.concatenate(boxes))
        self.targets = Targets.of(torch.tensor(image), torch.zeros(len(image), dtype=torch.int64), boxes)
        weights = tuple(self.hyp["bbox_reg_weights"])
        self.head = SimpleNamespace(coder=AnchorDeltas(weights))
        levels = range(len(self.grids))
        logits = np.concatenate([data[f"logits{level}"] for level in levels], 1)[:, self.order]
        deltas = np.concatenate([data[f"deltas{level}"] for level in levels], 1)[:, self.order]
        self.logits, self.deltas = (torch.tensor(x, dtype=dtype).requires_grad_() for x in (logits, deltas))
        where = self.priors.center, self.priors.size, self.priors.stride
        self.preds = Predictions(
            boxes=self.head.coder.decode(self.deltas, *where),
            deltas=self.deltas,
            obj=self.logits,
            cls=self.logits[..., None],
            priors=self.priors,
        )

    def stacked(self, key: str) -> np.ndarray:
        """``key0``, ``key1``, ... of all pictures [B, P, ...] in our order."""
        return np.stack([self.data[f"{key}{k}"][self.order] for k in range(self.num_images)])

    def gradient(self, key: str, kind: str) -> np.ndarray:
        """The peer's gradient of logits or deltas in our order."""
        levels = range(len(self.grids))
        return np.concatenate([self.data[f"grad_{key}{level}_{kind}"] for level in levels], 1)[:, self.order]

    def assignment(self, labels: np.ndarray) -> Assignment:
        """The peer's labels [B, P] with its matches, as an assignment."""
        image, prior = map(torch.tensor, np.nonzero(labels == 1))
        match = self.stacked("match_index")[image, prior] + self.starts[image]
        weight = torch.ones(len(image))
        return Assignment(
            image=image, prior=prior, target=torch.tensor(match), weight=weight, ignore=torch.tensor(labels < 0)
        )

"""A network that finds the same 16 objects in every picture: whole commands have answers known in advance.

All weights are zero; the head's biases make one anchor of each of the 4 x 4 cells certain, with the anchor's own size.
"""

from pathlib import Path

import torch

from models.cfg import parse_cfg
from models.darknet import Darknet
from models.darknet_weights import Header, write_weights
from utils.checkpoint import with_prefix, write_checkpoint

NAMES = ["square", "bar"]
SIDE, CELL, ANCHOR = 64, 16, (12.0, 8.0)  # of the input, a cell, the anchor (w, h); pixels
OBJECTNESS, CLASSES = 4.0, (3.0, -9.0)  # logits: a square, hardly a bar
SCORE = float(torch.tensor(OBJECTNESS).sigmoid() * torch.tensor(CLASSES[0]).sigmoid())

CFG = f"""
[net]
width={SIDE}
height={SIDE}
channels=3

[convolutional]
filters=4
size=3
stride=4
pad=1
activation=leaky

[convolutional]
filters=14
size=3
stride=4
pad=1
activation=linear

[yolo]
mask=0,1
anchors=12,8, 30,30
classes=2
num=2
"""


def grid_network(text: str = CFG) -> Darknet:
    model = Darknet(parse_cfg(text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        *_, bias = (value for name, value in model.named_parameters() if name.endswith("bias"))
        bias.copy_(torch.tensor([0.0, 0, 0, 0, OBJECTNESS, *CLASSES, 0, 0, 0, 0, -20, 0, 0]))
    return model


def write_grid_network(path: Path, names=NAMES, text: str = CFG) -> Path:
    """As a checkpoint (.safetensors), or with its cfg beside it (.weights)."""
    model = grid_network(text)
    if path.suffix == ".weights":
        path.with_suffix(".cfg").write_text(text)
        write_weights(model, path, Header())
    else:
        write_checkpoint(path, with_prefix("model", model.state_dict()), {"cfg": text, "names": list(names)})
    return path


def grid_boxes(size: tuple[int, int], *, stretch: bool) -> torch.Tensor:
    """Those of the 16 boxes [n, 4] that lie in a picture of ``size`` (h, w), row by row, clipped to it."""
    centers = torch.arange(4) * CELL + CELL / 2
    y, x = (axis.flatten() for axis in torch.meshgrid(centers, centers, indexing="ij"))
    half = torch.tensor(ANCHOR) / 2
    boxes = torch.stack([x - half[0], y - half[1], x + half[0], y + half[1]], dim=1).double()
    height, width = size
    scale = torch.tensor([SIDE / width, SIDE / height]) if stretch else torch.full((2,), SIDE / max(size))
    pad = torch.floor((SIDE - (scale * torch.tensor([width, height])).round()) / 2)
    boxes = (boxes - pad.repeat(2)) / scale.repeat(2)
    boxes = boxes.clamp(torch.zeros(4), torch.tensor([width, height] * 2))
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]

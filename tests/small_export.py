"""A small network with everything an export has to fold, route and decode, and a checkpoint of it with pictures."""

from pathlib import Path

import cv2
import numpy as np
import torch

from models.cfg import parse_cfg
from models.darknet import Darknet
from models.export import SUFFIXES, main, parse_args
from utils.checkpoint import with_prefix, write_checkpoint

NAMES = ["square", "bar"]
CFG = """[net]
# kept
width=64
height=64
channels=3
[convolutional]
batch_normalize=1
filters=8
size=3
stride=8
pad=1
activation=leaky
[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=mish
[maxpool]
size=3
stride=1
[convolutional]
filters=14
size=1
activation=linear
[yolo]
mask=2,3
anchors=10,14, 23,27, 37,58, 81,82
classes=2
num=4
[route]
layers=-3
[upsample]
stride=2
[route]
layers=-1,0
[convolutional]
filters=14
size=1
activation=linear
[yolo]
mask=0,1
anchors=10,14, 23,27, 37,58, 81,82
classes=2
num=4
"""


def small_network(text: str = CFG) -> Darknet:
    """Random weights and statistics that see something in a few slots."""
    model, rng = Darknet(parse_cfg(text)).eval(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=rng)
            elif value.is_floating_point():
                value.normal_(0, 0.8, generator=rng)
        for index in model.graph.heads:
            bias = model.layers[model.graph.layers[index].inputs[0]].conv.bias
            bias.view(2, -1)[:, 4] = -18
    return model


def write_small_checkpoint(folder: Path, names=NAMES, text: str = CFG) -> Path:
    """``small.safetensors`` and ``pictures/`` in a folder, which is returned."""
    tensors = with_prefix("model", small_network(text).state_dict())
    write_checkpoint(folder / "small.safetensors", tensors, {"cfg": text, "names": list(names)})
    (folder / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for number in range(4):
        image = cv2.resize(draw.integers(0, 255, (9, 12, 3), dtype=np.uint8), (120, 90))
        cv2.imwrite(str(folder / "pictures" / f"{number}.png"), image)
    return folder


def export_to(path: Path, folder: Path, *options: str) -> Path:
    """Export the checkpoint of ``folder`` as a user does, in this process."""
    arguments = [folder / "small.safetensors", "--source", folder / "pictures", "-o", path, *options]
    main(parse_args(list(map(str, arguments))))
    return path


def exported(folder: Path, *options: str) -> Path:
    """The file that these options make; made once."""
    name = options[options.index("--format") + 1] if "--format" in options else "onnx"
    path = folder / ("-".join(option.strip("-") for option in options) + SUFFIXES[name])
    return path if path.exists() else export_to(path, folder, *options)

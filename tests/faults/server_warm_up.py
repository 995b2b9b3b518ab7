"""Imported once by the process that forks (``server.py``): everything a run needs, a step of each optimiser."""

import importlib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
LAZY = ["torch.utils.tensorboard", "torch.distributed", "torch.nn.parallel", "torch.utils.data", "numpy.ma"]
MODULES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for room in ("models", "utils")
    for file in sorted((ROOT / room).rglob("*.py"))
    if file.stem != "__init__"
]


def warm_up() -> None:
    for name in (*LAZY, *MODULES, "train", "test", "detect"):
        importlib.import_module(name)
    weight = torch.nn.Parameter(torch.zeros(2))
    for optimizer in (torch.optim.SGD([weight], lr=0.1, momentum=0.9), torch.optim.AdamW([weight])):
        weight.square().sum().backward()
        optimizer.step()


warm_up()

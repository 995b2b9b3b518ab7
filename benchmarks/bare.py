"""A cfg's network out of torch's own layers, and a step of it with nothing around: the limit of a training step.

Only what YOLOv3 cfgs have: convolutions, leaky, max pools, routes, shortcuts, upsampling. Raw maps of the heads come
out; the loss is their mean square, the optimiser plain SGD. No average of weights, no clipping, no targets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cfg import Cfg
from models.graph import build_graph


class BareNetwork(nn.Module):
    """Images [B, 3, H, W] in 0..1 -> the maps that the heads would read."""

    def __init__(self, cfg: Cfg):
        super().__init__()
        graph = build_graph(cfg)
        self.specs, self.last_use = graph.layers, graph.last_use
        self.layers = nn.ModuleList(LAYERS.get(spec.section.type, nn.Identity)(spec) for spec in self.specs)
        self.outputs = [graph.layers[head].inputs[0] for head in graph.heads]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = {-1: images}
        for index, (spec, layer) in enumerate(zip(self.specs, self.layers)):
            inputs = [maps[source] for source in spec.inputs]
            maps[index] = JOINS.get(spec.section.type, lambda x: x)(*inputs) if len(inputs) > 1 else layer(inputs[0])
            for source in [number for number in maps if number >= 0 and self.last_use[number] <= index]:
                if source not in self.outputs:
                    del maps[source]
        return [maps[index] for index in self.outputs]


def _convolution(spec) -> nn.Module:
    section, size = spec.section, spec.section.int("size", 1)
    filters, normalized = section.int("filters"), section.flag("batch_normalize")
    layers = [nn.Conv2d(spec.in_shapes[0][0], filters, size, section.int("stride", 1), size // 2, bias=not normalized)]
    if normalized:
        layers.append(nn.BatchNorm2d(filters))
    if section.str("activation") == "leaky":
        layers.append(nn.LeakyReLU(0.1, inplace=True))
    return nn.Sequential(*layers)


def _pool(spec) -> nn.Module:
    size, stride = spec.section.int("size"), spec.section.int("stride")
    pool = nn.MaxPool2d(size, stride)
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(size, 1)) if (size, stride) == (2, 1) else pool


class _Upsample(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.stride = spec.section.int("stride")

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=self.stride)


LAYERS = {"convolutional": _convolution, "maxpool": _pool, "upsample": _Upsample}
JOINS = {"route": lambda *maps: torch.cat(maps, dim=1), "shortcut": torch.add}


def bare_step(model: BareNetwork, images: Tensor, dtype: torch.dtype | None):
    """A function that takes one training step on ``images``, under autocast to ``dtype`` if there is one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            maps = model(images)
        sum(output.float().square().mean() for output in maps).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

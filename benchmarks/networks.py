"""The networks of the comparisons: the backbone and neck of cfg/matchbox.cfg, under different heads.

All heads see the same two maps, at strides 16 and 8, and cost about the same: the one 3x3 convolution of the coupled
head is shared out between two towers of half its width, one for classes, one for boxes and objectness.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from models.cfg import Cfg, adapt_classes, parse_cfg, read_cfg
from models.darknet import Darknet

ROOT = Path(__file__).resolve().parents[1]


def coupled(num_classes: int) -> Cfg:
    """cfg/matchbox.cfg: three anchors per cell, one convolution for all they say."""
    return adapt_classes(read_cfg(ROOT / "cfg/matchbox.cfg"), num_classes)[0]


def decoupled(num_classes: int) -> Cfg:
    """As `coupled`, with a tower for the classes and one for boxes and objectness."""
    return _with_heads(num_classes, _anchor_head)


def anchor_free(num_classes: int) -> Cfg:
    """One slot per cell behind the two towers: ``[yolox]``."""
    return _with_heads(num_classes, _yolox_head)


NETWORKS: dict[str, Callable[[int], Cfg]] = {"yolo": coupled, "yolo-decoupled": decoupled, "yolox": anchor_free}


def build_network(name: str, num_classes: int) -> Darknet:
    """A new network. Heads behind a ``[route]`` of convolutions start with the same biases as behind a single one."""
    model = Darknet(NETWORKS[name](num_classes))
    for index in model.graph.heads:
        before = model.graph.layers[model.graph.layers[index].inputs[0]]
        if before.section.type == "route":
            biases = [model.layers[source].conv.bias for source in before.inputs]
            joined = torch.cat([bias.detach() for bias in biases])
            model.layers[index].init_bias(joined)
            with torch.no_grad():
                for bias, values in zip(biases, joined.split([len(bias) for bias in biases])):
                    bias.copy_(values)
    return model


def _with_heads(num_classes: int, head_text: Callable) -> Cfg:
    """matchbox.cfg with each head replaced, from its 3x3 convolution on, by ``head_text(that section, [yolo])``."""
    base = coupled(num_classes)
    heads = [index for index, section in enumerate(base.layers) if section.type == "yolo"]
    base = base.with_options([_absolute(base, head + 1) for head in heads[:-1]])  # what is before it changes length
    lines, text, start = base.text.splitlines(), [], 0
    for index in heads:
        stem, yolo = base.layers[index - 2], base.layers[index]
        end = base.layers[index + 1].line - 1 if index + 1 < len(base.layers) else len(lines)
        text += [*lines[start : stem.line - 1], head_text(stem, yolo)]
        start = end
    return parse_cfg("\n".join(text), f"{base.path} with another head")


def _absolute(cfg: Cfg, index: int):
    """The change by which the ``[route]`` at ``index`` names its layers from the beginning."""
    layers = (index + layer if layer < 0 else layer for layer in cfg.layers[index].ints("layers"))
    return cfg.layers[index], "layers", ",".join(map(str, layers))


class _Layers(list):
    """Layers of a head as text; numbers count from its first one, -1 is the layer before it."""

    def add(self, text: str) -> int:
        self.append(text)
        return len(self) - 1

    def convolution(self, source: int, filters: int) -> int:
        """A 1x1 convolution with bias, of what any layer makes."""
        self.route(source)
        return self.add(f"[convolutional]\nfilters={filters}\nsize=1\nstride=1\npad=1\nactivation=linear\n")

    def tower(self, filters: int) -> int:
        """A 3x3 convolution of what the layer before the head makes."""
        self.route(-1)
        text = f"filters={filters}\nsize=3\nstride=1\npad=1\nactivation=leaky\n"
        return self.add(f"[convolutional]\nbatch_normalize=1\n{text}")

    def route(self, *sources: int) -> int:
        if sources == (len(self) - 1,):
            return sources[0]
        return self.add(f"[route]\nlayers={self.back(*sources)}\n")

    def back(self, *sources: int) -> str:
        """As the next layer names them."""
        return ",".join(str(source - len(self)) for source in sources)


def _yolox_head(convolution, yolo) -> str:
    layers, width, classes = _Layers(), convolution.int("filters") // 2, yolo.int("classes")
    cls = layers.convolution(layers.tower(width), classes)
    tower = layers.tower(width)
    box, objectness = layers.convolution(tower, 4), layers.convolution(tower, 1)
    layers.add(f"[yolox]\nfrom={layers.back(box, objectness, cls)}\nclasses={classes}\n")
    return "\n".join(layers)


def _anchor_head(convolution, yolo) -> str:
    """A convolution per anchor for each of its parts, joined as ``[yolo]`` wants them: box, objectness, classes."""
    layers, width, classes = _Layers(), convolution.int("filters") // 2, yolo.int("classes")
    anchors = yolo.ints("mask")
    tower = layers.tower(width)
    cls = [layers.convolution(tower, classes) for _ in anchors]
    tower = layers.tower(width)
    box = [layers.convolution(tower, 4) for _ in anchors]
    objectness = [layers.convolution(tower, 1) for _ in anchors]
    layers.route(*(part for anchor in zip(box, objectness, cls) for part in anchor))
    layers.add("[yolo]\n" + "\n".join(f"{option.key}={option.text}" for option in yolo.options.values()) + "\n")
    return "\n".join(layers)

"""From the shapes a layer reads to the shape it makes, its parameters and its FLOPs; one function per rule.

Each takes a section and the layers it reads (`LayerSpec`, the image among them) and returns `Made`, or raises the
section's error where the shapes do not fit. Source: Darknet's arithmetic. Imports no torch.

Letters: c channels, h w height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from models.cfg import head_filters
from models.section import Section

Shape = tuple[int, int, int]
MASKS_PER_IMAGE = 100  # that FLOPs are counted for


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer as the network sees it."""

    index: int
    section: Section
    inputs: tuple[int, ...]  # absolute; -1 is the image
    in_shapes: tuple[Shape, ...]  # c, h, w of each input
    shape: Shape  # c, h, w of the output
    params: int = 0  # what training changes
    floats: int = 0  # what a .weights file holds for this layer (running mean and variance too)
    flops: int = 0  # for one image; a multiply-add is two


class Made(NamedTuple):
    shape: Shape
    params: int = 0
    floats: int | None = None  # None: as many as params
    flops: int = 0


def show(shape: Shape) -> str:
    return "x".join(map(str, shape))


def same(section, inputs):
    return Made(inputs[0].shape)


def windows(section, shape, size, stride_x, stride_y, padding) -> tuple[int, int]:
    """(h, w) of a sliding window; ``padding`` is the total of both sides."""
    _, h, w = shape
    if h + padding < size or w + padding < size:
        raise section.error(f"window {size}x{size} is larger than its input {show(shape)} with padding", "size")
    return (h + padding - size) // stride_y + 1, (w + padding - size) // stride_x + 1


def strides(section) -> tuple[int, int]:
    stride = section.int("stride", 1)
    return section.int("stride_x", stride), section.int("stride_y", stride)


def blurred(section, hw, stride_x, stride_y) -> tuple[int, int]:
    """(h, w) after the anti-aliasing blur: 1 is 3x3 with padding 1, 2 is 2x2 without."""
    size, padding = {1: (3, 2), 2: (2, 0)}.get(section.int("antialiasing"), (3, 2))
    return windows(section, (1, *hw), size, stride_x, stride_y, padding)


def convolution(section, shape, filters, size, groups, hw, learned_norm) -> Made:
    weights = filters * (shape[0] // groups) * size * size
    extra = 2 * filters if learned_norm else 0  # running mean and variance are stored, not learned
    if section.flag("dontloadscales"):
        extra = -filters if learned_norm else 0
    params = weights + filters * (2 if learned_norm else 1)
    return Made((filters, *hw), params, params + extra, 2 * weights * hw[0] * hw[1])


def convolutional(section, inputs):
    shape = inputs[0].shape
    filters, size = section.int("filters"), section.int("size", 1)
    norm = section.flag("batch_normalize") or section.flag("cbn")
    groups = 1 if section.flag("xnor") else section.int("groups", 1)
    for what, channels in (("input channels", shape[0]), ("filters", filters)):
        if channels % groups:
            raise section.error(f"groups={groups} does not divide {channels} {what}", "groups")
    if norm_groups := section.int("group_normalize", 0):
        if norm:
            raise section.error("both batch_normalize and group_normalize", "group_normalize", "one of them")
        if filters % norm_groups:
            raise section.error(f"group_normalize={norm_groups} does not divide {filters} filters", "group_normalize")
    padding = size // 2 if section.flag("pad") else section.int("padding", 0)
    if section.int("dilation", 1) > 1 and size > 1 and 2 * padding != size - 1:
        raise section.error(
            "dilation with a padding that does not keep the size", "dilation", "use an odd size and pad=1"
        )
    if section.flag("antialiasing"):
        hw = windows(section, shape, size, 1, 1, 2 * padding)
        made = convolution(section, shape, filters, size, groups, hw, norm)
        return made._replace(shape=(filters, *blurred(section, hw, *strides(section))))
    hw = windows(section, shape, size, *strides(section), 2 * padding)
    made = convolution(section, shape, filters, size, groups, hw, norm)
    if norm_groups:  # a scale and a shift instead of a bias, no running statistics
        made = made._replace(params=made.params + filters, floats=made.params + filters)
    return made._replace(params=0, floats=0) if "share_index" in section else made


def crnn(section, inputs):
    shape, size = inputs[0].shape, section.int("size", 3)
    padding, norm = size // 2 if section.flag("pad") else section.int("padding", 0), section.flag("batch_normalize")
    hidden, parts = section.int("hidden"), []
    for part, filters in (("input", hidden), ("self", hidden), ("output", section.int("output"))):
        hw = windows(section, shape, size, 1, 1, 2 * padding)
        if part == "self" and hw != shape[1:]:
            found = f"a state of {show(shape)} becomes {show((filters, *hw))}"
            raise section.error(f"{found}, expected the same size", "size", "an odd size with pad=1")
        parts.append(convolution(section, shape, filters, size, 1, hw, norm))
        shape = (filters, *hw)
    return Made(shape, sum(p.params for p in parts), sum(p.floats for p in parts), sum(p.flops for p in parts))


def maxpool(section, inputs):
    shape = inputs[0].shape
    stride_x, stride_y = strides(section)
    if section.flag("maxpool_depth"):
        channels = section.int("out_channels", 1)
        if shape[0] % channels:
            raise section.error(f"out_channels={channels} does not divide {shape[0]} input channels", "out_channels")
        return Made((channels, *shape[1:]))
    size = section.int("size", section.int("stride", 1))
    padding = section.int("padding", size - 1)
    if padding > 2 * size - 2:
        raise section.error(f"padding={padding}: some windows of {size} see nothing but padding", "padding")
    if section.flag("antialiasing"):
        hw = blurred(section, windows(section, shape, size, 1, 1, padding), stride_x, stride_y)
    else:
        hw = windows(section, shape, size, stride_x, stride_y, padding)
    return Made((shape[0], *hw))


def avgpool(section, inputs):
    return Made((inputs[0].shape[0], 1, 1))


def upsample(section, inputs):
    c, h, w = inputs[0].shape
    stride = section.int("stride", 2)
    if stride > 0:
        return Made((c, h * stride, w * stride))
    if h % -stride or w % -stride:
        raise section.error(f"stride={stride} does not divide its input {show(inputs[0].shape)}", "stride")
    return Made((c, h // -stride, w // -stride))


def reorg(section, inputs):
    c, h, w = inputs[0].shape
    stride = section.int("stride", 1)
    if section.flag("reverse"):
        if c % (stride * stride):
            raise section.error(f"stride={stride}: {c} channels are not a multiple of {stride * stride}", "stride")
        return Made((c // (stride * stride), h * stride, w * stride))
    if h % stride or w % stride or (section.type == "reorg" and c % (stride * stride)):
        raise section.error(f"stride={stride} does not divide its input {show((c, h, w))}", "stride")
    return Made((c * stride * stride, h // stride, w // stride))


def mismatch(section, inputs, key, what):
    """The error of two layers that do not fit, naming both."""
    shapes = ", ".join(f"{show(i.shape)} from [{i.section.type}] line {i.section.line}" for i in inputs)
    sides = [max(i.shape[1:]) for i in inputs]
    hint = "make width and height of [net] multiples of the largest stride" if max(sides) - min(sides) == 1 else ""
    return section.error(f"{what}: {shapes}", key, hint)


def route(section, inputs):
    groups, group_id = section.int("groups", 1), section.int("group_id", 0)
    if not 0 <= group_id < groups:
        raise section.error(f"group_id={group_id}, expected 0..{groups - 1}", "group_id")
    if len({i.shape[1:] for i in inputs}) > 1:
        raise mismatch(section, inputs, "layers", "routed layers differ in height or width")
    for source in inputs:
        if source.shape[0] % groups:
            raise section.error(f"groups={groups} does not divide {source.shape[0]} channels", "groups")
    return Made((sum(i.shape[0] // groups for i in inputs), *inputs[0].shape[1:]))


def shortcut(section, inputs):
    """The previous layer's shape. A larger layer is added every n-th pixel, as the first ResNet cfgs expect."""
    h, w = inputs[0].shape[1:]
    for source in inputs[1:]:
        step = source.shape[1] // h
        if source.shape[1:] not in ((h, w), (h * step, w * step)):
            raise mismatch(section, (inputs[0], source), "from", "added layers differ in height or width")
    kind = section.str("weights_type", "none")
    if kind == "none":
        return Made(inputs[0].shape)
    if section.str("weights_normalization", "none") == "none":
        raise section.error("weights_type without weights_normalization", "weights_type", "add relu or softmax")
    return Made(inputs[0].shape, len(inputs) * (inputs[0].shape[0] if kind == "per_channel" else 1))


def sam(section, inputs):
    if inputs[0].shape != inputs[1].shape:
        raise mismatch(section, inputs, "from", "multiplied layers differ in shape")
    return Made(inputs[1].shape)


def scale_channels(section, inputs):
    (c, h, w), large = inputs[0].shape, inputs[1].shape
    wanted = (1, *large[1:]) if section.flag("scale_wh") else (large[0], 1, 1)
    if (c, h, w) != wanted:
        raise mismatch(section, inputs, "from", f"scales of shape {show(wanted)} expected")
    return Made(large)


def connected(section, inputs):
    c, h, w = inputs[0].shape
    outputs, norm = section.int("output", 1), section.flag("batch_normalize")
    weights = c * h * w * outputs
    params = weights + outputs * (2 if norm else 1)
    return Made((outputs, 1, 1), params, params + (2 * outputs if norm else 0), 2 * weights)


def batchnorm(section, inputs):
    c = inputs[0].shape[0]
    return Made(inputs[0].shape, 2 * c, 4 * c)


def crop(section, inputs):
    c, h, w = inputs[0].shape
    crop_h, crop_w = section.int("crop_height"), section.int("crop_width")
    if crop_h > h or crop_w > w:
        raise section.error(f"crop {crop_h}x{crop_w} is larger than its input {show((c, h, w))}", "crop_height")
    return Made((c, crop_h, crop_w))


def softmax(section, inputs):
    c, h, w = inputs[0].shape
    if (c * h * w) % section.int("groups", 1):
        raise section.error(f"groups={section.int('groups')} does not divide {c * h * w} values", "groups")
    return Made(inputs[0].shape)


def implicit(section, inputs):
    filters, atoms = section.int("filters", 128), section.int("atoms", 1)
    return Made((filters, atoms, 1), filters * atoms)


def head(section, inputs):
    """The maps it reads as one. That their channels fit is checked where the feeding convolutions are known."""
    needed = len(head_filters(section))
    if len(inputs) != needed:
        found = f"from names {len(inputs)} layers, [{section.type}] reads {needed}"
        raise section.error(found, "from", "from = boxes, objectness, classes")
    if len({i.shape[1:] for i in inputs}) > 1:
        raise mismatch(section, inputs, "from", "the maps of a head differ in height or width")
    return Made((sum(i.shape[0] for i in inputs), *inputs[0].shape[1:]))


def fcos(section, inputs):
    """A head with one learned number: how many strides a unit of its distances is. Its map has objectness always."""
    (c, h, w), *_ = head(section, inputs)
    return Made((c + (len(inputs) == 2), h, w), params=1)


def roi(section, inputs):
    """The pyramid it reads passes through; parameters and FLOPs are those of the fully connected layers."""
    for finer, coarser in pairwise(inputs):
        halved = tuple(-(-side // 2) for side in finer.shape[1:])
        if coarser.shape != (finer.shape[0], *halved):
            raise mismatch(
                section, (finer, coarser), "from", "a pyramid: finest map first, each next one half the size"
            )
    units, classes = section.int("units", 1024), section.int("classes")
    sides = [inputs[0].shape[0] * section.int("pool", 7) ** 2, *[units] * section.int("fc", 2)]
    weights = sum(a * b for a, b in pairwise(sides)) + units * (5 * classes + 1)
    params = weights + units * section.int("fc", 2) + 5 * classes + 1
    return Made(inputs[0].shape, params, flops=2 * weights * section.int("post_nms", 1000))


def mask(section, inputs):
    """Passes on the pyramid of the [roi] before it."""
    if inputs[0].section.type != "roi":
        raise section.error(
            f"[mask] after [{inputs[0].section.type}]", hint="it stands right after [roi], whose maps it reads"
        )
    channels, convs, area = section.int("channels", 256), section.int("convs", 4), section.int("pool", 14) ** 2
    widths = [inputs[0].shape[0], *[channels] * convs]
    weights = sum(9 * a * b for a, b in pairwise(widths))
    upsample, last = 4 * channels**2, channels * section.int("classes")
    params = weights + upsample + last + channels * (convs + 1) + section.int("classes")
    return Made(inputs[0].shape, params, flops=2 * (weights + upsample + 4 * last) * area * MASKS_PER_IMAGE)

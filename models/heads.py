"""Heads: what the raw maps in front of a head's section say, slot by slot.

Letters: B images, A anchors of this head, V values per anchor, C classes, P = A * h * w slots, h w rows and columns.

A raw map [B, A * V, h, w] holds logits: sigmoids belong to the head, also where the cfg writes ``activation=logistic``
in front of it (new_coords). ``decode`` follows Darknet (darknet-format, section 8) and is differentiable. A further
head is one class and one row in ``HEADS``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.anchors import cell_anchors, grid_priors
from models.cfg import head_anchors, head_mask
from models.coders import AnchorDeltas, Coder, CornerOffsetExp, Distances, SigmoidExp, SigmoidSquare
from models.roi_heads import MaskHead, RoiHead
from models.structures import Predictions, Priors
from utils.boxes import at_least_float32

OBJECTNESS_BIAS = -4.5  # sigmoid 0.011: most slots are background (YOLOv3 archive)
CERTAIN = 30.0  # sigmoid 1 to float32, of a head without objectness
RARE_BIAS = -math.log(99)  # sigmoid 0.01 (RetinaNet)


class Head(nn.Module):
    """What all heads share: a raw map [B, A * V, h, w] in, Predictions of A * h * w slots out.

    Attributes:
        num_classes, coder, section: the last is the cfg's, for the keys that only training reads.
        offers: what an assigner or a loss may need of a head (its ``needs``): ``anchors``, ``objectness`` logits, the
            ``[yolo] training keys``, ``proposals``.
        demands: what a loss must need, or it would leave this head untaught.
    """

    offers = frozenset({"objectness"})
    demands = frozenset()
    num_anchors = 1
    num_box_values = 5  # channels of an anchor before its class logits
    objectness = 4  # which of them is the objectness
    offset = 0.5  # where in its cell a slot's point stands, x and y, in cells

    def __init__(self, *, num_classes: int, coder: Coder, section):
        super().__init__()
        self.num_classes, self.coder, self.section = num_classes, coder, section

    @property
    def num_values(self) -> int:
        return self.num_box_values + self.num_classes

    def forward(self, *maps: Tensor) -> Tensor:
        """The raw map: training, inference and export all start from it. A head that reads several joins them."""
        return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)

    def sizes(self, stride: tuple[float, float]) -> tuple[tuple[float, float], ...]:
        """Width and height, pixels, of what each of the A slots of a cell stands for: without anchors, the cell."""
        return (stride,)

    def priors(self, grid: tuple[int, int], size: tuple[int, int], device=None, dtype=torch.float32) -> Priors:
        """The P slots of a ``grid`` (h, w) on an input of ``size`` (height, width) pixels; both give the stride."""
        sizes = self.sizes((size[1] / grid[1], size[0] / grid[0]))
        return grid_priors(sizes, self.offset, tuple(grid), tuple(size), torch.device(device or "cpu"), dtype)

    def decode(self, raw: Tensor, size: tuple[int, int]) -> Predictions:
        """Raw map [B, A * V, h, w] of an input of ``size`` (height, width) -> Predictions of P slots.

        Half types are computed in float32, float64 stays.
        """
        raw = at_least_float32(raw)
        priors = self.priors(raw.shape[2:], size, raw.device, raw.dtype)
        return Predictions(priors=priors, **self.say(self.values(raw), priors.center, priors.size, priors.stride))

    def values(self, raw: Tensor) -> Tensor:
        """A raw map as [B, A, h, w, V]: a view, whatever the memory format, so that a reader copies what it takes."""
        return raw.unflatten(1, (self.num_anchors, self.num_values)).permute(0, 1, 3, 4, 2)

    def say(self, values: Tensor, center: Tensor, size: Tensor, stride: Tensor) -> dict[str, Tensor | None]:
        """The fields of `Predictions` but its priors, of values [B, A, h, w, V] and what their slots stand for.

        ``center``, ``size``, ``stride`` are [P, 2], or [B, P, 2] where the pictures' slots differ.
        """
        deltas = self.deltas(values)
        return {
            "boxes": self.coder.decode(deltas, center, size, stride),
            "deltas": deltas,
            "obj": values[..., self.objectness].flatten(1),
            "cls": self.class_logits(values[..., self.num_box_values :].flatten(1, 3)),
            "quality": self.quality(values),
        }

    def deltas(self, values: Tensor) -> Tensor:
        """Regression outputs [B, P, 4] among values [B, A, h, w, V]."""
        return values[..., :4].flatten(1, 3)

    def class_logits(self, logits: Tensor) -> Tensor:
        """Logits whose sigmoid is the class probability, from those of the map, [B, P, C] both."""
        return logits

    def quality(self, values: Tensor) -> Tensor | None:
        """A further factor [B, P] of the score, from values [B, A, h, w, V]."""
        return None


class YoloHead(Head):
    """``[yolo]``: per anchor x, y, w, h, objectness, classes; all independent sigmoids but the size.

    Attributes:
        anchors: float [A, 2], width and height in pixels of the network's input, of this head.
        all_anchors: float [num, 2]: the whole table of the cfg, of which ``mask`` picks this head's rows.
    """

    offers = frozenset({"anchors", "objectness", "[yolo] training keys"})
    bias_classes = True

    def __init__(
        self, *, anchors: Sequence[tuple[float, float]], mask: Sequence[int], num_classes: int, coder: Coder, section
    ):
        super().__init__(num_classes=num_classes, coder=coder, section=section)
        self.anchor_table, self.mask = tuple(anchors[row] for row in mask), tuple(mask)
        self.register_buffer("anchors", torch.tensor(self.anchor_table), persistent=False)
        self.register_buffer("all_anchors", torch.tensor(list(anchors)), persistent=False)

    @classmethod
    def from_spec(cls, spec) -> "YoloHead":
        """The head of a layer of the graph, which has checked that the map in front of it has A * V channels."""
        section = spec.section
        scale_x_y = section.float("scale_x_y", 1.0)
        coder = SigmoidSquare(scale_x_y) if section.flag("new_coords") else SigmoidExp(scale_x_y)
        return cls.of(section, coder)

    @classmethod
    def of(cls, section, coder: Coder) -> "YoloHead":
        """The head of a section whose boxes are coded so. Errors: anchors or mask that cannot be."""
        anchors, mask = head_anchors(section), head_mask(section)
        return cls(anchors=anchors, mask=mask, num_classes=section.int("classes"), coder=coder, section=section)

    @property
    def num_anchors(self) -> int:
        return len(self.anchor_table)

    def sizes(self, stride: tuple[float, float]) -> tuple[tuple[float, float], ...]:
        return self.anchor_table

    @torch.no_grad()
    def init_bias(self, bias: Tensor) -> None:
        """Set the bias [A * V] of the convolution before the head, in place: rare objects, rare classes.

        Objectness -4.5, classes ln(0.6 / (C - 0.99)) as in the YOLOv3 archive: a new network starts near the right
        rate of positives. Darknet has no such prior.
        """
        values = bias.view(self.num_anchors, self.num_values)
        values[:, self.objectness] = OBJECTNESS_BIAS
        if self.bias_classes:
            values[:, self.num_box_values :] = torch.tensor(0.6 / (self.num_classes - 0.99)).log()


class GaussianYoloHead(YoloHead):
    """``[Gaussian_yolo]``: x, sx, y, sy, w, sw, h, sh, objectness, classes (Choi et al. 2019).

    The score is also multiplied by 1 - mean sigma; ``deltas`` are the four means.
    """

    offers = frozenset({"anchors", "objectness"})
    num_box_values = 9
    objectness = 8

    @classmethod
    def from_spec(cls, spec) -> "GaussianYoloHead":
        spec.section.str("yolo_point", "center", choices=("center",))
        return super().from_spec(spec)

    def deltas(self, values: Tensor) -> Tensor:
        return values[..., 0:8:2].flatten(1, 3)

    def quality(self, values: Tensor) -> Tensor:
        return 1 - values[..., 1:8:2].sigmoid().mean(-1).flatten(1)


class RegionHead(YoloHead):
    """``[region]`` (YOLOv2): classes are one softmax; anchors are written in cells, hence pixels depend on the input.

    Here ``anchors`` and ``all_anchors`` stay in cells; priors are in pixels as everywhere.
    """

    offers = frozenset({"anchors", "objectness"})
    bias_classes = False  # a softmax has no rare class

    @classmethod
    def from_spec(cls, spec) -> "RegionHead":
        section = spec.section
        if "tree" in section:
            hint = "remove tree= and map= for a flat list of classes"
            raise section.error("a tree of classes (YOLO9000) is not supported", "tree", hint)
        for key, default, only in (("softmax", 0, 1), ("coords", 4, 4)):
            if section.int(key, default) != only:
                raise section.error(f"[region] needs {key}={only}, found {section.int(key, default)}", key)
        return cls.of(section, SigmoidExp())

    def sizes(self, stride: tuple[float, float]) -> tuple[tuple[float, float], ...]:
        return tuple((width * stride[0], height * stride[1]) for width, height in self.anchor_table)

    def class_logits(self, logits: Tensor) -> Tensor:
        return softmax_logits(logits)


class YoloxHead(Head):
    """``[yolox]``: one slot per cell, no anchors; boxes, objectness and classes come from a layer each (``from``).

    The decoupled convolutions stand in the cfg as ordinary layers. Raw map: x, y in cells from the cell's corner, log w
    and h in cells, objectness, classes. YOLOX (Ge et al. 2021), section 2.1.
    """

    @classmethod
    def from_spec(cls, spec) -> "YoloxHead":
        return cls(num_classes=spec.section.int("classes"), coder=CornerOffsetExp(), section=spec.section)

    @torch.no_grad()
    def init_bias(self, boxes: Tensor, objectness: Tensor, classes: Tensor) -> None:
        """Set the biases [4], [1], [C] in place: probabilities of 0.01, as YOLOX and RetinaNet."""
        objectness.fill_(RARE_BIAS)
        classes.fill_(RARE_BIAS)


class FcosHead(Head):
    """``[fcos]``: one point per cell; distances from it to the left, top, right and bottom side, objectness, classes.

    Reads three layers (``from``), or two, without objectness. Raw map: distances in strides (negative ones count as 0)
    after a factor that is learned per level, objectness (where there is none a constant that is certain), classes.

    ``offset`` is where in its cell the point stands: 0.5, the middle, in FCOS; 0, the corner, in AutoAssign.
    FCOS (Tian et al. 2019), section 3; AutoAssign (Zhu et al. 2020), section 4.1, for the objectness.
    """

    def __init__(self, *, num_classes: int, offset: float, with_objectness: bool, section):
        super().__init__(num_classes=num_classes, coder=Distances(), section=section)
        self.offset = offset
        self.offers = frozenset({"objectness"} if with_objectness else ())
        self.scale = nn.Parameter(torch.ones(1))

    @classmethod
    def from_spec(cls, spec) -> "FcosHead":
        section = spec.section
        return cls(
            num_classes=section.int("classes"),
            offset=section.float("offset", 0.5),
            with_objectness=len(spec.inputs) == 3,
            section=section,
        )

    def forward(self, boxes: Tensor, *maps: Tensor) -> Tensor:
        if len(maps) == 1:
            maps = (torch.full_like(boxes[:, :1], CERTAIN), *maps)
        return torch.cat([boxes * self.scale, *maps], dim=1)

    @torch.no_grad()
    def init_bias(self, boxes: Tensor, *biases: Tensor) -> None:
        """Set the biases [4], [C] in place: sides four strides away, classes of probability 0.02, as AutoAssign."""
        boxes.fill_(4)
        biases[-1].fill_(-math.log(49))

    def darknet_arrays(self) -> dict[str, Tensor]:
        return {"scale": self.scale}


class RpnHead(Head):
    """``[rpn]``: per anchor x, y, w, h, objectness; anchors are sizes x ratios. One section per level of the pyramid.

    Its convolutions stand in the cfg as ordinary layers, shared by the levels through ``share_index``. Biases stay 0:
    half of what it learns from may be objects. Faster R-CNN (Ren et al. 2015), section 3.1.
    """

    offers = frozenset({"anchors", "objectness", "proposals"})

    def __init__(self, *, anchors: Sequence[tuple[float, float]], offset: float, section):
        super().__init__(num_classes=0, coder=AnchorDeltas(), section=section)
        self.anchor_table, self.offset = tuple(anchors), offset

    @classmethod
    def from_spec(cls, spec) -> "RpnHead":
        section = spec.section
        anchors = cell_anchors(section.floats("sizes"), section.floats("ratios"))
        return cls(anchors=anchors, offset=section.float("offset", 0.0), section=section)

    @property
    def num_anchors(self) -> int:
        return len(self.anchor_table)

    def sizes(self, stride: tuple[float, float]) -> tuple[tuple[float, float], ...]:
        return self.anchor_table

    def init_bias(self, bias: Tensor) -> None:
        """Leave it."""


HEADS = {
    "yolo": YoloHead,
    "Gaussian_yolo": GaussianYoloHead,
    "region": RegionHead,
    "yolox": YoloxHead,
    "fcos": FcosHead,
    "rpn": RpnHead,
    "roi": RoiHead,
    "mask": MaskHead,
}


def softmax_logits(logits: Tensor) -> Tensor:
    """Logits [..., C] whose sigmoid is ``softmax(logits)``: z_i - logsumexp of all others.

    The sum over the others is joined from those before and those after, so that nothing cancels; linear in C.
    """
    edge = torch.full_like(logits[..., :1], torch.finfo(logits.dtype).min / 4)
    before = torch.cat([edge, logits[..., :-1]], dim=-1).logcumsumexp(-1)
    after = torch.cat([edge, logits[..., 1:].flip(-1)], dim=-1).logcumsumexp(-1).flip(-1)
    return logits - torch.logaddexp(before, after)

"""The heads of the second stage: what is in a region, where it ends, and which of its pixels belong to it.

Letters: B images, R regions (boxes) of all pictures together, L levels, F channels and h w sizes of the pyramid,
S cells along a side of a pooled region, C classes.

These heads do not know their regions when the network runs: ``forward`` hands on the pyramid, ``decode`` offers a
`Branch` that can be asked about any regions, by the loss about sampled ones, at inference about the best proposals.
A branch works in float32 at least, as decoding does everywhere.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.coders import AnchorDeltas
from models.convolutional import DarknetLinear
from models.proposals import ProposalRule
from models.structures import Predictions, Priors
from utils.boxes import at_least_float32, box_area

CANONICAL_STRIDE = 16  # of the level for regions whose side is ``canonical_size`` (FPN, equation 1: level 4, 224)
SAMPLES = 2  # along each side of a cell


class Branch(NamedTuple):
    """A head of the second stage with the pyramid it looks at: ``branch(image, boxes)`` asks it about regions."""

    head: "RegionHead"
    maps: tuple[Tensor, ...]  # L x [B, F, h, w]
    size: tuple[int, int]  # height and width of the images, pixels

    def __call__(self, image: Tensor, boxes: Tensor):
        """What the head says of boxes [R, 4] (pixels) in pictures ``image`` (int64 [R])."""
        level = levels_of(boxes, self.maps, self.size, self.head.canonical_size)
        return self.head.look(pool_regions(self.maps, self.size, level, image, boxes, self.head.pool))


def levels_of(boxes: Tensor, maps: tuple[Tensor, ...], size: tuple[int, int], canonical_size: float) -> Tensor:
    """Which map each box [R, 4] is read from, int64 [R]: one coarser for every doubling of its side.

    A side of ``canonical_size`` belongs to stride 16. FPN (Lin et al. 2017), equation 1.
    """
    finest = math.log2(CANONICAL_STRIDE * maps[0].shape[2] / size[0])
    side = box_area(boxes).clamp(min=0).sqrt() / canonical_size
    # the margin of the peers: a side that is exact but for rounding belongs above
    return (finest + torch.log2(side + 1e-8) + 1e-6).floor().clamp(0, len(maps) - 1).long()


def pool_regions(
    maps: tuple[Tensor, ...], size: tuple[int, int], level: Tensor, image: Tensor, boxes: Tensor, pool: int
) -> Tensor:
    """[R, F, S, S]: every region of [R, 4] cut from its level's map and resampled to ``pool`` cells a side.

    ROI align (He et al. 2017, section 3) with pixel centres at .5, as detectron2 ``ROIAlignV2``; 2 x 2 samples in a
    cell whatever the region's size, so that cost is known. Waits for the device: levels have no fixed size.
    """
    from torchvision.ops import roi_align  # takes a second to import, and one-stage networks never do

    regions = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    rows = [(level == number).nonzero().squeeze(1) for number in range(len(maps))]
    parts = [
        roi_align(features, regions[row], pool, features.shape[2] / size[0], sampling_ratio=SAMPLES, aligned=True)
        for features, row in zip(maps, rows)
    ]
    return torch.cat(parts).index_select(0, torch.cat(rows).argsort())


class RegionHead(nn.Module):
    """What [roi] and [mask] share. A subclass has ``look(pooled [R, F, S, S])``.

    Attributes:
        offers, demands: see ``models.heads.Head``. It has no slots that could lack anything.
    """

    offers = frozenset({"anchors", "objectness", "proposals"})
    demands = frozenset({"proposals"})
    default_pool: int

    def __init__(self, section):
        super().__init__()
        self.section, self.num_classes = section, section.int("classes")
        self.pool = section.int("pool", self.default_pool)
        self.canonical_size = section.float("canonical_size", 224.0)

    @classmethod
    def from_spec(cls, spec) -> "RegionHead":
        return cls(spec.section, spec.in_shapes[0][0])

    def forward(self, *maps: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The pyramid: of [roi] the maps it is given, of [mask] what the [roi] before it returned."""
        return maps[0] if isinstance(maps[0], tuple) else maps

    def decode(self, maps: tuple[Tensor, ...], size: tuple[int, int]) -> Predictions:
        """No slots, but this head's `Branch` over the maps of an input of ``size`` (H, W)."""
        maps = tuple(at_least_float32(features) for features in maps)
        none = maps[0].new_zeros(len(maps[0]), 0, 4)
        number, pair = none.new_zeros(0, dtype=torch.int64), none[0, :, :2]
        return Predictions(
            boxes=none,
            deltas=none,
            obj=none[..., 0],
            cls=none[..., :0],
            priors=Priors(center=pair, size=pair, stride=pair, level=number, anchor=number, grids=()),
            refine={self.section.type: Branch(self, maps, size)},
        )

    def init_bias(self, *biases: Tensor) -> None:
        """Leave those of the pyramid."""

    def darknet_arrays(self) -> dict[str, Tensor]:
        """Layer by layer the bias, then the weights, as of a convolution."""
        return {name: array for name, array in reversed(list(self.named_parameters()))}


class RoiHead(RegionHead):
    """``[roi]``: fully connected layers over a pooled region, then classes and boxes. Fast R-CNN (Girshick 2015).

    ``look`` returns logits [R, C + 1], the last one background, and deltas [R, C, 4], a box per class in units of the
    region times 10, 10, 5, 5.

    Attributes:
        rule: which proposals it is asked about at inference.
    """

    default_pool = 7

    def __init__(self, section, channels: int):
        super().__init__(section)
        self.coder = AnchorDeltas(weights=(10.0, 10.0, 5.0, 5.0))
        self.rule = ProposalRule(
            pre_nms=section.int("pre_nms", 1000),
            post_nms=section.int("post_nms", 1000),
            nms_thresh=section.float("nms_thresh", 0.7),
            min_size=section.float("min_size", 0.0),
        )
        units = section.int("units", 1024)
        sides = [channels * self.pool**2, *[units] * section.int("fc", 2)]
        self.layers = nn.ModuleList(DarknetLinear(a, b) for a, b in pairwise(sides))
        self.classes = nn.Linear(units, self.num_classes + 1)
        self.boxes = nn.Linear(units, 4 * self.num_classes)
        for layer, std in ((self.classes, 0.01), (self.boxes, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def look(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        x = pooled.flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.classes(x), self.boxes(x).unflatten(1, (self.num_classes, 4))


class MaskHead(RegionHead):
    """``[mask]``: convolutions over a pooled region, doubled in size, then one mask per class.

    ``look`` returns logits [R, C, 2 S, 2 S]. Stands right after [roi], whose maps it reads. He et al. 2017, section 3.
    """

    default_pool = 14

    def __init__(self, section, channels: int):
        super().__init__(section)
        width = section.int("channels", 256)
        widths = [channels, *[width] * section.int("convs", 4)]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.masks = nn.Conv2d(width, self.num_classes, 1)
        for layer in (*self.layers, self.upsample):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.masks.weight, std=0.001)
        nn.init.zeros_(self.masks.bias)

    def look(self, pooled: Tensor) -> Tensor:
        for layer in (*self.layers, self.upsample):
            pooled = F.relu(layer(pooled))
        return self.masks(pooled)

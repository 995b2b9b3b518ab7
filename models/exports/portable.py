"""A network as other programs want it: pictures in, boxes and scores out, nothing else.

Letters: B pictures, A anchors of a head, h w of its map, P slots of all heads, N classes.
"""

import torch
from torch import Tensor, nn

from models.anchors import cell_centers
from models.darknet import Darknet
from models.exports.wish import Wish, scores_of
from models.graph import STAGES
from models.section import raise_errors
from models.structures import Predictions
from utils.boxes import at_least_float32
from utils.errors import UserError


class Portable(nn.Module):
    """Float32 images [B, C, H, W] in 0..1 -> boxes [B, P, 4] (xyxy, pixels of the input) and scores [B, P, N].

    Batch norms are folded. Decoding is that of the heads, in float32; where slots stand is a constant of the file, or
    with ``dynamic`` computed from the shape of each map. The slots of a head that has anchors keep their size there.
    """

    def __init__(self, wish: Wish):
        super().__init__()
        refuse_undetectable(wish.model)
        self.network, self.dynamic = wish.model.fuse(), wish.dynamic
        self.dtype = torch.float16 if wish.half else torch.float32
        self.network.to(self.dtype)
        strides = (torch.tensor(wish.model.size) / torch.tensor(shape) for shape in head_grids(wish.model))
        for number, (head, stride) in enumerate(zip(self.network.heads, strides)):
            y, x = stride.tolist()
            grid = (round(wish.size[0] / y), round(wish.size[1] / x))
            where = {"stride": torch.tensor([[x, y]]), "size": torch.tensor(head.sizes((x, y)))[:, None]}
            if not wish.dynamic:
                priors = head.priors(grid, wish.size)
                where = {name: getattr(priors, name).clone() for name in ("center", "size", "stride")}
            for name, value in where.items():
                self.register_buffer(f"{name}{number}", value, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self._say(number, raw) for number, raw in enumerate(self.network(images.to(self.dtype)))]
        return torch.cat([boxes for boxes, _ in parts], dim=1), torch.cat([scores for _, scores in parts], dim=1)

    def _say(self, number: int, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and scores of one head, from its map."""
        head = self.network.heads[number]
        said = head.say(head.values(at_least_float32(raw)), *self._priors(head, number, raw.shape[2], raw.shape[3]))
        preds = Predictions(priors=None, **said)
        return preds.boxes, scores_of(preds)

    def _priors(self, head: nn.Module, number: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Center, size and stride [P, 2] (or one row for all) of a head's slots."""
        stride, size = getattr(self, f"stride{number}"), getattr(self, f"size{number}")
        if not self.dynamic:
            return getattr(self, f"center{number}"), size, stride
        center = cell_centers(rows, columns, head.offset, stride[0]).repeat(head.num_anchors, 1)
        return center, size.expand(-1, rows * columns, -1).reshape(-1, 2), stride


def head_grids(model: Darknet) -> list[tuple[int, int]]:
    """(h, w) of the map of each head, at the cfg's size."""
    return [tuple(model.graph.layers[index].in_shapes[0][1:]) for index in model.graph.heads]


def refuse_undetectable(model: Darknet) -> None:
    """Raise a UserError for networks whose outputs are not one box and its scores per slot."""
    raise_errors(
        [
            head.section.problem(f"[{head.section.type}] looks at regions that are known at run time only")
            for head in model.heads
            if head.section.type in STAGES
        ]
    )
    if not model.heads:
        raise UserError(model.cfg.path, "has no head that detects", "a classifier goes with --format darknet")

"""Raw maps on their way to a loss, decoded only where somebody looks.

Letters: B images, P slots of the whole network, K rows of an assignment, C classes, A anchors and V values per anchor
of a head, h w rows and columns of its map.

A training step looks at the objectness of every slot and at everything of a few: with 80 classes, decoding all slots
copies 30 times what it needs, and the gradient of every slice of a map is a map of its own.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.structures import Predictions, Priors, Reading
from utils.boxes import at_least_float32


class RawPredictions:
    """`Predictions` of a network's raw maps: the same names, the same values, the same gradients.

    ``read`` decodes K slots and writes one gradient per map; ``obj`` and ``priors`` decode nothing; every other field
    is that of the decoded predictions of all slots, made when it is first asked for.

    Args:
        heads, outputs: of the network, one raw map [B, A * V, h, w] each (heads of a second stage: their maps).
        size: height and width of the images, pixels.
    """

    def __init__(self, heads: Sequence[nn.Module], outputs: Sequence[Tensor | tuple[Tensor, ...]], size):
        self.heads, self.outputs, self.size = heads, outputs, size
        self._maps = [(head, raw) for head, raw in zip(heads, outputs) if isinstance(raw, Tensor)]

    @cached_property
    def priors(self) -> Priors:
        return Priors.cat(
            [head.priors(raw.shape[2:], self.size, raw.device, _computed(raw.dtype)) for head, raw in self._maps]
        )

    @cached_property
    def obj(self) -> Tensor:
        with torch.enable_grad():  # who asks first may be an assigner, and a loss comes after it
            logits = [head.values(raw)[..., head.objectness].flatten(1) for head, raw in self._maps]
            return at_least_float32(torch.cat(logits, dim=1))

    @cached_property
    def decoded(self) -> Predictions:
        with torch.enable_grad():
            return Predictions.cat([head.decode(raw, self.size) for head, raw in zip(self.heads, self.outputs)])

    def __getattr__(self, name: str):
        if name in Predictions.__dataclass_fields__:
            return getattr(self.decoded, name)
        raise AttributeError(name)

    def read(self, image: Tensor, slot: Tensor) -> Reading:
        """As ``Predictions.read``."""
        priors = self.priors
        level = priors.level[slot]
        where = [part[slot, None] for part in (priors.center, priors.size, priors.stride)]  # [K, 1, 2]
        objectness, readings = [], []
        for (head, raw), grid in zip(self._maps, priors.grids):
            at = (slot - grid.start).clamp(0, grid.count - 1)  # of a slot of another head: any
            cell = at % (grid.rows * grid.columns)
            place = image, at // (grid.rows * grid.columns), cell // grid.columns, cell % grid.columns
            logits, rows = _Read.apply(raw, head, *place)
            objectness.append(at_least_float32(logits))
            # K pictures of one slot each are what decode() knows how to read
            said = head.say(at_least_float32(rows)[:, None, None, None], *where)
            readings.append([said[name].squeeze(1) for name in ("boxes", "deltas", "cls")])
        merged = readings[0]
        for number, reading in enumerate(readings[1:], start=1):
            here = (level == number)[:, None]
            merged = [torch.where(here, theirs, others) for theirs, others in zip(reading, merged)]
        return Reading(torch.cat(objectness, dim=1), *merged)


class _Read(torch.autograd.Function):
    """Objectness [B, A * h * w] of a raw map [B, A * V, h, w], and all values [K, V] of K of its slots."""

    @staticmethod
    def forward(ctx, raw: Tensor, head: nn.Module, *place: Tensor):
        ctx.save_for_backward(raw, *place)
        ctx.head = head
        values = head.values(raw)
        return values[..., head.objectness].flatten(1), values[place]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_objectness: Tensor, of_rows: Tensor):
        raw, *place = ctx.saved_tensors
        gradient = torch.zeros_like(raw)
        values = ctx.head.values(gradient)
        values[..., ctx.head.objectness] = of_objectness.view(values.shape[:-1])
        values.index_put_(tuple(place), of_rows, accumulate=True)
        return gradient, None, *[None for _ in place]


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

"""What each step was like: noted on the device, read for many steps at once, so that training does not wait for it.

Letters: P parameters that are taught.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.distributed import all_reduce_mean

FINITE, NORM, CULPRIT = range(3)  # columns of a note, before those of the loss terms


class Note(NamedTuple):
    """One step, the same on all processes."""

    epoch: int
    step: int  # from 0, over the whole training
    batches: range  # of the epoch, that made the step
    finite: bool  # False: the step was left out, no weight has moved
    norm: float  # of the gradient, before it was shortened
    culprit: str  # the parameter nearest to the loss whose gradient is not finite
    terms: dict[str, float]  # sums over the batches, means over their pictures and the processes


def describe(note: Note) -> str:
    """Which losses of a step, and whose gradient, are not finite."""
    found = [f"loss '{name}' is {term}" for name, term in note.terms.items() if not abs(term) < float("inf")]
    if note.culprit:
        found.append(f"gradient of {note.culprit} is not finite")
    return ", ".join(found)


class Ledger:
    """Notes of the steps since the last reading."""

    def __init__(self):
        self.steps, self.rows = [], []
        self.terms: tuple[str, ...] = ()

    def note(self, epoch: int, step: int, batches: range, terms: Sequence[str], row: Tensor, names: list[str]) -> None:
        """``row``: float64 [3 + len(terms)] in the order of the columns; ``names``: the P parameters."""
        self.steps.append((epoch, step, batches, names))
        self.rows.append(row)
        self.terms = tuple(terms)

    def read(self) -> list[Note]:
        """All notes since the last reading: the one place where training waits for the device."""
        if not self.rows:
            return []
        rows, steps = all_reduce_mean(torch.stack(self.rows)).tolist(), self.steps
        self.steps, self.rows = [], []
        return [
            Note(
                epoch,
                step,
                batches,
                finite=row[FINITE] == 1,
                norm=row[NORM],
                culprit=("", *names)[round(row[CULPRIT])],
                terms=dict(zip(self.terms, row[CULPRIT + 1 :])),
            )
            for (epoch, step, batches, names), row in zip(steps, rows)
        ]


def culprit(norms: Tensor) -> Tensor:
    """Number, from 1, of the last of P gradients, by their norms [P], that is not finite; 0 where all are. float64.

    Gradients are made from the last layer to the first: the last one is where the trouble began.
    """
    numbers = torch.arange(1, len(norms) + 1, device=norms.device)
    return (~torch.isfinite(norms) * numbers).amax().double()


class KeptBuffers:
    """What a module measures and counts (means and variances of its batch norms), put back where a step was not finite.

    A forward pass writes them before anybody knows what the step is worth. For each type one copy, one choice and one
    multi-tensor write per step, all on the device.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.renew()

    def renew(self) -> None:
        """The present values are good."""
        self.buffers = defaultdict(list)
        for buffer in self.module.buffers():
            if buffer.numel():
                self.buffers[buffer.dtype].append(buffer)
        self.good = {dtype: _flat(buffers) for dtype, buffers in self.buffers.items()}

    @torch.no_grad()
    def keep(self, finite: Tensor) -> None:
        """The present values become the good ones where ``finite`` (bool []), else the good ones are put back."""
        for dtype, buffers in self.buffers.items():
            self.good[dtype] = torch.where(finite, _flat(buffers), self.good[dtype])
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        """The good values."""
        for dtype, buffers in self.buffers.items():
            parts = self.good[dtype].split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers)])


def _flat(buffers: Sequence[Tensor]) -> Tensor:
    return torch.cat([buffer.reshape(-1) for buffer in buffers])

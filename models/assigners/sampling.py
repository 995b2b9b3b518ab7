"""Of many labelled slots, a few to learn from, by a lottery without a generator.

Letters: B images, P slots.
"""

import torch
from torch import Tensor

SLOT_BITS = 24  # of a ticket's 56; the rest is chance
NOT_DRAWN = 2**62  # larger than every ticket


def tickets(logits: Tensor, seed: int) -> Tensor:
    """Int64 [B, P]: every slot's place in the lottery, no two alike in a picture; the smallest are drawn first.

    Hashed from the slot's number, ``seed`` and the bits of its objectness logit in float32. A generator would be state
    between calls and differ between devices; a hash of the slot alone would draw the same slots at every step. This is
    pure, and new at every step because the network has moved (Choices: detectron2 draws from torch's global generator).
    """
    num_slots = logits.shape[1]
    assert num_slots < 2**SLOT_BITS
    slot = torch.arange(num_slots, device=logits.device)
    bits = logits.float().view(torch.int32).long() & 0xFFFFFFFF
    start = (seed * 0x9E3779B1) & 0xFFFFFFFF
    return (_scramble(_scramble(slot ^ start) ^ bits) << SLOT_BITS) + slot


def subsample(labels: Tensor, order: Tensor, num_samples: int, positive_fraction: float) -> Tensor:
    """Keep at most ``num_samples`` labels per picture; the others become -1.

    Positives fill up to ``int(num_samples * positive_fraction)`` of the places, negatives all that are left (detectron2
    ``subsample_labels``).

    Args:
        labels: int8 [B, P], 1, 0 or -1 (neither; never drawn).
        order: int64 [B, P], lower is drawn first, no two alike in a row.

    Returns:
        int8 [B, P].
    """
    limit = int(num_samples * positive_fraction)
    positives = _first(labels == 1, order, limit, torch.full_like(labels[:, 0], limit, dtype=torch.int64))
    negatives = _first(labels == 0, order, num_samples, num_samples - positives.sum(1))
    return torch.where(positives | negatives, labels, -1)


def _first(candidates: Tensor, order: Tensor, limit: int, room: Tensor) -> Tensor:
    """Mask [B, P] of the ``room`` [B] (``limit`` at most) earliest candidates of each picture."""
    value, slot = torch.where(candidates, order, NOT_DRAWN).topk(min(limit, order.shape[1]), dim=1, largest=False)
    taken = (value < NOT_DRAWN) & (torch.arange(value.shape[1], device=order.device) < room[:, None])
    return torch.zeros_like(candidates).scatter(1, slot, taken)


def _scramble(number: Tensor) -> Tensor:
    """A bijection of 32-bit numbers without a pattern; both factors are below 2^31, so int64 holds the products."""
    number = ((number ^ (number >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    number = ((number ^ (number >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return number ^ (number >> 15)

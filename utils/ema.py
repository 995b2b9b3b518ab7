"""A running average of the weights: smoother than any single step's, and what is evaluated and kept."""

import math
from copy import deepcopy

import torch
from torch import nn


class EMA:
    """Exponential moving average of a module's parameters and floating-point buffers; integers are copied.

    ``average += (1 - decay(updates)) * (module - average)`` with ``decay(u) = decay * (1 - exp(-u / tau))``: the first
    steps count fully, so that random initial weights are soon forgotten (the ramp is YOLOv5's).
    """

    def __init__(self, module: nn.Module, *, decay: float = 0.9999, tau: float = 2000.0):
        self.module = deepcopy(module).eval().requires_grad_(False)
        self.decay, self.tau, self.updates = decay, tau, 0

    def decay_at(self, updates: int) -> float:
        return self.decay * (1 - math.exp(-updates / self.tau))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards ``module``'s present values: one fused operation for all floating-point tensors."""
        self.updates += 1
        average, present = self.module.state_dict(), module.state_dict()
        floating = [name for name, tensor in average.items() if tensor.is_floating_point()]
        weight = 1 - self.decay_at(self.updates)
        torch._foreach_lerp_([average[name] for name in floating], [present[name] for name in floating], weight)
        for name in average.keys() - set(floating):
            average[name].copy_(present[name])

"""How weights move: parameter groups, optimisers, and learning rate and momentum as pure functions of the step.

Because nothing here counts by itself, a resumed run needs no scheduler state: the step number is all of it.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The ``optim`` section of a recipe."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"  # sgd is Nesterov's
    lr0: float = 0.01  # learning rate after warm-up
    lrf: float = 0.01  # the last learning rate, as a share of lr0 (cosine, linear)
    momentum: float = 0.937  # SGD's momentum, Adam's beta1
    weight_decay: float = 5e-4  # on weights of convolutions only
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    steps: tuple[float, ...] = (0.8, 0.9)  # where schedule "step" drops, as shares of the training
    gamma: float = 0.1  # by how much it drops
    warmup_epochs: float = 3.0  # never more than a third of the training
    warmup_momentum: float = 0.8
    warmup_bias_lr: float = 0.1
    nominal_batch: int = 64  # images per optimiser step; smaller batches are accumulated up to it
    clip_norm: float = 10.0  # longest gradient; longer ones are shortened to it
    ema_decay: float = 0.9999
    ema_tau: float = 2000.0  # optimiser steps over which the decay ramps up

    def __post_init__(self):
        positive = ("lr0", "nominal_batch", "clip_norm", "ema_tau", "gamma")
        wrong = [f"{name} must be > 0, found {getattr(self, name)}" for name in positive if getattr(self, name) <= 0]
        shares = ("lrf", "momentum", "warmup_momentum", "ema_decay")
        wrong += [f"{n} must be in 0..1, found {getattr(self, n)}" for n in shares if not 0 <= getattr(self, n) <= 1]
        not_negative = ("weight_decay", "warmup_epochs", "warmup_bias_lr")
        wrong += [
            f"{name} must be >= 0, found {getattr(self, name)}" for name in not_negative if getattr(self, name) < 0
        ]
        if wrong:
            raise ValueError("; ".join(wrong))


# ------------------------------------------------------------------------------------------------------------ schedules


def _cosine(optim: Optim, share: float) -> float:
    return optim.lrf + (1 - optim.lrf) * (1 + math.cos(math.pi * share)) / 2


def _linear(optim: Optim, share: float) -> float:
    return optim.lrf + (1 - optim.lrf) * (1 - share)


def _step(optim: Optim, share: float) -> float:
    return optim.gamma ** sum(share >= step for step in optim.steps)


def _constant(optim: Optim, share: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[Optim, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "step": _step,
    "constant": _constant,
}


class Rates(NamedTuple):
    """What holds during one optimiser step."""

    lr: float
    bias_lr: float
    momentum: float


def rates(optim: Optim, step: int, steps_per_epoch: int, epochs: int) -> Rates:
    """Learning rates and momentum of optimiser step ``step`` (from 0).

    Warm-up is linear in the step: lr from 0, bias_lr from ``warmup_bias_lr``, momentum from ``warmup_momentum``, as the
    YOLOv5 recipe has it; the schedule runs underneath it.
    """
    total = steps_per_epoch * epochs
    lr = optim.lr0 * SCHEDULES[optim.schedule](optim, min(step / total, 1.0))
    warmup = min(optim.warmup_epochs * steps_per_epoch, total / 3)
    share = min((step + 1) / warmup, 1.0) if warmup else 1.0
    return Rates(
        lr=lr * share,
        bias_lr=optim.warmup_bias_lr + (lr - optim.warmup_bias_lr) * share,
        momentum=optim.warmup_momentum + (optim.momentum - optim.warmup_momentum) * share,
    )


# ----------------------------------------------------------------------------------------------------------- optimisers


def parameter_groups(module: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Every trainable parameter exactly once, by name: ``decayed`` weights, ``biases``, and ``others`` (norms, scales).

    A weight of one dimension scales (batch norm); only weights that mix channels are decayed.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"decayed": {}, "biases": {}, "others": {}}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            kind = name.rpartition(".")[2]
            group = "biases" if kind == "bias" else "decayed" if kind == "weight" and parameter.ndim > 1 else "others"
            groups[group][name] = parameter
    return groups


def _sgd(groups, optim: Optim) -> Optimizer:
    optimizer = _quick_to_start(SGD)(
        groups, lr=optim.lr0, momentum=optim.momentum, nesterov=optim.momentum > 0, fused=True
    )
    for parameter in (parameter for group in groups for parameter in group["params"]):
        # torch would take memory as it is and fill it in the first step, which guarded_step may leave out
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _adam(groups, optim: Optim) -> Optimizer:
    return _quick_to_start(Adam)(groups, lr=optim.lr0, betas=(optim.momentum, 0.999), fused=True)


def _adamw(groups, optim: Optim) -> Optimizer:
    return _quick_to_start(AdamW)(groups, lr=optim.lr0, betas=(optim.momentum, 0.999), fused=True)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}


def _quick_to_start(kind: type[Optimizer]) -> type[Optimizer]:
    """``kind`` without what torch wraps around its methods for those who compile them.

    The wrappers' first call imports torch's compiler, which takes as long as importing torch (benchmarks/startup.py).
    """
    plain = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in plain}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(inspect.unwrap(kind.step))})


def build_optimizer(module: nn.Module, optim: Optim) -> Optimizer:
    """One fused optimiser with the three groups; each group carries the ``names`` of its parameters."""
    groups = []
    for kind, parameters in parameter_groups(module).items():
        decay = optim.weight_decay if kind == "decayed" else 0.0
        groups.append(
            {"kind": kind, "names": list(parameters), "params": list(parameters.values()), "weight_decay": decay}
        )
    return OPTIMIZERS[optim.optimizer](groups, optim)


def set_rates(optimizer: Optimizer, rates: Rates) -> None:
    """Put a step's rates into the groups."""
    for group in optimizer.param_groups:
        group["lr"] = rates.bias_lr if group["kind"] == "biases" else rates.lr
        if "betas" in group:
            group["betas"] = (rates.momentum, group["betas"][1])
        else:
            group["momentum"] = rates.momentum


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> tuple[Tensor, Tensor]:
    """Shorten the gradient of all parameters together to ``max_norm``.

    Returns:
        The norms [P] of their gradients and that of all together, before, on the device.
    """
    norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters]))
    norm = torch.linalg.vector_norm(norms)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norms, norm


def guarded_step(optimizer: Optimizer, check: Tensor) -> None:
    """One step, left out on the device itself where ``check`` is not finite: no weight is ever poisoned.

    ``found_inf`` is how torch's fused optimisers take that decision without the CPU waiting for it.
    """
    optimizer.found_inf = (~torch.isfinite(check)).to(torch.float32)
    optimizer.step()
    del optimizer.found_inf


def split_evenly(num_batches: int, size: int) -> Iterator[range]:
    """The batches of an epoch in groups of about ``size`` that make one optimiser step each; none is a small rest."""
    num_groups = max(1, round(num_batches / size))
    edges = [group * num_batches // num_groups for group in range(num_groups + 1)]
    return (range(start, stop) for start, stop in itertools.pairwise(edges))

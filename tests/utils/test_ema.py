"""The average equals its closed form."""

import math

import torch
from torch import nn

from utils.ema import EMA


def test_average_equals_the_recursion_in_float64():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = EMA(module, decay=0.9, tau=5.0)
    expected = {name: tensor.double().clone() for name, tensor in module.state_dict().items()}
    for update in range(1, 21):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        module(torch.randn(8, 3))  # moves the batch norm's buffers
        ema.update(module)
        decay = 0.9 * (1 - math.exp(-update / 5.0))
        for name, tensor in module.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    for name, tensor in ema.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert ema.module[1].num_batches_tracked.item() == 20  # counters are copied, not averaged


def test_average_of_a_constant_is_the_constant_and_owns_its_memory():
    module = nn.Linear(4, 4)
    ema = EMA(module)
    for _ in range(10):
        ema.update(module)
    torch.testing.assert_close(ema.module.weight, module.weight)
    with torch.no_grad():
        module.weight.zero_()
    assert ema.module.weight.abs().sum() > 0
    assert not ema.module.weight.requires_grad and not ema.module.training


def test_float64_stays_float64():
    ema = EMA(nn.Linear(2, 2).double())
    ema.update(nn.Linear(2, 2).double())
    assert ema.module.weight.dtype == torch.float64

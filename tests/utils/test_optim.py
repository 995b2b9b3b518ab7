"""Groups, schedules and steps against their own definitions."""

import itertools
import math

import pytest
import torch
from torch import nn

from utils.optim import (
    OPTIMIZERS,
    SCHEDULES,
    Optim,
    build_optimizer,
    clip_gradients,
    guarded_step,
    parameter_groups,
    rates,
    set_rates,
    split_evenly,
)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.PReLU())


def test_groups_hold_every_parameter_once():
    module = network()
    module.extra = nn.Parameter(torch.ones(2, 2))
    groups = parameter_groups(module)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    assert set(groups["decayed"]) == {"0.weight", "2.weight"}
    assert set(groups["biases"]) == {"1.bias", "2.bias"}
    assert set(groups["others"]) == {"1.weight", "3.weight", "extra"}


def test_frozen_parameters_are_in_no_group():
    module = network()
    module[0].requires_grad_(False)
    assert "0.weight" not in parameter_groups(module)["decayed"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_start_at_one_and_never_rise(schedule):
    optim = Optim(schedule=schedule)
    values = [SCHEDULES[schedule](optim, i / 100) for i in range(101)]
    assert values[0] == 1.0
    assert all(late <= early for early, late in itertools.pairwise(values))
    if schedule in ("cosine", "linear"):
        assert values[-1] == pytest.approx(optim.lrf)


def test_step_schedule_drops_where_it_says():
    optim = Optim(schedule="step", steps=(0.5, 0.75), gamma=0.1)
    assert [SCHEDULES["step"](optim, share) for share in (0.49, 0.5, 0.75)] == pytest.approx([1, 0.1, 0.01])


def test_warmup_goes_from_its_start_to_the_schedule():
    optim = Optim(lr0=0.1, schedule="constant", warmup_epochs=2, warmup_bias_lr=0.5, warmup_momentum=0.5, momentum=0.9)
    first, last, after = (rates(optim, step, 10, 100) for step in (0, 19, 20))
    assert first == pytest.approx((0.1 / 20, 0.5 - 0.4 / 20, 0.5 + 0.4 / 20))
    assert last == after == pytest.approx((0.1, 0.1, 0.9))
    assert rates(Optim(warmup_epochs=0), 0, 10, 10).lr == pytest.approx(0.01)


def test_warmup_leaves_most_of_a_short_training():
    optim = Optim(schedule="constant", warmup_epochs=3, lr0=1.0)
    assert [rates(optim, step, 1, 3).lr for step in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_with_a_broken_gradient_moves_nothing(kind):
    module = network()
    optimizer = build_optimizer(module, Optim(optimizer=kind))
    for factor, moves in ((1.0, True), (math.nan, False), (math.inf, False), (1.0, True)):
        before = [parameter.detach().clone() for parameter in module.parameters()]
        optimizer.zero_grad()
        (module.eval()(torch.ones(1, 3, 5, 5)).square().sum() * factor).backward()
        guarded_step(optimizer, clip_gradients(list(module.parameters()), 10.0)[1])
        moved = any(not torch.equal(old, new) for old, new in zip(before, module.parameters()))
        assert moved == moves
        assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_first_step_that_is_left_out_leaves_no_trace(kind):
    """torch's fused SGD takes its moments' memory as it is, and fills it in a first step that here does not happen."""
    moved, start = [], network().state_dict()
    for factors in ((1.0,), (math.nan, 1.0)):
        module = network()
        module.load_state_dict(start)
        optimizer = build_optimizer(module, Optim(optimizer=kind))
        for factor in factors:
            junk = [torch.full((64,), 1e30) for _ in range(50)]  # what freed memory holds
            del junk
            optimizer.zero_grad()
            (module.eval()(torch.ones(1, 3, 5, 5)).square().sum() * factor).backward()
            guarded_step(optimizer, clip_gradients(list(module.parameters()), 10.0)[1])
        moved.append(module)
    for one, other in zip(*(module.parameters() for module in moved)):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_are_those_of_torch(kind):
    """Ours leave out what torch wraps around its methods for its compiler, and nothing else."""
    torch_kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    ours, theirs = network(), network()
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, Optim(optimizer=kind))
    options = {name: value for name, value in optimizer.defaults.items() if name != "decoupled_weight_decay"}
    groups = [
        {**group, "params": list(parameter_groups(theirs)[group["kind"]].values())} for group in optimizer.param_groups
    ]
    reference, steps = torch_kind(groups, **options), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for _ in range(3):
        for module, mover in ((ours, optimizer), (theirs, reference)):
            mover.zero_grad()
            module.eval()(torch.ones(1, 3, 5, 5)).square().sum().backward()
            mover.step()
    assert len(steps) == 3
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(mine, other) and mine.requires_grad and mine.grad_fn is None
    saved = [part.state_dict()["state"] for part in (optimizer, reference)]
    torch.testing.assert_close(*saved, rtol=0, atol=0)
    optimizer.load_state_dict(reference.state_dict())


def test_sgd_equals_the_formula():
    module = nn.Linear(1, 1)
    optimizer = build_optimizer(module, Optim(weight_decay=0.1, momentum=0.9))
    set_rates(optimizer, rates(Optim(lr0=0.1, schedule="constant", warmup_epochs=0, momentum=0.9), 0, 1, 1))
    weight, bias = module.weight.item(), module.bias.item()
    module(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    gradient = 1 + 0.1 * weight
    assert module.weight.item() == pytest.approx(weight - 0.1 * (gradient + 0.9 * gradient), rel=1e-5)  # Nesterov
    assert module.bias.item() == pytest.approx(bias - 0.1 * 1.9, rel=1e-5)  # not decayed


@pytest.mark.parametrize(("num_batches", "size"), [(13, 4), (1, 4), (8, 4), (7, 1), (3, 64), (100, 7)])
def test_groups_of_batches_cover_an_epoch_evenly(num_batches, size):
    groups = list(split_evenly(num_batches, size))
    assert [batch for group in groups for batch in group] == list(range(num_batches))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_out_of_range_hyper_parameters():
    with pytest.raises(ValueError, match=r"lr0 must be > 0.*momentum must be in 0..1"):
        Optim(lr0=-1, momentum=2)

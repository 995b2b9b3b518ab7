"""Laws of training: accumulated batches equal a large one, a resumed run an uninterrupted one, frozen stays frozen."""

import copy
import math

import pytest
import torch
from tiny import CFG, tiny_batch, tiny_step

from utils.checkpoint import read_checkpoint, write_checkpoint
from utils.errors import DivergenceError, UserError
from utils.ledger import describe
from utils.optim import Optim
from utils.run import PRECISIONS
from utils.trainer import Trainer

CPU = torch.device("cpu")
OPTIM = Optim(lr0=0.01, nominal_batch=4, warmup_epochs=1, warmup_bias_lr=0.02, ema_tau=10)


def trainer(step, *, num_batches, batch_size, optim=OPTIM, precision="float32", epochs=4) -> Trainer:
    return Trainer(
        step,
        optim=optim,
        device=CPU,
        precision=PRECISIONS[precision],
        num_batches=num_batches,
        batch_size=batch_size,
        epochs=epochs,
    )


def test_accumulated_batches_equal_one_large_batch():
    large = trainer(tiny_step(), num_batches=2, batch_size=4)
    small = trainer(tiny_step(), num_batches=4, batch_size=2)
    means = []
    for teacher, size in ((large, 4), (small, 2)):
        for _ in range(3):
            losses = teacher.train_epoch([tiny_batch(range(start, start + size)) for start in range(0, 8, size)])
            teacher.end_epoch()
        means.append(losses)
    assert large.step == small.step == 6
    assert means[0] == pytest.approx(means[1], rel=1e-5)
    for name, tensor in large.train_step.state_dict().items():
        torch.testing.assert_close(tensor, small.train_step.state_dict()[name], rtol=1e-5, atol=1e-6)


BATCHES = [tiny_batch([0, 1]), tiny_batch([2, 3]), tiny_batch([4, 5]), tiny_batch([6, 7])]


def run_epochs(teacher, stop=lambda: None):
    """Four epochs, from wherever ``teacher`` stands."""
    means = []
    while teacher.epoch < 4:
        means.append(teacher.train_epoch(BATCHES[teacher.batches_done :], between=stop))
        teacher.end_epoch()
    return means


@pytest.mark.parametrize("stop_step", range(1, 9))
def test_a_run_that_stops_after_any_step_ends_as_if_it_had_not(tmp_path, stop_step):
    straight = trainer(tiny_step(), num_batches=4, batch_size=2)
    means = run_epochs(straight)

    class EnoughError(Exception):
        pass

    def stop():
        if stopped.step == stop_step:
            stopped.look()
            write_checkpoint(tmp_path / "x.safetensors", stopped.tensors(), stopped.counters())
            raise EnoughError

    stopped = trainer(tiny_step(), num_batches=4, batch_size=2)
    with pytest.raises(EnoughError):
        run_epochs(stopped, stop)

    torch.manual_seed(99)
    step = tiny_step()
    for parameter in step.parameters():
        torch.nn.init.normal_(parameter)
    resumed = trainer(step, num_batches=4, batch_size=2)
    tensors, counters = read_checkpoint(tmp_path / "x.safetensors")
    resumed.restore(tensors, counters, "x")
    assert run_epochs(resumed) == means[-(4 - counters["epoch"]) :]
    assert resumed.counters() == straight.counters()
    ours, theirs = straight.tensors(), resumed.tensors()
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if name != "rng.cpu" and not torch.equal(ours[name], theirs[name])]
    assert not different


def fit(teacher, epochs) -> list[float]:
    """Box and class loss of four pictures over the epochs. (Objectness may rise: its target is the IoU.)"""
    losses = []
    for _ in range(epochs):
        losses.append(teacher.train_epoch([tiny_batch(range(4))]))
        teacher.end_epoch()
    return [loss["box"] + loss["cls"] for loss in losses]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_loss_of_four_pictures_falls(optimizer):
    lr = {"sgd": 0.02, "adam": 0.01, "adamw": 0.01}[optimizer]
    optim = Optim(optimizer=optimizer, lr0=lr, nominal_batch=4, warmup_epochs=2, warmup_bias_lr=lr)
    teacher = trainer(tiny_step(), num_batches=1, batch_size=4, optim=optim, epochs=80)
    losses = fit(teacher, 80)
    assert losses[-1] < 0.6 * losses[0]


def test_bfloat16_learns_too():
    teacher = trainer(tiny_step(), num_batches=1, batch_size=4, precision="bf16", epochs=60)
    losses = fit(teacher, 60)
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in teacher.train_step.parameters())


def test_frozen_layers_do_not_move_nor_measure():
    step = tiny_step(CFG.replace("filters=8\n", "filters=8\nbatch_normalize=1\n"))
    step.model.layers[0].requires_grad_(False)
    before = copy.deepcopy(step.state_dict())
    teacher = trainer(step, num_batches=1, batch_size=4)
    teacher.train_epoch([tiny_batch(range(4))])
    after = step.state_dict()
    frozen = [name for name in before if name.startswith("model.layers.0.")]
    assert len(frozen) >= 4 and all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["model.layers.1.conv.weight"], after["model.layers.1.conv.weight"])


class Poisoned(torch.nn.Module):
    """A step whose losses are multiplied by ``factor`` at some calls."""

    def __init__(self, step, calls, factor=math.nan):
        super().__init__()
        self.model, self.criterion, self.step = step.model, step.criterion, step
        self.number, self.calls, self.factor = 0, calls, factor

    def forward(self, images, targets):
        self.number += 1
        terms = self.step(images, targets)
        return {name: term * (self.factor if self.number in self.calls else 1) for name, term in terms.items()}


NORMED = CFG.replace("filters=8\n", "filters=8\nbatch_normalize=1\n")


def state(teacher) -> dict:
    return {name: tensor.clone() for name, tensor in teacher.tensors().items() if not name.startswith("rng.")}


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_leaves_no_trace(factor):
    """No weight, moment or batch norm sees it; the epoch's losses do not count it; it is reported once."""
    notes, states = [], []
    step = tiny_step(NORMED)
    teacher = trainer(Poisoned(step, {2, 3}, factor), num_batches=4, batch_size=4)
    teacher.report = notes.append
    losses = teacher.train_epoch([tiny_batch(range(4))] * 4, between=lambda: states.append(state(teacher)))
    assert [(note.epoch, note.step, note.batches) for note in notes] == [(0, 1, range(1, 2)), (0, 2, range(2, 3))]
    assert "loss 'box' is" in describe(notes[0]) and "gradient of model.layers." in describe(notes[0])
    kept = [name for name in states[0] if name.split(".")[0] in ("model", "criterion", "optim")]
    assert any("running_mean" in name for name in kept) and any("momentum" in name for name in kept)
    for later in states[1:3]:
        assert all(torch.equal(states[0][name], later[name]) for name in kept)
    assert not torch.equal(states[0]["model.layers.1.conv.weight"], states[3]["model.layers.1.conv.weight"])
    assert all(torch.isfinite(tensor).all() for tensor in states[3].values())
    assert all(math.isfinite(value) for value in losses.values())
    assert (teacher.skipped, teacher.counted, teacher.left_out) == (2, 2, 0)


def test_three_steps_in_a_row_end_the_epoch():
    step = tiny_step()
    teacher = trainer(Poisoned(step, {3, 4, 5}), num_batches=10, batch_size=4, optim=OPTIM)
    with pytest.raises(DivergenceError, match=r"epoch 0, step 4: 3 steps in a row were not finite: loss '\w+' is nan"):
        teacher.train_epoch([tiny_batch(range(4))] * 10)
    assert all(torch.isfinite(tensor).all() for tensor in step.state_dict().values())
    assert all(torch.isfinite(tensor).all() for tensor in teacher.ema.module.state_dict().values())


def test_two_and_two_are_not_three_in_a_row():
    teacher = trainer(Poisoned(tiny_step(), {2, 3, 5, 6}), num_batches=10, batch_size=4)
    teacher.train_epoch([tiny_batch(range(4))] * 10)
    assert (teacher.skipped, teacher.counted) == (4, 6)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    teacher = trainer(tiny_step(), num_batches=1, batch_size=4)
    other = trainer(tiny_step(CFG.replace("filters=16", "filters=12")), num_batches=1, batch_size=4)
    with pytest.raises(UserError, match="checkpoint of another network"):
        other.restore(teacher.tensors(), teacher.counters(), "x")

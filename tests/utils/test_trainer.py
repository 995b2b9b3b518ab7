"""Laws of training: accumulated batches equal a large one, a resumed run an uninterrupted one, frozen stays frozen."""

import copy
import math

import pytest
import torch
from tiny import CFG, tiny_batch, tiny_step

from utils.checkpoint import read_checkpoint, write_checkpoint
from utils.errors import DivergenceError, UserError
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
        means.append(losses)
    assert large.step == small.step == 6
    assert means[0] == pytest.approx(means[1], rel=1e-5)
    for name, tensor in large.train_step.state_dict().items():
        torch.testing.assert_close(tensor, small.train_step.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    batches = [tiny_batch([0, 1, 2]), tiny_batch([3, 4, 5]), tiny_batch([6, 7])]
    straight = trainer(tiny_step(), num_batches=3, batch_size=3)
    for epoch in range(4):
        straight.train_epoch(batches)
        if epoch == 1:
            write_checkpoint(tmp_path / "x.safetensors", straight.tensors(), straight.counters())

    torch.manual_seed(99)
    step = tiny_step()
    for parameter in step.parameters():
        torch.nn.init.normal_(parameter)
    resumed = trainer(step, num_batches=3, batch_size=3)
    tensors, counters = read_checkpoint(tmp_path / "x.safetensors")
    resumed.restore(tensors, counters, "x")
    for _ in range(2):
        resumed.train_epoch(batches)
    assert resumed.counters() == straight.counters()
    ours, theirs = straight.tensors(), resumed.tensors()
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if name != "rng.cpu" and not torch.equal(ours[name], theirs[name])]
    assert not different


def fit(teacher, epochs) -> list[float]:
    """Box and class loss of four pictures over the epochs. (Objectness may rise: its target is the IoU.)"""
    losses = [teacher.train_epoch([tiny_batch(range(4))]) for _ in range(epochs)]
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
    """A step whose loss is not a number from the third call on."""

    def __init__(self, step):
        super().__init__()
        self.model, self.criterion, self.step, self.calls = step.model, step.criterion, step, 0

    def forward(self, images, targets):
        self.calls += 1
        terms = self.step(images, targets)
        return {name: term * (math.nan if self.calls > 2 else 1) for name, term in terms.items()}


def test_a_loss_that_is_no_number_stops_the_run_and_touches_no_weight():
    step = tiny_step()
    teacher = trainer(Poisoned(step), num_batches=4, batch_size=4)
    with pytest.raises(DivergenceError, match=r"epoch 0, step 4: loss '\w+' is nan"):
        teacher.train_epoch([tiny_batch(range(4))] * 4)
    assert all(torch.isfinite(tensor).all() for tensor in step.state_dict().values())
    assert all(torch.isfinite(tensor).all() for tensor in teacher.ema.module.state_dict().values())


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    teacher = trainer(tiny_step(), num_batches=1, batch_size=4)
    other = trainer(tiny_step(CFG.replace("filters=16", "filters=12")), num_batches=1, batch_size=4)
    with pytest.raises(UserError, match="checkpoint of another network"):
        other.restore(teacher.tensors(), teacher.counters(), "x")

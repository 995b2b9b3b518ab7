"""Numbers that are not finite: no weight sees them, the step is named and kept, then a way back, then exit 4."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import CFG, tiny_batch, tiny_step

from utils.checkpoint import read_checkpoint
from utils.ema import EMA
from utils.errors import DivergenceError
from utils.failpoints import VARIABLE
from utils.optim import Optim
from utils.run import Precision
from utils.trainer import Trainer

CPU = torch.device("cpu")


def teacher(step, *, num_batches=10, precision=None, **options) -> Trainer:
    precision = precision or Precision("float32", torch.float32, False)
    optim = Optim(lr0=0.01, nominal_batch=4, warmup_epochs=0, **options)
    return Trainer(step, optim=optim, device=CPU, precision=precision, num_batches=num_batches, batch_size=4, epochs=4)


def all_finite(run) -> bool:
    files = list((run / "weights").glob("*.safetensors"))
    return all(
        tensor.isfinite().all()
        for file in files
        for tensor in read_checkpoint(file)[0].values()
        if tensor.is_floating_point()
    )


def test_t17_one_bad_step_is_left_out_and_told(runs, seen):
    run = runs.new()
    ended = runs.begin(run, env={VARIABLE: "step:5:nan"})
    assert ended.code == 0 and all_finite(run)
    line = next(line for line in ended.out.splitlines() if "is left out" in line)
    assert line.startswith("warning: epoch 1, step 4 is left out: loss 'box' is nan")
    assert "gradient of model.layers.2" in line  # the last layer: it began in the loss
    facts = json.loads((run / "bad_batch.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert facts["norm"] is None and facts["terms"]["box"] is None
    assert (facts["epoch"], facts["step"], facts["batches"], facts["finite"]) == (1, 4, [1], False)
    assert len(facts["pictures"]) == 2 and all(path.endswith(".png") for path in facts["pictures"])
    assert all(path.rpartition("/")[2] in ended.out for path in facts["pictures"])
    with np.load(run / "bad_batch.npz", allow_pickle=False) as arrays:
        assert arrays["1.images"].shape == (2, 3, 64, 64) and arrays["1.boxes"].shape[1] == 4
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["steps/skipped"] for row in rows] == [0, 1, 0]
    assert all(math.isfinite(value) for row in rows for name, value in row.items() if name.startswith("train/"))
    seen(line)


def test_t17_the_batch_that_is_saved_is_the_one_that_was_seen(runs):
    """It is made again from its draws: pixel by pixel what the step looked at, also when the run continued."""
    run = runs.new()
    assert runs.begin(run, env={VARIABLE: "step:5:nan"}).code == 0
    other = runs.new()
    assert runs.begin(other, env={VARIABLE: "step:4:SIGTERM"}).code == 75
    assert runs.resume(other, "--workers", "1", env={VARIABLE: "step:5:nan"}).code == 0
    with np.load(run / "bad_batch.npz") as one, np.load(other / "bad_batch.npz") as two:
        assert one.files == two.files and all(np.array_equal(one[name], two[name]) for name in one.files)


def test_t17_three_in_a_row_go_back_once(runs, seen):
    run = runs.new()
    ended = runs.begin(run, "--epochs", "4", env={VARIABLE: "step:7:nan,step:8:nan,step:9:nan"})
    # the epoch is taken again from its checkpoint, and is as bad: the plan goes by the number of the step
    assert ended.code == 4 and ended.error_line().startswith("error: epoch 2, step 8: 3 steps in a row were not finite")
    assert ended.out.count("back to step 6") == 1 and "learning rate halved" in ended.out
    assert read_checkpoint(run / "weights" / "last.safetensors")[1]["step"] == 6 and all_finite(run)
    seen(ended.error_line())


def nan_until_back() -> None:
    """Losses that are no numbers at steps 7 to 9, but for a smaller learning rate: what a way back is for."""
    from utils import trainer

    forward = trainer.Trainer._forward

    def disturbed(self, batch):
        bad = self.step in (6, 7, 8) and self.lr_factor == 1
        return {name: term * (math.nan if bad else 1) for name, term in forward(self, batch).items()}

    trainer.Trainer._forward = disturbed


def test_t17_back_and_on(runs, seen):
    run = runs.new()
    ended = runs.begin(run, before=nan_until_back)
    assert ended.code == 0 and ended.out.count("learning rate halved") == 1 and all_finite(run)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2] and read_checkpoint(run / "weights/last.safetensors")[1][
        "lr_factor"
    ] == 0.5
    seen("back once to the checkpoint, learning rate halved, then on")


@pytest.mark.parametrize("plan", ["step:1+:nan", "step:2+:nan"], ids=["T17-from-the-first", "T17-from-the-second"])
def test_without_a_checkpoint_there_is_no_way_back(plan, runs):
    run = runs.new()
    ended = runs.begin(run, "--epochs", "5", env={VARIABLE: plan})
    assert ended.code == 4 and all_finite(run)


def test_t17_an_absurd_learning_rate(runs, seen):
    run = runs.new()
    ended = runs.begin(run, "--set", "lr0=1e20", "--set", "warmup_epochs=0", "--epochs", "8")
    assert ended.code == 4 and "steps in a row were not finite" in ended.error_line(), (ended.out, ended.err)
    assert all_finite(run) and "metrics/mAP50" not in ended.err
    seen(f"lr 1e20: exit {ended.code}")


class Spiked(torch.nn.Module):
    """Losses a thousand times as large at one call."""

    def __init__(self, step, call):
        super().__init__()
        self.model, self.criterion, self.step, self.call, self.calls = step.model, step.criterion, step, call, 0

    def forward(self, images, targets):
        self.calls += 1
        return {
            name: term * (1000 if self.calls == self.call else 1) for name, term in self.step(images, targets).items()
        }


def test_t18_a_spike_is_clipped_and_counted(seen):
    calm, spiked = teacher(tiny_step(), clip_norm=10.0), teacher(Spiked(tiny_step(), 5), clip_norm=10.0)
    for trainer in (calm, spiked):
        trainer.train_epoch([tiny_batch(range(4))] * 10)
    assert spiked.clipped == calm.clipped + 1 and spiked.skipped == 0
    moved = [(one - two).norm() for one, two in zip(calm.train_step.parameters(), spiked.train_step.model.parameters())]
    assert sum(moved) < 0.01 * 10.0 * 12  # lr * clip_norm, through Nesterov's momentum
    seen("clipped to clip_norm, counted in steps/clipped")


HALF = Precision("fp16", torch.float32, True)  # the scaler of float16, arithmetic of the CPU


def test_t19_a_scale_that_falls_without_end(seen):
    """Gradients that overflow whatever the scale: the scale halves each time, and the run ends before it is 0."""

    class Overflowing(Spiked):
        def forward(self, images, targets):
            return {name: Overflow.apply(term) for name, term in self.step(images, targets).items()}

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    trainer = teacher(Overflowing(tiny_step(), 0), precision=HALF, num_batches=60)
    with pytest.raises(DivergenceError, match="float16 gradients overflow even with a scale of") as caught:
        trainer.train_epoch([tiny_batch(range(4))] * 60)
    assert 17 + 10 <= trainer.step <= 17 + 20 + 10  # 2**16 falls below 1 in 17 steps; looked at every ten
    assert caught.value.exit_code == 4 and 0 < trainer.scaler.get_scale() < 1
    seen(str(caught.value))


def test_t19_overflow_now_and_then_is_no_divergence():
    trainer = teacher(tiny_step(), precision=HALF)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, enabled=True)
    trainer.train_epoch([tiny_batch(range(4))] * 10)
    assert trainer.skipped > 0 and trainer.left_out == 0 and trainer.counted == 10 - trainer.skipped


def test_t19_the_scale_is_in_the_checkpoint():
    one, other = teacher(tiny_step(), precision=HALF), teacher(tiny_step(), precision=HALF)
    one.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=True)
    one.train_epoch([tiny_batch(range(4))] * 10)
    other.restore(one.tensors(), one.counters(), "x")
    assert other.scaler.get_scale() == 8.0


def test_t20_the_average_never_sees_a_bad_value(seen):
    step = tiny_step(CFG.replace("filters=8\n", "filters=8\nbatch_normalize=1\n"))
    trainer = teacher(step)
    batches = [tiny_batch(range(4))] * 10
    batches[4] = replace(batches[4], images=torch.full((4, 3, 64, 64), math.nan))
    trainer.train_epoch(batches)
    assert trainer.skipped == 1
    assert all(tensor.isfinite().all() for tensor in trainer.ema.module.state_dict().values())
    assert all(tensor.isfinite().all() for tensor in step.state_dict().values())  # its batch norm has seen the picture
    seen("finite; batch norms, too")


@pytest.mark.parametrize("updates", [1, 7, 50])
def test_property_12_the_average_in_closed_form(updates):
    """average_n = sum_i x_i (1 - d_i) prod_{k > i} d_k + x_0 prod_k d_k."""
    module = torch.nn.Linear(3, 2).double()
    average, draw = EMA(module, decay=0.9, tau=5.0), torch.Generator().manual_seed(updates)
    values, decays = [module.weight.detach().clone()], [average.decay_at(n + 1) for n in range(updates)]
    for _ in range(updates):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3, generator=draw, dtype=torch.float64))
        values.append(module.weight.detach().clone())
        average.update(module)
    expected = values[0] * math.prod(decays)
    for number, value in enumerate(values[1:]):
        expected = expected + value * (1 - decays[number]) * math.prod(decays[number + 1 :])
    torch.testing.assert_close(average.module.weight, expected, rtol=1e-12, atol=1e-12)

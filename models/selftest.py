"""``train.py --selftest``: why is my mAP zero? All questions, and what the answers come to."""

from collections.abc import Callable, Sequence

from models.learn_by_heart import Story, learn_by_heart
from models.losses import TrainStep
from models.selftest_checks import (
    BAD,
    UNSURE,
    Check,
    check_ceiling,
    check_classes,
    check_gradient,
    check_sizes,
    check_story,
    check_way,
)
from utils.datasets.dataset import DetectionDataset
from utils.datasets.loader import Draw, collate
from utils.datasets.splits import Splits
from utils.datasets.workers import Loader
from utils.errors import UserError
from utils.structures import Batch, Record

MEASURED = 200  # validation pictures that are looked at
LEARNED = 4  # training pictures that must be learned by heart
HEART_SECONDS = 60.0  # for that


def examine(
    step: TrainStep,
    data: Splits,
    val: Loader,
    size: tuple[int, int],
    *,
    say: Callable[[Check], None],
    seconds: float | None = None,
) -> tuple[list[Check], Story | None]:
    """All questions, in the order in which an answer makes the next one worth asking.

    Args:
        step: on its device. It is left as it was, but for what batch norms measure.
        val: of ``data``.
        say: is told each answer as soon as it is there.
        seconds: to learn a few pictures by heart.
    """
    checks, story = [], None

    def note(check: Check) -> None:
        checks.append(check)
        say(check)

    note(check_classes(data.names, data.train, data.val))
    if checks[-1].state == BAD:
        return checks, story
    plain = DetectionDataset(data.train, channels=step.model.channels, stretch=val.dataset.stretch, limits=data.limits)
    learned = plain_batches(plain, [[Draw(0, row, row, size) for row in busiest(data.train)]])[0]
    measured = plain_batches(val.dataset, first_draws(val.batch_sampler.batches))
    note(check_sizes(data.train, size))
    note(check_way(measured, data.val, data.names))
    note(check_ceiling(step, measured, data.val, data.names))
    note(check_gradient(step, learned))
    if checks[-1].state != BAD:
        story = learn_by_heart(step, learned, data.names, seconds=HEART_SECONDS if seconds is None else seconds)
        note(check_story(story))
    return checks, story


def verdict(checks: Sequence[Check]) -> str:
    """What all answers come to, in words."""
    bad, unsure = ([check for check in checks if check.state == state] for state in (BAD, UNSURE))
    if bad:
        return f"This is why mAP stays low: {bad[0].answer}." + (f" {_sentence(bad[0].cure)}" if bad[0].cure else "")
    if unsure:
        return "Nothing here keeps mAP at zero, but look at this: " + "; ".join(check.answer for check in unsure) + "."
    return (
        "Nothing here keeps mAP at zero: labels, network, loss and evaluation fit together. If a training still "
        "scores nothing, give it more epochs, start from --weights, and compare lr0 with the recipe's."
    )


def refuse(checks: Sequence[Check], where: object) -> None:
    """Raises UserError with the first thing that keeps mAP low, if there is one."""
    for check in checks:
        if check.state == BAD:
            raise UserError(where, check.answer, check.cure)


def plain_batches(dataset, draws: Sequence[Sequence[Draw]]) -> list[Batch]:
    """Batches of a data set made here and now; pictures that cannot be read are left out."""
    made = ([sample for draw in batch if (sample := dataset[draw]) is not None] for batch in draws)
    return [collate(samples) for samples in made if samples]


def first_draws(draws: Sequence[Sequence[Draw]], num: int = MEASURED) -> list[list[Draw]]:
    """The first batches of about ``num`` pictures."""
    chosen, count = [], 0
    for batch in draws:
        if count >= num:
            break
        chosen.append(batch[: num - count])
        count += len(chosen[-1])
    return chosen


def busiest(records: Sequence[Record], num: int = LEARNED) -> list[int]:
    """Positions of pictures to learn by heart: those with objects, of as many classes as possible, not crowded."""
    chosen, seen = [], set()
    some = [row for row, record in enumerate(records) if 0 < (~record.ignore).sum() <= 20]
    some = some or [row for row, record in enumerate(records) if (~record.ignore).any()]
    while some and len(chosen) < num:
        row = max(some, key=lambda row: len(set(records[row].labels[~records[row].ignore].tolist()) - seen))
        some.remove(row)
        chosen.append(row)
        seen |= set(records[row].labels.tolist())
    return chosen


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith("?") else ".")

"""Which epoch was the best, and whether waiting for a better one is worth it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

WEIGHTS = {"metrics/mAP50": 0.1, "metrics/mAP50-95": 0.9}  # as in YOLOv5; mAP50 alone saturates early


def fitness(scalars: Mapping[str, float]) -> float:
    """0.1 mAP50 + 0.9 mAP50-95; nan where there is nothing to measure."""
    return sum(weight * scalars[name] for name, weight in WEIGHTS.items())


@dataclass
class Best:
    """The best epoch so far. A value that is not a number is never best; of equals the first one stays."""

    fitness: float = float("-inf")
    epoch: int = -1

    def update(self, fitness: float, epoch: int) -> bool:
        """Whether ``fitness`` is a new best."""
        if not fitness > self.fitness:
            return False
        self.fitness, self.epoch = fitness, epoch
        return True

    def is_stale(self, epoch: int, patience: int) -> bool:
        """Whether the best was ``patience`` epochs ago or more; never with patience 0."""
        return 0 < patience <= epoch - self.epoch

    def ends(self, done: int, epochs: int, patience: int) -> bool:
        """Whether a training is over after ``done`` epochs of ``epochs``."""
        return done >= epochs or self.is_stale(done - 1, patience)

    def restore(self, values: Mapping[str, float]) -> None:
        """The inverse of ``as_dict``."""
        self.fitness, self.epoch = values["fitness"], values["epoch"]

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

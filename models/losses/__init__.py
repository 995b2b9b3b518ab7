"""How wrong is it: one file per loss, one row in ``LOSSES``."""

from models.losses.criterion import LOSSES, Criterion, TrainStep, build_criterion, compute_loss

__all__ = ["LOSSES", "Criterion", "TrainStep", "build_criterion", "compute_loss"]

"""What was asked for, and what every export is.

Letters: B pictures, C H W of the input, P slots of all heads, N classes, K detections per picture.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from models.darknet import Darknet
from models.structures import Predictions
from utils.errors import UserError

INPUT, OUTPUTS, DETECTIONS = "images", ("boxes", "scores"), ("boxes", "scores", "labels")


@dataclass(frozen=True, kw_only=True)
class Suppression:
    """Non-maximum suppression inside the file: thresholds as in `postprocess`, overlap is plain IoU."""

    conf_thres: float
    iou_thres: float
    max_det: int


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One export: of which network, how, and the words for what it cannot do."""

    model: Darknet  # float32, on the CPU, in eval mode
    weights: Path  # the file it came from
    names: list[str]
    size: tuple[int, int]  # H, W
    batch_size: int = 1
    dynamic: bool = False  # any number of pictures, any size that the stride divides
    half: bool = False  # weights and arithmetic of the convolutions; input and outputs stay float32
    nms: Suppression | None = None


class Export:
    """A network in another format, in memory until it has been measured: ``SomeExport(wish)``.

    Attributes:
        offers: the fields of `Wish` that the format can fulfil.
        runtime: what computes ``raw`` and ``detect``, with its version.
    """

    offers = frozenset()
    runtime = f"torch {torch.__version__}"

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the format says of float32 images [B, C, H, W] in 0..1: boxes [B, P, 4], scores [B, P, N]."""
        raise NotImplementedError

    def detect(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With ``nms``: boxes [B, K, 4], scores [B, K], labels [B, K]; a row of score 0 is none."""
        raise NotImplementedError

    def files(self, meta: str) -> dict[str, bytes]:
        """Suffix -> content, with the JSON text ``meta`` inside; the first one is the file that a user names."""
        raise NotImplementedError

    def elsewhere(self, images: Tensor) -> tuple[str, Callable]:
        """Another program that may read the file, and its ``raw``; nothing where there is none."""
        return "", self.raw


def scores_of(preds: Predictions) -> Tensor:
    """The scores [B, P, N] that every head's outputs mean (`Predictions`)."""
    factor = preds.obj.sigmoid() if preds.quality is None else preds.obj.sigmoid() * preds.quality
    return preds.cls.sigmoid() * factor[..., None]


def boxes_and_scores(model: Darknet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [B, P, 4] and scores [B, P, N] of a network as it is; of a classifier no boxes and one row of scores."""
    if not model.heads:
        return images.new_zeros(len(images), 0, 4), model(images)[0].flatten(1)[:, None]
    preds = model.predict(images)
    return preds.boxes, scores_of(preds)


def needed(package: str, wanted_by: str, install: str) -> ModuleType:
    """An optional package. Errors: UserError with the line that installs it; nothing is installed from here."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(wanted_by, f"needs the package {package}: {error}", f"pip install {install}") from error

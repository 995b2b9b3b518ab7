"""What the keys of a ``[yolo]`` section say about training: read in one place, for assigner and loss. No torch."""

import math
from dataclasses import dataclass

from models.section import Section


@dataclass(frozen=True, kw_only=True)
class YoloKeys:
    """Darknet's defaults; how each is used is said in ``assigners.best_anchor`` and ``losses.darknet``.

    A ``[region]`` section has only ``thresh``, which is its ``ignore_thresh``.
    """

    ignore_thresh: float = 0.5
    truth_thresh: float = 1.0  # 1: off
    iou_thresh: float = 1.0  # 1: off
    iou_thresh_kind: str = "iou"
    iou_loss: str = "mse"
    iou_normalizer: float = 0.75
    obj_normalizer: float = 1.0
    cls_normalizer: float = 1.0
    delta_normalizer: float = 1.0
    max_delta: float = math.inf
    objectness_smooth: bool = False
    label_smooth_eps: float = 0.0
    focal_loss: bool = False
    new_coords: bool = False
    multipliers: tuple[float, ...] | None = None  # of the classes, from counters_per_class

    @classmethod
    def read(cls, section: Section) -> "YoloKeys":
        """Errors: CfgError at the line of a value that is none, or of counters that are not one per class."""
        floats = "truth_thresh iou_thresh iou_normalizer obj_normalizer cls_normalizer delta_normalizer max_delta"
        values = {key: section.float(key, getattr(cls, key)) for key in (*floats.split(), "label_smooth_eps")}
        return cls(
            ignore_thresh=section.float("ignore_thresh", section.float("thresh", cls.ignore_thresh)),
            iou_thresh_kind=section.str("iou_thresh_kind", "iou", choices=("iou", "giou", "diou", "ciou")),
            iou_loss=section.str("iou_loss", "mse", choices=("mse", "iou", "giou", "diou", "ciou")),
            objectness_smooth=section.flag("objectness_smooth"),
            focal_loss=section.flag("focal_loss"),
            new_coords=section.flag("new_coords"),
            multipliers=_multipliers(section, values["max_delta"]),
            **values,
        )


def _multipliers(section: Section, max_delta: float) -> tuple[float, ...] | None:
    """How much rarer than the most frequent class each class is, at most ``max_delta``."""
    counters = section.floats("counters_per_class", None)
    if counters is None:
        return None
    num_classes = section.int("classes")
    if len(counters) != num_classes or min(counters) <= 0:
        message = f"counters_per_class has {len(counters)} values, expected {num_classes} above 0"
        raise section.error(message, "counters_per_class", "count the objects of each class, or remove the key")
    return tuple(min(max(counters) / counter, max_delta) for counter in counters)

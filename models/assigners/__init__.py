"""Who answers for whom: one file per rule, one row here."""

from models.assigners.atss import Atss
from models.assigners.base import Assigner, build_targets
from models.assigners.best_anchor import BestAnchor
from models.assigners.center_sampling import CenterSampling
from models.assigners.inside_box import InsideBox
from models.assigners.ratio import Ratio
from models.assigners.rpn import RPN
from models.assigners.simota import SimOTA
from models.assigners.task_aligned import TaskAligned
from models.assigners.wh_iou import WhIoU

ASSIGNERS: dict[str, type[Assigner]] = {
    "wh_iou": WhIoU,
    "simota": SimOTA,
    "rpn": RPN,
    "ratio": Ratio,
    "best_anchor": BestAnchor,
    "inside_box": InsideBox,
    "atss": Atss,
    "task_aligned": TaskAligned,
    "center_sampling": CenterSampling,
}

__all__ = ["ASSIGNERS", "Assigner", "build_targets"]

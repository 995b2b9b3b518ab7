"""Who answers for whom: one file per rule, one row here."""

from models.assigners.base import Assigner, build_targets
from models.assigners.ratio import Ratio
from models.assigners.rpn import RPN
from models.assigners.simota import SimOTA
from models.assigners.wh_iou import WhIoU

ASSIGNERS: dict[str, type[Assigner]] = {"wh_iou": WhIoU, "simota": SimOTA, "rpn": RPN, "ratio": Ratio}

__all__ = ["ASSIGNERS", "Assigner", "build_targets"]

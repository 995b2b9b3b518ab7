"""How good detections are: COCO, VOC and Darknet average precision, curves over confidence, confusion."""

from utils.metrics.coco import AREA_RANGES, IOU_THRESHOLDS, RECALL_POINTS
from utils.metrics.detection_metrics import DetectionMetrics
from utils.metrics.evaluation import Evaluation
from utils.metrics.ranked import RANK_RULES

PROTOCOLS = ("coco", *RANK_RULES)
__all__ = [
    "AREA_RANGES",
    "IOU_THRESHOLDS",
    "PROTOCOLS",
    "RANK_RULES",
    "RECALL_POINTS",
    "DetectionMetrics",
    "Evaluation",
]

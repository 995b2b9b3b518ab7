"""What a cfg holds that Darknet, and OpenCV's reader of its files, do not know. Imports no torch."""

from models.cfg import Cfg
from models.section import Problem

SECTIONS = {  # type -> what it is
    "yolox": "the head of YOLOX",
    "fcos": "the head of FCOS and AutoAssign",
    "rpn": "a region proposal head",
    "roi": "a second stage",
    "mask": "a mask head",
}
KEYS = {"group_normalize": "group normalisation"}


def foreign_to_darknet(cfg: Cfg) -> list[Problem]:
    """One problem per section that Darknet would refuse or pass over, in the order of the file."""
    problems = []
    for section in cfg.layers:
        if section.type in SECTIONS:
            problems.append(section.problem(f"Darknet cannot read [{section.type}], {SECTIONS[section.type]}"))
        problems += [
            section.problem(f"Darknet does not know {key}, {what}", key)
            for key, what in KEYS.items()
            if section.int(key, 0)
        ]
    return problems

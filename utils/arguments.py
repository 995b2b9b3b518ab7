"""Flags that several scripts share, and types that refuse a wrong value at once. No heavy import: --help is quick."""

import argparse

from utils.datasets.limits import LIMITS
from utils.errors import UserError, nearest


def whole(text: str, least: int = 0) -> int:
    """A whole number from 0."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least}, found {text!r}")
    return int(text)


def count(text: str) -> int:
    """A whole number from 1."""
    return whole(text, least=1)


def minutes(text: str) -> float:
    """A time of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected minutes, 0 or more, found {text!r}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


def add_network(parser: argparse.ArgumentParser, *, precision: str) -> argparse._ArgumentGroup:
    """Which network, and how it computes: ``precision`` by default."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--weights",
        required=True,
        nargs="+",
        metavar="FILE",
        help="checkpoint (.safetensors), .weights or .pt; several are an ensemble (needs: pip install ensemble-boxes)",
    )
    group.add_argument(
        "--cfg", nargs="+", metavar="FILE", help="the network, one for each or for all; a checkpoint knows its own"
    )
    group.add_argument(
        "--augment",
        action="store_true",
        help="look at each picture mirrored, smaller and larger, too (needs: pip install ensemble-boxes)",
    )
    group.add_argument("--device", default="", help="cpu, 0, ... (default: the first GPU, else the CPU)")
    group.add_argument(
        "--precision",
        default=precision,
        choices=["auto", "float32", "bf16", "fp16"],
        help=f"auto: bf16 where the processor has it; float32: exact (default: {precision})",
    )
    group.add_argument("--half", dest="precision", action="store_const", const="fp16", help="same as --precision fp16")
    return group


def add_resize(group: argparse._ArgumentGroup) -> None:
    """How pictures become the network's input."""
    group.add_argument(
        "--img-size",
        "--imgsz",
        "--img",
        type=count,
        nargs="+",
        metavar="N",
        help="input height [width] (default: the cfg's)",
    )
    group.add_argument(
        "--resize", choices=["letterbox", "stretch"], help="how a picture is fitted (default: letter_box of the cfg)"
    )


def add_limits(group: argparse._ArgumentGroup) -> None:
    """Which pictures are taken."""
    group.add_argument(
        "--max-pixels",
        type=count,
        default=LIMITS.max_pixels,
        metavar="N",
        help=f"larger pictures are set aside (default: {LIMITS.max_pixels})",
    )
    group.add_argument(
        "--allow-truncated", action="store_true", help="take JPEGs that are cut off; what is missing becomes grey"
    )


def add_bad_data(parser: argparse.ArgumentParser, more: str = "") -> argparse._ArgumentGroup:
    """What may be wrong with the data; ``more`` says what else a script is strict about."""
    group = parser.add_argument_group("what may be wrong with the data")
    group.add_argument(
        "--max-bad",
        type=fraction,
        default=LIMITS.max_bad,
        metavar="SHARE",
        help=f"of pictures or rows that may be set aside (default: {LIMITS.max_bad})",
    )
    group.add_argument(
        "--strict",
        dest="max_bad",
        action="store_const",
        const=0.0,
        help="same as --max-bad 0: nothing may be set aside" + more,
    )
    add_limits(group)
    return group


def add_thresholds(parser: argparse.ArgumentParser, *, conf_thres: float, iou_thres: float) -> argparse._ArgumentGroup:
    """What counts as found."""
    group = parser.add_argument_group("what counts as found")
    group.add_argument("--conf-thres", type=fraction, default=conf_thres, help=f"least score (default: {conf_thres})")
    group.add_argument(
        "--iou-thres",
        type=fraction,
        default=iou_thres,
        help=f"overlap above which the lower score is suppressed (default: {iou_thres})",
    )
    group.add_argument("--max-det", type=count, default=300, metavar="N", help="per picture (default: 300)")
    group.add_argument("--agnostic-nms", action="store_true", help="suppress across classes")
    return group


def add_output(parser: argparse.ArgumentParser, project: str) -> argparse._ArgumentGroup:
    """Where results go, and the label files every script can write."""
    group = parser.add_argument_group("what is written")
    group.add_argument("--project", default=project, metavar="DIR", help=f"default: {project}")
    group.add_argument("--name", default="exp", help="folder below --project; exp2, exp3, ... if taken")
    group.add_argument(
        "--exist-ok", action="store_true", help="write into an existing folder (nothing in it is deleted)"
    )
    group.add_argument("--save-txt", action="store_true", help="labels/*.txt: class cx cy w h")
    group.add_argument("--save-conf", action="store_true", help="label files with the score as sixth column")
    return group


def class_numbers(wanted: list[str] | None, names: list[str]) -> list[int] | None:
    """The numbers of classes given by name or number; a name counts first."""
    if wanted is None:
        return None
    numbers = {str(number): number for number in range(len(names))} | {name: n for n, name in enumerate(names)}
    for text in wanted:
        if text not in numbers:
            hint = f"numbers go to {len(names) - 1}" if text.isdecimal() else nearest(text, names)
            raise UserError("--classes", f"no class '{text}'", hint)
    return [numbers[text] for text in wanted]

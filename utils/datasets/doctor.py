"""What is wrong with a data set, before a network learns it: a report, and a page with pictures.

python -m utils.datasets.doctor data.yaml
python -m utils.datasets.doctor data.yaml --img-size 640 --fix     # and a repaired copy of the labels
python -m models.doctor data.yaml --weights best.safetensors       # and where a trained network disagrees
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.arguments import add_limits, count
from utils.datasets.box_checks import class_balance, class_counts, doubled, odd_sizes, unlabelled
from utils.datasets.doctor_page import page
from utils.datasets.findings import ERROR, SEVERITIES, Exam, Finding
from utils.datasets.formats.description import known_splits
from utils.datasets.limits import Limits
from utils.datasets.lookalikes import look_at_all
from utils.datasets.picture_checks import alike, other_suffix, reader_problems, turned, unreadable
from utils.datasets.records import DataSet, read_dataset
from utils.datasets.repair import CHANGES, COPY, repair
from utils.errors import QuarantineError, UserError, printable, run_main
from utils.files import write_text
from utils.metrics.evaluation import align
from utils.run import new_run

CHECKS = (reader_problems, unreadable, other_suffix, turned, alike, doubled, odd_sizes, unlabelled, class_balance)
SHOWN = 3  # places of a finding in the terminal
MAX_CLASSES = 30  # in the terminal; the page lists all
Check = Callable[[Exam], Sequence[Finding]]


def read_splits(source: str, limits: Limits) -> tuple[list[DataSet], list[Finding]]:
    """Every split that can be read, a finding for each other one. Raises UserError where there is no data set."""
    sets, findings = [], []
    for split in known_splits(source):
        try:
            sets.append(read_dataset(source, split, limits=limits))
        except UserError as error:
            findings.append(Finding(severity=ERROR, title=f"{split} cannot be read: {error}"))
    return sets, findings


def examine(exam: Exam, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """What all checks find, the worst first."""
    findings = [finding for check in checks for finding in check(exam)]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def overview(sets: Sequence[DataSet]) -> str:
    """A column per split: pictures, backgrounds, boxes, boxes of every class."""
    rows: list[list[str]] = [["", *(data.split for data in sets)]]
    rows.append(["pictures", *(str(len(data.records)) for data in sets)])
    rows.append(["  without a box", *(str(sum(not len(record.labels) for record in data.records)) for data in sets)])
    rows.append(["  without an annotation file", *(str(data.num_unlabelled) for data in sets)])
    rows.append(["boxes", *(str(data.num_boxes) for data in sets)])
    counts = [class_counts(data) for data in sets]
    if len({data.names for data in sets}) == 1 and len(sets[0].names) <= MAX_CLASSES:
        rows += [[f"  {name}", *(str(each[label]) for each in counts)] for label, name in enumerate(sets[0].names)]
    return "\n".join(align(rows))


def report(findings: Sequence[Finding]) -> str:
    """Each finding with its first places and what to do."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.severity:8}{f'{len(finding.places)} x ' * bool(finding.places)}{finding.title}")
        lines += [printable(f"          {place.where}: {place.text}") for place in finding.places[:SHOWN]]
        lines += ["          ..."] * (len(finding.places) > SHOWN)
        lines += [f"          -> {finding.advice}"] * bool(finding.advice)
    return "\n".join(lines) or "nothing found"


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The flags of the doctor, with a network or without."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("data", metavar="DATA", help="data .yaml, Darknet .data, COCO .json or VOC folder")
    parser.add_argument("--fix", action="store_true", help="write a repaired copy of the labels, and what was changed")
    parser.add_argument("--project", default="runs/doctor", metavar="DIR", help="default: runs/doctor")
    parser.add_argument("--name", default="exp", help="folder below --project; exp2, exp3, ... if taken")
    parser.add_argument("--exist-ok", action="store_true", help="write into an existing folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_limits(parser)
    return parser


def run(args: argparse.Namespace, size: tuple[int, int], checks: Sequence[Check] = CHECKS) -> Path:
    """Examine, report, write the page and, where asked for, the repaired copy; the run's folder.

    Args:
        size: (H, W) of the network's input.

    Raises:
        UserError: no data set.
        QuarantineError: something was found that stops a training or makes its numbers lies.
    """
    limits = Limits.of(args)
    sets, unread = read_splits(args.data, limits)
    paths = sorted({record.path for data in sets for record in data.records})
    exam = Exam(sets=tuple(sets), looks=look_at_all(paths, limits), size=size)
    findings = unread + (examine(exam, checks) if sets else [])
    print(f"{args.data}, looked at for an input of {size[1]}x{size[0]}\n{overview(sets)}\n{report(findings)}")
    folder = new_run(args.project, args.name, exist_ok=args.exist_ok)
    write_text(folder / "report.html", page(args.data, exam, findings))
    print(f"Page: {folder / 'report.html'}")
    if args.fix:
        changes = repair(args.data, sets, folder)
        print(f"{len(changes)} rows repaired: {folder / COPY}, each listed in {folder / CHANGES}")
    worst = [finding for finding in findings if finding.severity == ERROR]
    if worst:
        raise QuarantineError(args.data, f"{len(worst)} errors, first: {worst[0].title}", worst[0].advice)
    return folder


def main(arguments: list[str] | None = None) -> None:
    flags = parser("python -m utils.datasets.doctor", __doc__.splitlines()[0])
    flags.add_argument(
        "--img-size",
        "--imgsz",
        "--img",
        type=count,
        nargs="+",
        default=[416],
        metavar="N",
        help="default: 416",
    )
    args = flags.parse_args(arguments)
    run(args, (args.img_size[0], args.img_size[-1]))


if __name__ == "__main__":
    run_main(main)

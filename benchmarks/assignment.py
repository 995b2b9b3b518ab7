"""Assignment beside its peers: 16 pictures x 20 objects x 8,400 slots x 80 classes.

python -m benchmarks.assignment
python -m benchmarks.assignment --quick            # does it run?

One thread, CPU time, contenders in turn in one process, freed memory kept, as in training on a CPU. Task-aligned: the
package's own ``TaskAlignedAssigner`` (pip install ultralytics), which is given the scores ready made, where ours makes
them. SimOTA: YOLOX is no package; ``SimOTA, by picture`` is a stand-in written here in its manner, from the paper: a
loop over pictures, all pairs of object and candidate with all classes, a loop over objects for their k. YOLOX itself
took 149 ms where ultralytics took 85 and the archive's ``build_targets`` 1.75 (a share of 0.0206 of ultralytics'):
``x YOLOX`` and ``x archive`` are derived by these factors where ultralytics is installed.
"""

import argparse
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.assign_cost import CLASSES, scene
from benchmarks.journal import record_row
from benchmarks.paired import span, take_turns, verdict
from models.assigners import build_targets
from models.assigners.ratio import Ratio
from models.assigners.simota import SimOTA
from models.assigners.task_aligned import TaskAligned
from models.assigners.wh_iou import WhIoU
from models.structures import Predictions
from utils.allocator import keep_freed_memory
from utils.boxes import box_iou
from utils.errors import run_main
from utils.structures import Targets

OBJECTS, RADIUS = 20, 1.5
YOLOX, ARCHIVE = 149 / 85, 1.75 / 85  # of ultralytics' time
OURS = {
    "task-aligned": TaskAligned(variant="v8_4", topk=10, alpha=0.5),
    "task-aligned (TOOD)": TaskAligned(),
    "SimOTA": SimOTA(center_radius=RADIUS),
    "wh-IoU": WhIoU(),
    "ratio": Ratio(),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.assignment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="2 pictures, one round, nothing recorded")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    images, num_rounds = (2, 1) if args.quick else (16, args.rounds)
    preds, targets = scene(images, OBJECTS, cpu)
    contenders = {name: lambda rule=rule: build_targets(preds, targets, rule) for name, rule in OURS.items()}
    contenders["SimOTA, by picture"] = lambda: simota_by_picture(preds, targets)
    peer = ultralytics(preds, targets)
    if peer is None:
        print("ultralytics: not installed (pip install ultralytics)")
    else:
        contenders["ultralytics"] = peer
    rounds = take_turns(contenders, rounds=num_rounds)
    print(f"Assignment, {images} pictures x {OBJECTS} objects x {len(preds.priors)} slots x {CLASSES} classes")
    print(rounds.table("SimOTA, by picture"))
    if args.quick:
        return
    print(verdict("assignment", "SimOTA", "SimOTA, by picture", rounds, 5, cpu))
    if peer is None:
        return
    print(verdict("assignment", "task-aligned", "ultralytics", rounds, 2, cpu))
    for name, theirs, factor, goal in (
        ("SimOTA", "YOLOX", YOLOX, 5),
        ("wh-IoU", "archive", ARCHIVE, 1),
        ("ratio", "archive", ARCHIVE, 1),
    ):
        derived = [factor * ratio for ratio in rounds.ratio(name, "ultralytics")]
        record_row("assignment", f"{name} / {theirs} (derived)", derived, goal, cpu)
        mark = "met" if median(derived) >= goal else "NOT met"
        print(f"assignment: {name} is {span(derived)} x {theirs} (derived), goal {goal}: {mark}")


def ultralytics(preds: Predictions, targets: Targets):
    """The peer's assigner on the same numbers, or None."""
    try:
        from ultralytics.utils.tal import TaskAlignedAssigner
    except ImportError:
        return None
    assigner = TaskAlignedAssigner(topk=10, num_classes=CLASSES, alpha=0.5, beta=6.0)
    scores = preds.obj[..., None].sigmoid() * preds.cls.sigmoid()
    labels, boxes = targets.labels.view(-1, OBJECTS, 1), targets.boxes.view(-1, OBJECTS, 4)
    exists = torch.ones_like(labels, dtype=torch.bool)
    return lambda: assigner(scores, preds.boxes, preds.priors.center, labels, boxes, exists)


@torch.no_grad()
def simota_by_picture(preds: Predictions, targets: Targets) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Slots and their objects, picture by picture (Ge et al. 2021, section 2.1)."""
    found = []
    points, strides = preds.priors.center, preds.priors.stride
    for image in range(len(preds.obj)):
        mine = targets.image == image
        boxes, labels = targets.boxes[mine], targets.labels[mine]
        centers = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        near = ((points - centers).abs() < RADIUS * strides).all(-1)
        slots = near.any(0).nonzero().squeeze(1)
        iou = box_iou(boxes, preds.boxes[image, slots])
        score = (preds.cls[image, slots].sigmoid() * preds.obj[image, slots, None].sigmoid()).sqrt()
        named = F.one_hot(labels, CLASSES).float()[:, None].expand(-1, len(slots), -1)
        wrong = F.binary_cross_entropy(score[None].expand_as(named), named, reduction="none").sum(-1)
        cost = wrong - 3 * (iou + 1e-8).log() + 1e6 * ~near[:, slots]
        chosen = torch.zeros_like(cost, dtype=torch.bool)
        counts = iou.topk(min(10, len(slots)), dim=1).values.sum(1).int().clamp(min=1)
        for row, count in enumerate(counts.tolist()):
            chosen[row, cost[row].topk(count, largest=False).indices] = True
        contested = chosen.sum(0) > 1
        best = cost[:, contested].argmin(0)
        chosen[:, contested] = False
        chosen[best, contested.nonzero().squeeze(1)] = True
        taken = chosen.any(0)
        found.append((slots[taken], chosen[:, taken].int().argmax(0)))
    return found


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))

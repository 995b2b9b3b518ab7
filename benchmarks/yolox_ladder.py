"""The ladder of the YOLOX paper at small scale: from a YOLOv3 to a YOLOX in five steps, one thing changed in each.

python -m benchmarks.yolox_ladder
python -m benchmarks.yolox_ladder --quick           # does it run?

Ge et al. 2021, table 2: on COCO, with Darknet53 and 300 epochs, each step gained what ``PUBLISHED`` says. Here a small
network learns for minutes, so only signs can be compared. The loss is YOLOX's on every rung (as in the paper, whose
baseline has BCE and an IoU loss already), the optimiser that of cfg/hyp/matchbox.yaml. Results are kept in
runs/bench/yolox_ladder.jsonl; what is there is not run again.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from statistics import mean
from typing import NamedTuple

from benchmarks.journal import Journal, record, spread, table
from benchmarks.networks import build_network
from benchmarks.short_training import command, data_name, parse_args, read_data, title, train
from models.losses import build_criterion
from utils.config import read_recipe
from utils.errors import run_main
from utils.run import select_device, set_seed

LOSS = {"name": "yolox", "l1_epochs": 0}
MIXUP = 0.5
REACH = 3.0  # strides: FCOS's 8 for pictures of 224 pixels where the paper's have 640


class Rung(NamedTuple):
    """A network, how it is taught, and what the paper gained by coming here."""

    name: str
    network: str
    assigner: Mapping
    strong: bool
    published: float | None


ONE_ANCHOR = {"name": "best_anchor"}
LADDER = (
    Rung("YOLOv3 baseline", "yolo", ONE_ANCHOR, False, None),
    Rung("+ decoupled head", "yolo-decoupled", ONE_ANCHOR, False, 1.1),
    Rung("+ strong augmentation", "yolo-decoupled", ONE_ANCHOR, True, 2.4),
    Rung("+ anchor-free", "yolox", {"name": "center_sampling", "radius": 0.5, "reach": REACH}, True, 0.9),
    Rung("+ multi positives", "yolox", {"name": "center_sampling", "radius": 1.5, "reach": REACH}, True, 2.1),
    Rung("+ SimOTA", "yolox", {"name": "simota"}, True, 2.3),
)
COLUMNS = ("rung", "mAP50", "mAP50-95", "positives/object", "gain", "seeds up", "published", "sign")


def main(args: argparse.Namespace) -> None:
    device = select_device(args.device)
    budget, journal = args.budget, Journal(args.journal)
    data, recipe = read_data(args.data, budget), read_recipe("matchbox")
    weak = replace(recipe.augment, mosaic=0.0, mixup=0.0)
    strong = replace(weak, mosaic=1.0, mixup=MIXUP, close_mosaic=max(1, budget.epochs // 3))

    def key(rung, seed):
        return {"data": data_name(args.data), "rung": rung.name, "seed": seed, **budget._asdict()}

    for seed in args.seeds:
        for rung in LADDER:
            if journal.get(key(rung, seed)):
                continue
            set_seed(seed)
            model = build_network(rung.network, len(data.names)).to(device)
            criterion = build_criterion(rung.assigner, LOSS, model.num_classes, rung.name, model.heads)
            augment = strong if rung.strong else weak
            result = train(model, criterion, data, optim=recipe.optim, augment=augment, budget=budget, seed=seed)
            journal.add(key(rung, seed), result)
            print(f"seed {seed}: {rung.name}: mAP50 {result['mAP50']:.3f}, {result['seconds']:.0f} s")
    results = [[journal.get(key(rung, seed)) for seed in args.seeds] for rung in LADDER]
    rows = [
        (
            rung.name,
            spread([result["mAP50"] for result in mine]),
            spread([result["mAP50-95"] for result in mine]),
            f"{mean(result['positives'] for result in mine):.1f}",
            *gain(rung, before, mine),
        )
        for rung, before, mine in zip(LADDER, [None, *results], results)
    ]
    text = table(COLUMNS, rows)
    print(text)
    if args.record:
        record(title("YOLOX ladder", args, data), command("yolox_ladder", args), text, device)


def gain(rung: Rung, before: list[dict] | None, mine: list[dict]) -> tuple[str, ...]:
    """Mean gain in mAP50-95, how many seeds gained, what was published, and whether the sign is the same.

    The sign counts as the same, or the opposite, only where all seeds agree.
    """
    if before is None:
        return "", "", "", ""
    gains = [100 * (new["mAP50-95"] - old["mAP50-95"]) for new, old in zip(mine, before)]
    up = sum(value > 0 for value in gains)
    sign = {len(gains): "same", 0: "opposite"}.get(up, "unclear")
    return f"{mean(gains):+.1f}", f"{up} of {len(gains)}", f"{rung.published:+.1f}", sign


if __name__ == "__main__":
    arguments = parse_args(sys.argv[1:], name="yolox_ladder", description=__doc__)
    run_main(lambda: main(arguments))

"""Every assigner on one network: same data, same budget, same optimiser and augmentation, several seeds.

python -m benchmarks.assigners                                  # the default data set
python -m benchmarks.assigners --data data/bccd.yaml --epochs 10
python -m benchmarks.assigners --quick                          # does it run? seconds, numbers mean nothing

Each assigner has the loss of its own recipe; optimiser and augmentation are those of cfg/hyp/matchbox.yaml for all.
Two networks with the same backbone: the [yolo] head of cfg/matchbox.cfg, which all assigners can use, and a decoupled
[yolox] head for those that need no anchors. Results are kept in runs/bench/assigners.jsonl: what is there is not run
again, so a cut session continues, and several processes can share the work by --data or --seeds.
"""

import argparse
import sys
from statistics import mean

from benchmarks.journal import Journal, record, spread, table
from benchmarks.networks import build_network
from benchmarks.short_training import command, data_name, parse_args, read_data, title, train
from models.compare_assigners import build_criteria
from utils.config import read_recipe
from utils.errors import run_main
from utils.run import select_device, set_seed

RECIPE = "matchbox"
HEADS = ("yolo", "yolox")
COLUMNS = ("assigner", "loss", "head", "mAP50", "mAP50-95", "positives/object", "assign ms", "of forward")


def main(args: argparse.Namespace) -> None:
    device = select_device(args.device)
    budget, journal = args.budget, Journal(args.journal)
    data, recipe = read_data(args.data, budget), read_recipe(RECIPE)
    pairs = [(head, name) for head in HEADS for name in criteria_of(head, len(data.names))[1]]

    def key(head, name, seed):
        return {"data": data_name(args.data), "head": head, "assigner": name, "seed": seed, **budget._asdict()}

    for seed in args.seeds:
        for number, (head, name) in enumerate(pairs):
            if journal.get(key(head, name, seed)):
                continue
            set_seed(seed)
            model, criteria = criteria_of(head, len(data.names))
            result = train(
                model.to(device),
                criteria[name],
                data,
                optim=recipe.optim,
                augment=recipe.augment,
                budget=budget,
                seed=seed,
            )
            journal.add(key(head, name, seed), result)
            print(
                f"seed {seed}, {number + 1}/{len(pairs)}: {name} on {head}: mAP50 {result['mAP50']:.3f}, "
                f"{result['seconds']:.0f} s"
            )
    rows = []
    for head, name in pairs:
        results = [journal.get(key(head, name, seed)) for seed in args.seeds]
        rows.append((name, loss_name(criteria_of(head, len(data.names))[1][name]), head, *cells(results)))
    text = table(COLUMNS, rows)
    print(text)
    if args.record:
        record(title("Assigners", args, data), command("assigners", args), text, device)


def criteria_of(head: str, num_classes: int):
    """A new network, and every assigner it can have with the loss of its own recipe."""
    model = build_network(head, num_classes)
    return model, build_criteria(model)[0]


def loss_name(criterion) -> str:
    return type(criterion.loss).__name__.removesuffix("Loss").lower()


def cells(results: list[dict]) -> tuple[str, ...]:
    """One row of the table, from the results of all seeds. Times are of the quietest run: others had company."""
    quiet = min(results, key=lambda result: result["forward_ms"] + result["assign_ms"])

    return (
        spread([result["mAP50"] for result in results]),
        spread([result["mAP50-95"] for result in results]),
        f"{mean(result['positives'] for result in results):.1f}",
        f"{quiet['assign_ms']:.1f}",
        f"{quiet['assign_ms'] / quiet['forward_ms']:.1%}",
    )


if __name__ == "__main__":
    arguments = parse_args(sys.argv[1:], name="assigners", description=__doc__)
    run_main(lambda: main(arguments))

"""Minutes until a network finds things: from the start of train.py to mAP@0.5 = 0.85 on the validation half of BCCD.

python -m benchmarks.time_to_accuracy                       # every network, three seeds
python -m benchmarks.time_to_accuracy --networks yolov3-tiny --seeds 0

train.py itself runs, as its own process, with everything a user waits for: imports, reading the data, pictures,
evaluation after each epoch. It is stopped by SIGTERM once an epoch's mAP is there. The test split is never read. What
is reached is kept in the journal and not run again; rows of other commits stay in ``benchmarks/README.md``.

Wall time holds for a quiet machine only; CPU time, of all processes of the run, is given beside it.
"""

import argparse
import csv
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.journal import ROOT, Journal, commit, record, table
from utils.arguments import count, whole

GOAL = 0.85
METRIC = "metrics/mAP50"
WAYS = {  # network: what a user types
    "yolov3-tiny": "--cfg yolov3-tiny.cfg --epochs 40",
    "yolo-fastest-1.1": "--cfg yolo-fastest-1.1.cfg --weights yolo-fastest-1.1.weights --img-size 416 --epochs 24",
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="data/bccd.yaml")
    parser.add_argument("--goal", type=float, default=GOAL, help=f"mAP@0.5 to reach (default: {GOAL})")
    parser.add_argument("--threads", type=count, default=os.cpu_count(), help="of one training (default: all cores)")
    parser.add_argument("--extra", default="", help="more flags for train.py, in one string")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/bench/time_to_accuracy", help="folder of the runs")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/README.md")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    journal = Journal(args.runs / "journal.jsonl")
    rows = []
    for network in args.networks:
        flags = f"{WAYS[network]} --data {args.data} --cache {args.extra}".strip()
        results = [one_run(journal, args, flags, seed) for seed in args.seeds]
        reached = [result for result in results if result["epochs"]]
        cells = [show([result[key] for result in reached]) for key in ("minutes", "cpu_minutes", "epochs")]
        rows.append((network, f"{len(reached)} of {len(results)}", *cells, f"train.py {flags}"))
    text = table(("network", "reached", "minutes", "CPU minutes", "epochs", "command"), rows)
    print(text)
    if args.record:
        title = f"Time to mAP@0.5 = {args.goal} on bccd val, {len(args.seeds)} seeds: median (min-max)"
        record(title, "python -m benchmarks.time_to_accuracy", text, torch.device("cpu"))


def one_run(journal: Journal, args: argparse.Namespace, flags: str, seed: int) -> dict:
    """Minutes, CPU minutes and epochs (0: not reached) of one training."""
    key = {"flags": flags, "seed": seed, "goal": args.goal, "threads": args.threads, "commit": commit()}
    if (known := journal.get(key)) is None:
        known = train_until(args.runs, f"{flags} --seed {seed}", args.goal, args.threads)
        journal.add(key, known)
    print(f"seed {seed}: {known}  train.py {flags}", flush=True)
    return known


def train_until(folder: Path, flags: str, goal: float, threads: int) -> dict:
    """Run train.py until a row of its results.csv reaches the goal, or to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    number = sum(1 for _ in folder.glob("run*.log"))
    name, log = f"run{number}", folder / f"run{number}.log"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            [sys.executable, "train.py", *flags.split(), "--project", str(folder), "--name", name],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        epochs = 0
        while not epochs and child.poll() is None:
            time.sleep(0.2)
            epochs = epochs_to(folder / name / "results.csv", goal)
        minutes = (time.perf_counter() - start) / 60
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        code = child.wait()
    if not epochs and code != 0:
        raise SystemExit(f"train.py ended with {code}: {log}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"minutes": minutes, "cpu_minutes": cpu / 60, "epochs": epochs, "commit": commit()}


def epochs_to(path: Path, goal: float) -> int:
    """How many epochs it took to reach the goal; 0: not yet."""
    if not path.is_file():
        return 0
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            try:
                if float(row[METRIC]) >= goal:
                    return number
            except (KeyError, TypeError, ValueError):  # a row that is being written, an epoch without evaluation
                continue
    return 0


def show(values: list[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else "-"


if __name__ == "__main__":
    main()

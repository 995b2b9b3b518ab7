"""How long a person waits before anything happens: ``--help``, ``import models``, the first training step.

python -m benchmarks.startup
python -m benchmarks.startup --clock wall           # on a machine that does nothing else

Every contender is a process of its own, measured from its start to its end against ``import torch`` in turn: the
goals of 0.3 s to ``--help`` and 5 s to the end of the first step, where importing torch takes 1.6 s, become ratios that
hold on other machines. The first step is that of ``train.py`` as it is, on the generated data set with pictures cached
on disk by an earlier run; the process ends itself after the first move of the optimiser.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.paired import take_turns, verdict
from utils.arguments import count
from utils.errors import run_main

ROOT = Path(__file__).resolve().parents[1]
TORCH = "import torch"  # what the others are compared with
TORCH_SECONDS = 1.6  # it took where the goals were written
FIRST_STEP = """
import os
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
import train
train.main()
"""
GOALS = {  # seconds
    "train.py --help": 0.3,
    "test.py --help": 0.3,
    "detect.py --help": 0.3,
    "import models": 0.3,
    "first training step": 5.0,
}


def children() -> float:
    """CPU seconds of all processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


CLOCKS = {"cpu": children, "wall": time.perf_counter}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="cpu", help="default: cpu, which a busy machine disturbs less"
    )
    parser.add_argument("--quick", action="store_true", help="one round of all but the first step, nothing recorded")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as runs:
        contenders = {name: lambda arguments=arguments: start(*arguments) for name, arguments in commands(runs).items()}
        if args.quick:
            args.rounds = 1
            del contenders["first training step"]
        rounds = take_turns(contenders, rounds=args.rounds, warmup=0 if args.quick else 1, clock=CLOCKS[args.clock])
    print(rounds.table(base=TORCH))
    if not args.quick:
        for name, seconds in GOALS.items():
            print(verdict("startup", name, TORCH, rounds, goal=TORCH_SECONDS / seconds, device=torch.device("cpu")))


def commands(runs: str) -> dict[str, tuple[str, ...]]:
    """Arguments of python by contender; ``runs`` is where runs go."""
    scripts = {f"{name}.py --help": (f"{name}.py", "--help") for name in ("train", "test", "detect")}
    first_step = ("-c", FIRST_STEP, "--cache", "disk", "--workers", "0", "--project", runs)
    return {
        "python": ("-c", "pass"),
        TORCH: ("-c", TORCH),
        **scripts,
        "import models": ("-c", "import models"),
        "first training step": first_step,
    }


def start(*arguments: str) -> None:
    """Run python to its end."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))

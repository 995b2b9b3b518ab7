"""A program that saves after each of its steps: ``save_steps.py FOLDER STEPS``. Continues from what it finds."""

import sys
from pathlib import Path

import store_checks as checks

from utils.store import Store


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    start = checks.latest_step(folder) if any(folder.glob("*.safetensors")) else 0
    store = Store(folder)
    for step in range(start + 1, steps + 1):
        checks.save(store, step)
        print(f"saved {step}", flush=True)

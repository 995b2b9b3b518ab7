"""What benchmarks leave behind: results kept as they come, aligned tables, and dated sections of README.md."""

import csv
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "benchmarks/README.md"
RECORD = ROOT / "benchmarks/record.csv"


class Journal:
    """A file of one JSON object per line: what was run (``key``) and its numbers. A cut session loses nothing."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        self.results = {_text(row["key"]): row["result"] for row in map(json.loads, lines)}

    def get(self, key: Mapping) -> dict | None:
        return self.results.get(_text(key))

    def add(self, key: Mapping, result: Mapping) -> None:
        self.results[_text(key)] = dict(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:  # one short write: two processes may share the file
            file.write(json.dumps({"key": dict(key), "result": dict(result)}) + "\n")


def _text(key: Mapping) -> str:
    return json.dumps(dict(key), sort_keys=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text; the columns before the first number stand left."""
    rows = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    left = [all(not row[at][:1].isdigit() for row in rows[1:]) for at in range(len(head))]
    lines = [
        [cell.ljust(width) if stay else cell.rjust(width) for cell, width, stay in zip(row, widths, left)]
        for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``median (min-max)``."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def machine(device: torch.device) -> str:
    """Processor, threads and torch: what a number depends on beside the commit."""
    cpuinfo, name = Path("/proc/cpuinfo"), platform.processor()
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def commit() -> str:
    """Short hash of the checkout, with a plus where tracked files differ from it."""
    git = ("git", "-C", str(ROOT))
    try:
        number = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return number.stdout.strip() + ("+" if changed.stdout.strip() else "")


def record(title: str, command: str, text: str, device: torch.device) -> None:
    """Append a dated section to benchmarks/README.md."""
    head = f"### {title}, {date.today()}\n\n`{command}`; commit {commit()}; {machine(device)}"
    with README.open("a", encoding="utf-8") as file:
        file.write(f"\n{head}\n\n```\n{text}\n```\n")


def record_row(benchmark: str, what: str, ratios: Sequence[float], goal: float, device: torch.device) -> None:
    """Append one dated line to benchmarks/record.csv: what was compared, median, least and greatest ratio, the goal."""
    new = not RECORD.is_file()
    with RECORD.open("a", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        if new:
            rows.writerow(("date", "commit", "benchmark", "what", "median", "least", "greatest", "goal", "machine"))
        numbers = [f"{value:.3f}" for value in (median(ratios), min(ratios), max(ratios))]
        rows.writerow((date.today(), commit(), benchmark, what, *numbers, f"{goal:g}", machine(device)))

"""Which run continues, and what may be different then.

A run keeps what decides its numbers: network, recipe, data, batch size, seed. The machine, what is written, and a
larger number of epochs may change.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.checkpoint import SUFFIX
from utils.errors import UserError
from utils.files import write_text
from utils.fitness import Best
from utils.logger import finite_or_none
from utils.run import WEIGHTS, find_run, numbered_runs
from utils.store import Found

AUTO = "auto"  # --resume auto: continue the newest run of this name, or begin
SUMMARY = "summary.json"  # the last file that a run writes
MAY_CHANGE = {
    *("epochs", "patience", "device", "workers", "cache", "precision", "channels_last", "sync_bn", "compile"),
    *("project", "name", "exist_ok", "nosave", "noval", "save_period", "save_interval", "show_assignments", "debug"),
    *("dry_run", "selftest", "resume", "allow_data_change", "max_bad", "strict", "max_pixels", "allow_truncated"),
}


def find_resumed(project: str, name: str, resume: str | None) -> Found | None:
    """The checkpoint that ``--resume`` asks for; None for a new run.

    Processes that torchrun started again continue what they began: the newest run of this name, if it has a checkpoint.
    Where it has none, they begin once more; an older run of the name is another one.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    restarted = resume is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if resume == AUTO or restarted:
        runs = list(numbered_runs(Path(project), name).values())
        runs = [run for run in (runs[-1:] if restarted else runs) if any((run / WEIGHTS).glob(f"*{SUFFIX}"))]
        resume = str(runs[-1]) if runs else None
    if resume is None:
        return None
    found = find_run(project, resume)
    for error in found.passed_over:
        print(f"warning: passed over {error}", file=sys.stderr)
    return found


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raises UserError where an argument that decides a run's numbers is not what it was; lists all of them."""
    changes = [
        f"{name} {before[name]} -> {value}"
        for name, value in now.items()
        if name in before and name not in MAY_CHANGE and value != before[name]
    ]
    if now["epochs"] < before["epochs"]:
        changes.append(f"epochs {before['epochs']} -> {now['epochs']} (more are possible)")
    if changes:
        found = f"a run that continues keeps its arguments: {', '.join(changes)}"
        raise UserError(where, found, "--weights RUN/weights/last.safetensors starts a new one from it")


def refuse_other_data(meta: Mapping[str, Any], fingerprint: str, allowed: bool, where: str) -> None:
    """Raises UserError where the data set is not the one that a run began with, unless that is ``allowed``."""
    if meta.get("data", fingerprint) != fingerprint and not allowed:
        raise UserError(where, "the data set has changed since the run began", "--allow-data-change goes on with it")


def write_summary(run: Path, values: Mapping[str, Any]) -> None:
    """What a run came to, its last file: with it, the run is finished."""
    write_text(run / SUMMARY, json.dumps(finite_or_none(values), indent=1) + "\n")


def is_finished(resumed: Found, epochs: int, patience: int) -> bool:
    """Whether a training ends with the epochs that a checkpoint has, and everything was written for them."""
    path, best = resumed.path.parents[1] / SUMMARY, Best()
    best.restore(resumed.meta["best"])
    if not best.ends(resumed.meta["epoch"], epochs, patience):
        return False
    try:
        return json.loads(path.read_bytes())["epochs"] == resumed.meta["epoch"]
    except (OSError, ValueError, KeyError, TypeError):  # not written, or by somebody else: it will be
        return False

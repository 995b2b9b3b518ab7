"""The fault catalogue and its table.

``catalogue.csv`` lists every fault: row, what is wrong, what must happen. A test answers for a row by its number
in its id (``[C7-filters]``) or name (``test_t9_...``). ``seen("...")`` notes what it saw.
``make fault-table`` runs all and writes ``docs/fault-table.md``; a row without a test stands in ``not_tested.csv`` with
the reason.
"""

import csv
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "utils")]

from run_state import WITH_NORM, Runs  # noqa: E402
from server import Server  # noqa: E402
from tiny import CFG, write_pictures  # noqa: E402

from tests.faults.harness import COLLECTED  # noqa: E402

HERE = Path(__file__).parent
ROW = re.compile(r"(?<![A-Za-z0-9])[CWDILTEVXPS]\d{1,2}(?!\d)")
TEMPORARY = re.compile(r"[^\s'\"]*/pytest-of-[^/\s]+/pytest-\d+/[^/\s:'\"]+/?")  # a test's folder: other each time
NAME = re.compile(r"(?<=_)[cwdiltevxps]\d{1,2}(?=_|$)")


def rows_of(nodeid: str) -> list[str]:
    """Rows that a test answers for: ``test_cfg.py::test_refused[C7-filters]`` -> ``["C7"]``."""
    _, _, test = nodeid.partition("::")
    name, _, parameters = test.partition("[")
    return [*(row.upper() for row in NAME.findall(name)), *ROW.findall(parameters)]


def read_rows(name: str) -> dict[str, dict[str, str]]:
    with (HERE / name).open(encoding="utf-8", newline="") as file:
        return {row["row"]: row for row in csv.DictReader(file)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Notes all tests before the slow ones are left out."""
    config.stash[COLLECTED] = [(item.path, item.nodeid) for item in items if HERE in item.path.parents]


@pytest.fixture
def seen(record_property):
    """``seen(text)``: what the code did, for the table."""
    return lambda text: record_property("seen", str(text))


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Server:
    """``server.run("train.py", *args) -> Finished``, ``server.start(...)`` to send signals: a process in 0.1 s."""
    return Server(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> list[str]:
    """Arguments of train.py: a network of three layers, six pictures of 64 px, three steps per epoch, three epochs.

    A test adds ``--project``; what is given again wins.
    """
    folder = tmp_path_factory.mktemp("tiny")
    data = write_pictures(folder)
    (folder / "tiny.cfg").write_text(CFG, encoding="utf-8")
    run = ["--cfg", str(folder / "tiny.cfg"), "--data", str(data), "--epochs", "3", "--batch-size", "2"]
    steps = ["--set", "nominal_batch=2", "--workers", "0", "--device", "cpu", "--precision", "float32"]
    return run + steps


@pytest.fixture(scope="session")
def runs(server, tiny_run, tmp_path_factory) -> Runs:
    """``runs.begin(folder, ...)``, ``runs.resume(folder, ...)``: runs of ``tiny_run`` with a batch norm, to compare."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "norm.cfg").write_text(CFG.replace(*WITH_NORM), encoding="utf-8")
    return Runs(server, [*tiny_run, "--cfg", str(folder / "norm.cfg")], folder)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    path = config.getoption("--fault-table")
    if path is None:
        return
    outcomes, notes = defaultdict(list), defaultdict(list)
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for row in rows_of(report.nodeid):
                if outcome != "passed" or report.when == "call":
                    outcomes[row].append(outcome)
                notes[row] += [TEMPORARY.sub("", text) for key, text in report.user_properties if key == "seen"]
    path.write_text(table(outcomes, notes), encoding="utf-8")
    terminalreporter.write_line(f"fault table: {path}")


def table(outcomes: dict[str, list[str]], notes: dict[str, list[str]]) -> str:
    """The page: a line per row of the catalogue."""
    missing = read_rows("not_tested.csv")
    lines, met = [], 0
    for number, row in read_rows("catalogue.csv").items():
        results = outcomes.get(number, [])
        good = bool(results) and set(results) <= {"passed"}
        if number in missing:
            seen = f"{'in part; ' if good else ''}not tested: {missing[number]['reason']}"
        else:
            seen = "; ".join(dict.fromkeys(notes.get(number, []))) or ("as required" if good else "no test")
        met += good and number not in missing
        verdict = "ok" if good else ("failed" if {"failed", "error"} & set(results) else "-")
        cells = (number, row["fault"], row["required"], _clip(seen), str(len(results)), verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    head = (
        "# The fault table\n\n"
        f"Written by `make fault-table` from a run of `tests/faults`: {met} of {len(lines)} rows as required. "
        "What the words mean: `docs/reliability.md`.\n\n"
        "| row | fault | required | seen | cases | |\n| --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(lines) + "\n"


def _clip(text: str, length: int = 240) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."

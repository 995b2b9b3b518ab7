"""The catalogue is whole: every row has a test or a reason, and the table in docs shows a run of all of them."""

import re
from pathlib import Path

import pytest

from tests.faults.conftest import read_rows, rows_of
from tests.faults.harness import COLLECTED

HERE = Path(__file__).parent
TABLE = Path(__file__).resolve().parents[2] / "docs/fault-table.md"


def test_every_row_has_a_test_or_a_reason(request):
    collected = request.config.stash[COLLECTED]
    if {path for path, _ in collected} != set(HERE.glob("test_*.py")):
        pytest.skip("runs with the whole of tests/faults only")
    answered = {row for _, nodeid in collected for row in rows_of(nodeid)}
    reasons = read_rows("not_tested.csv")
    assert answered <= set(read_rows("catalogue.csv")), "a test names a row that is not in the catalogue"
    assert all(row["reason"].strip() for row in reasons.values())
    assert set(read_rows("catalogue.csv")) - answered - set(reasons) == set()


def test_the_table_in_docs_shows_every_row_and_no_failure():
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if re.match(r"\| [A-Z]\d", line)]
    verdicts = {line.split(" | ")[0].strip("| "): line.rstrip(" |").rpartition("| ")[2] for line in lines}
    assert list(verdicts) == list(read_rows("catalogue.csv"))
    missing = {row for row, verdict in verdicts.items() if verdict != "ok"}
    assert missing <= set(read_rows("not_tested.csv"))


@pytest.mark.parametrize(
    "nodeid, rows",
    [
        ("tests/faults/test_cfg.py::test_refused[C7-filters]", ["C7"]),
        ("tests/faults/test_run.py::test_t9_two_runs[x]", ["T9"]),
        ("tests/faults/test_cfg.py::test_accepted[C16-C17-tabs]", ["C16", "C17"]),
        ("tests/faults/test_cfg.py::test_c100_nothing[F3-seed]", []),
    ],
)
def test_a_test_says_which_rows_it_answers_for(nodeid, rows):
    assert rows_of(nodeid) == rows

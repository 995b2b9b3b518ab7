"""Folders of reference material, and what happens where they are missing.

``--golden`` holds cases computed by other projects' own code, ``--data-dir`` real pictures, cfgs and weights. Neither
is part of the repository: tests that need them skip with a reason; with CI=true a skip is a failure where the folder
exists.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("--golden", "--data-dir")
LOCAL = {"127.0.0.1", "::1", "localhost", None}


def pytest_addoption(parser):
    parser.addoption("--golden", type=Path, default=ROOT.parent / "shared" / "golden", help="folder of golden cases")
    parser.addoption("--data-dir", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real data")
    parser.addoption("--fault-table", type=Path, help="write what tests/faults saw to this file (make fault-table)")


def pytest_configure(config):
    # one thread per process: results do not depend on the machine, and two cores stay usable
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    sys.addaudithook(refuse_network)


def refuse_network(event: str, args: tuple) -> None:
    """An audit hook of the whole suite: whoever connects to, or asks for the address of, another machine fails."""
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if host not in LOCAL:
        raise PermissionError(f"a test reaches for {host!r}: nothing of ours uses a network")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """With CI=true, a test that skipped for want of a folder that is there is a failure, not a shrug."""
    missed = _needlessly_skipped(terminalreporter, config)
    for line in missed:
        terminalreporter.write_line(f"SKIPPED ALTHOUGH THE FOLDER EXISTS: {line}", red=True)


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if (
        reporter
        and os.environ.get("CI") == "true"
        and exitstatus == 0
        and _needlessly_skipped(reporter, session.config)
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _needlessly_skipped(reporter, config) -> list[str]:
    """Tests that skipped and named an option whose folder exists."""
    existing = [option for option in FOLDERS if config.getoption(option).is_dir()]
    skipped = [(report.nodeid, str(report.longrepr)) for report in reporter.stats.get("skipped", [])]
    return [f"{name}: {reason}" for name, reason in skipped if any(f"{option}:" in reason for option in existing)]


def _folder(config, option: str) -> Path:
    folder = config.getoption(option)
    if not folder.is_dir():
        pytest.skip(f"{option}: no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def golden(pytestconfig) -> Path:
    """Folder of golden cases."""
    return _folder(pytestconfig, "--golden")


@pytest.fixture(scope="session")
def data_dir(pytestconfig) -> Path:
    """Folder of real data (cfg/, weights/, images/, bccd/, coco-mini/, map-reference/)."""
    return _folder(pytestconfig, "--data-dir")


def pytest_generate_tests(metafunc):
    """``@pytest.mark.golden_case("yolov3/*.npz")`` runs a test once per file found there, as argument ``case``."""
    for mark in metafunc.definition.iter_markers("golden_case"):
        folder = metafunc.config.getoption("--golden")
        files = sorted(folder.glob(mark.args[0]))
        reason = pytest.mark.skip(reason=f"--golden: no {mark.args[0]} under {folder}")
        cases = [pytest.param(f, id=str(f.relative_to(folder))) for f in files] or [pytest.param(None, marks=reason)]
        metafunc.parametrize("case", cases)

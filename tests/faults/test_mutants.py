"""The suite notices mistakes: each is put into a process of its own, where the check that guards against it fails."""

from functools import partial

import pytest
from harness import ROOT
from mutants import OF_A_RUN, OF_THE_STORE, failure, outcome, put_in
from run_state import differences, state
from tiny import CFG

from utils.failpoints import VARIABLE


@pytest.fixture
def folder(tmp_path):
    """An empty folder of checkpoints."""
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.mark.parametrize("mutant", [pytest.param(mutant, id=name) for name, mutant in OF_THE_STORE.items()])
def test_a_mistake_in_the_store_is_noticed(mutant, folder, tmp_path, seen):
    noticed = failure(mutant, folder)
    assert noticed, "nothing noticed it"
    assert not noticed.startswith(("SyntaxError", "IndentationError", "NameError", "AttributeError")), noticed
    assert "bring the mutant up to date" not in noticed, noticed
    seen(f"a mistake put in is noticed: {noticed.replace(str(tmp_path), '')}")


@pytest.mark.parametrize(
    "check", sorted({mutant.check for mutant in OF_THE_STORE.values()}, key=lambda check: check.__name__)
)
def test_without_a_mistake_the_same_checks_pass(check, folder):
    assert outcome({}, partial(check, folder)) == ""


@pytest.fixture(scope="module")
def arguments(tiny_run, tmp_path_factory):
    """A run with a save after every step, and with dropout, whose draws come from torch's generator."""
    cfg = tmp_path_factory.mktemp("dropout") / "tiny.cfg"
    last = "[convolutional]\nfilters=14"
    cfg.write_text(CFG.replace(last, f"[dropout]\nprobability=.3\n\n{last}"), encoding="utf-8")
    return [*tiny_run, "--cfg", cfg, "--noval", "--save-interval", "0"]


@pytest.fixture(scope="module")
def whole(server, arguments, tmp_path_factory):
    """How the run ends that nobody disturbs."""
    project = tmp_path_factory.mktemp("whole")
    assert server.run("train.py", *arguments, "--project", project).code == 0
    return state(project / "exp")


def continued(server, arguments, project, whole, save, before=None):
    """What of its end differs in a run that was killed in a save and continued by the code that ``before`` changes."""
    killed = server.run("train.py", *arguments, "--project", project, env={VARIABLE: f"save.open:{save}:SIGKILL"})
    assert killed.code == -9, killed.err
    ended = server.run("train.py", *arguments, "--project", project, "--resume", project / "exp", before=before)
    assert ended.code == 0, ended.err
    return sorted(differences(state(project / "exp"), whole))


@pytest.mark.parametrize("save", sorted({mutant.save for mutant in OF_A_RUN.values()}))
def test_t11_without_a_mistake_the_end_is_equal(save, server, arguments, whole, tmp_path):
    assert continued(server, arguments, tmp_path, whole, save) == []


@pytest.mark.parametrize("mutant", [pytest.param(mutant, id=name) for name, mutant in OF_A_RUN.items()])
def test_a_mistake_in_resume_is_noticed(mutant, server, arguments, whole, tmp_path, seen):
    found = continued(server, arguments, tmp_path, whole, mutant.save, partial(put_in, mutant.changes))
    assert found, "nothing noticed it"
    seen(f"a mistake put in is noticed: {', '.join(found)[:100]} differ")


def test_the_page_lists_every_mistake():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for name, mutant in {**OF_THE_STORE, **OF_A_RUN}.items():
        row, _, mistake = name.partition("-")
        assert f"| {row} | {mistake} |" in page, name
        assert mutant.changes

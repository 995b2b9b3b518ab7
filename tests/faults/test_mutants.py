"""The suite notices mistakes: each is put into a process of its own, where the check that guards against it fails."""

from functools import partial

import pytest
from mutants import OF_THE_STORE, failure, outcome


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

"""What the pages promise exists: every test that an answer names, every page, picture and file that is linked."""

import contextlib
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.assigners import ASSIGNERS
from models.losses import LOSSES
from utils.config import read_recipe
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
TESTS = {
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in (file.stem, *re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE))
}


def page(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", PAGES, ids=page)
def test_every_test_that_a_page_names_exists(file):
    named = set(re.findall(r"\btest_[a-z0-9_]+\b", file.read_text(encoding="utf-8")))
    assert not named - TESTS


@pytest.mark.parametrize("file", PAGES, ids=page)
def test_every_link_leads_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), f"{target} in {page(file)}"
        if anchor:
            assert anchor in headings(linked), f"{target} in {page(file)}"


def headings(file: Path) -> set[str]:
    """Anchors of a page, as its reader's browser names them."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", sorted((ROOT / "docs/assigners").glob("*.md")), ids=page)
def test_every_file_that_a_page_about_assigners_names_exists(file):
    named = re.findall(r"`((?:models|cfg|tests|utils)/[\w/.-]+\.\w+)`", file.read_text(encoding="utf-8"))
    assert named and not [name for name in named if not (ROOT / name).is_file()]


def test_the_page_of_assigners_knows_them_all():
    text = (ROOT / "docs/assigners.md").read_text(encoding="utf-8")
    table = {tuple(re.findall(r"`(\w+)`", line)) for line in text.splitlines() if line.startswith("|")}
    systems = {row for row in table if len(row) > 1 and row[0] in ASSIGNERS}
    assert {row[0] for row in systems} == set(ASSIGNERS)
    assert {row[-1] for row in systems} == set(LOSSES)


@pytest.mark.parametrize("twin", sorted((ROOT / "docs").glob("*.zh.md")), ids=page)
def test_chinese_twins_have_the_same_commands_tables_and_tests(twin):
    """Two pages that say the same: code blocks to the byte, sections, tables, and the code that they name, in order."""
    original = twin.with_name(twin.name.replace(".zh.md", ".md"))
    chinese, english = (file.read_text(encoding="utf-8") for file in (twin, original))
    assert f"]({twin.name})" in english and f"]({original.name})" in chinese
    for what in (r"^```.*?^```", r"^#+ |^\|(?= ---)", r"\d\.\d+", r"\btest_[a-z0-9_]+\b"):
        assert found(what, chinese) == found(what, english), what


def found(what: str, text: str) -> list[str]:
    return re.findall(what, text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """What a reader types: ``python ...`` between backticks and in blocks, lines that go on joined."""
    start = r"(?:python|torchrun --nproc_per_node \d) "
    return re.findall(start + r"((?:-m )?(?:train|test|detect|models|utils)\.[^`\n#]+)", text.replace("\\\n", " "))


@functools.cache
def flags_of(program: str) -> set[str]:
    command = [sys.executable, *program.split(), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout))


@functools.cache
def recipe_takes(override: str) -> bool:
    """Whether ``--set`` may say so to some recipe: keys of an assigner or a loss belong to that one."""
    for file in (ROOT / "cfg/hyp").glob("*.yaml"):
        with contextlib.suppress(UserError):
            read_recipe(file, [override])
            return True
    return False


@pytest.mark.parametrize("file", PAGES, ids=page)
def test_every_command_of_a_page_has_its_flags(file):
    text = file.read_text(encoding="utf-8")
    if file.name == "coming-from.md":  # the left column is other programs' own
        text = "\n".join(line.split(" | ", 1)[-1] for line in text.splitlines())
    for command in commands(text):
        program = re.match(r"(?:-m )?[\w.]+", command).group()
        asked = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", command.removeprefix(program)))
        assert not asked - flags_of(program), command
    assert not [pair for pair in re.findall(r"--set (\w[\w.]*=[\w.,]+)", text) if not recipe_takes(pair)]

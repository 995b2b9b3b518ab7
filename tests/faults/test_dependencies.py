"""What the project is made of and how it is handed on: requirements, their floors and the lock, CI, releases."""

import ast
import hashlib
import importlib.metadata
import io
import re
import subprocess
import sys
import tarfile

import pytest
from code_gate import SOURCES, relative
from harness import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

# -------------------------------------------------------------------------------------------------------- dependencies


def requirements(name: str) -> list[Requirement]:
    lines = (line.partition(" #")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


ALL = [*requirements("requirements.txt"), *requirements("requirements-dev.txt")]


@pytest.mark.parametrize("needed", [pytest.param(needed, id=f"S8-{needed.name}") for needed in ALL])
def test_every_dependency_has_a_floor_that_is_tested(needed, seen):
    """requirements-floor.txt (make test-floor) holds each floor, the lock a version in the range, with checksums."""
    (floor,) = (part.version for part in needed.specifier if part.operator == ">=")
    (tested,) = (pin for pin in requirements("requirements-floor.txt") if pin.name == needed.name)
    (pin,) = tested.specifier
    assert pin.operator == "==" and (pin.version == floor or pin.version.startswith(f"{floor}."))
    assert Version(importlib.metadata.version(needed.name)) in needed.specifier
    locked = [pin for pin in locked_versions() if pin[0] == needed.name]
    assert locked and all(Version(version) in needed.specifier for _, version, _ in locked)
    seen("floors tested (make test-floor), newest tested, requirements.lock with sha256 for CI")


LEAST = {"torch": "2.10", "pillow": "12.2"}  # CVE-2026-24747; GHSA-whj4-6x5x-4v2j


@pytest.mark.parametrize("name", [pytest.param(name, id=f"S8-hole-{name}") for name in LEAST])
def test_floors_lie_above_known_holes(name):
    (needed,) = (needed for needed in ALL if needed.name == name)
    assert Version("0" if not needed.specifier else LEAST[name]) in needed.specifier
    assert Version(LEAST[name] + ".dev0") not in needed.specifier


def locked_versions() -> list[tuple[str, str, int]]:
    """(name, version, number of checksums) of the lock."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    rows = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [
        (*re.match(r"([\w-]+)==([\w.+]+)", row).groups(), len(re.findall(r"--hash=sha256:[0-9a-f]{64}", row)))
        for row in rows
    ]


def test_s8_the_lock_has_a_checksum_for_everything_and_names_no_host():
    assert all(count >= 1 for _, _, count in locked_versions()) and len(locked_versions()) > 30
    assert not re.search(r"https?:|file:|--(extra-)?index-url|--find-links|@", (ROOT / "requirements.lock").read_text())


def test_s8_the_development_page_lists_every_dependency():
    page = (ROOT / "docs/development.md").read_text(encoding="utf-8")
    assert not [needed.name for needed in requirements("requirements.txt") if needed.name not in page]


# -------------------------------------------------------------------------------------------------------- CI, release


def test_s9_ci_runs_one_local_command(seen):
    """No workflow of a hosting service, nothing of a branch, an author or a secret reaches a shell."""
    files = [file for file in (ROOT / ".ci").rglob("*") if file.is_file()]
    assert [file.name for file in files] == ["run"]
    assert not [
        name for name in (".github", ".gitlab-ci.yml", ".circleci", "azure-pipelines.yml") if (ROOT / name).exists()
    ]
    lines = [line for line in files[0].read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec make test REQUIREMENTS=requirements.lock"]
    seen(".ci/run: " + lines[-1])


def test_s9_the_makefile_fetches_nothing_but_requirements():
    text = (ROOT / "Makefile").read_text()
    assert not re.search(r"\b(curl|wget|git clone|pull_request|eval|sudo)\b|\$\{\{|https?:", text)
    installs = re.findall(r"pip install (.*)", text)
    assert installs and all(re.search(r"-r \S*(requirements\S*|\$\(REQUIREMENTS\))$", line) for line in installs)


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a release has no history")
def test_s10_a_release_is_the_tree(seen):
    """There is no build: an archive of a commit, the same bytes each time, holds its files and nothing else."""
    one, other = git("archive", "HEAD"), git("archive", "HEAD")
    assert one == other
    with tarfile.open(fileobj=io.BytesIO(one)) as archive:
        packed = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    listed = git("ls-tree", "-r", "HEAD").decode().splitlines()
    blobs = {line.split("\t")[1]: line.split()[2] for line in listed}
    assert packed.keys() == blobs.keys()
    for name, content in packed.items():
        assert hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blobs[name], name
    assert "build-system" not in (ROOT / "pyproject.toml").read_text()
    seen(f"git archive: {len(packed)} files, each the blob of its commit, twice the same bytes")


def test_s10_nothing_in_the_tree_is_generated():
    names = git("ls-files").decode().splitlines()
    assert not [
        name for name in names if re.search(r"\.(pyc|so|pt|pth|whl|onnx|pkl|egg-info|exe|jar|zip|tar|gz)$", name)
    ]


OPTIONAL = {  # module -> folder or file that imports it, inside a function: for who asks for it and has it
    **dict.fromkeys(("onnx", "onnxruntime", "openvino"), "models/exports/"),
    **dict.fromkeys(("trackers", "supervision"), "utils/tracking.py"),
    "ensemble_boxes": "models/fusion.py",
}


def test_s4_nothing_is_imported_that_requirements_do_not_name():
    modules = {"torch", "torchvision", "numpy", "cv2", "PIL", "yaml", "safetensors", "tqdm", "tensorboard"}
    distributions = {name: names[0].lower() for name, names in importlib.metadata.packages_distributions().items()}
    named = {requirement.name.lower() for requirement in requirements("requirements.txt")}
    assert {distributions[name] for name in modules} == named
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [getattr(node, "module", None) or "re"]
            )
            for name in names:
                top = name.split(".")[0]
                known = top in modules or top in sys.stdlib_module_names or top in ("models", "utils")
                known = known or (relative(file).startswith(OPTIONAL.get(top, "-")) and node.col_offset > 0)
                assert known, f"{relative(file)} imports {name}"

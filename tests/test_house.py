"""The law of the house, kept by a machine: who may import whom, no work at import, no vague names, no size creep.

What no file may import or call (pickle, eval, sockets, ...) is in ``tests/faults/code_gate.py``.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "test", "detect")
SOURCES = sorted(
    [*(ROOT / "models").rglob("*.py"), *(ROOT / "utils").rglob("*.py"), *(ROOT / f"{name}.py" for name in SCRIPTS)]
)
MODULES = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in SOURCES if file.stem != "__init__"]
VAGUE = {"utils", "util", "general", "misc", "common", "helpers"}


def imports(file: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the room's name"
            found.add(node.module)
    return found


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down_only(file):
    own = room(file.relative_to(ROOT).parts[0].removesuffix(".py"))
    used = {room(name) for name in imports(file)}
    if own == "utils":
        assert not used & {"models", *SCRIPTS}, "utils knows nothing of networks or scripts"
    if own == "models":
        assert not used & set(SCRIPTS), "nobody imports a script"
    if own in SCRIPTS:
        assert not used & set(SCRIPTS), "scripts do not import scripts"


def test_networks_and_assigners_do_not_know_each_other():
    for file in (ROOT / "models").glob("*.py"):
        if file.name in {"layers.py", "heads.py", "coders.py", "darknet.py", "graph.py", "cfg.py"}:
            known = {name for name in imports(file) if name.startswith(("models.assigners", "models.losses"))}
            assert not known, f"{file.name} imports {known}"
    for file in (ROOT / "models" / "assigners").glob("*.py"):
        known = imports(file) & {"models.darknet", "models.heads", "models.layers", "models.cfg", "models.graph"}
        assert not known, f"{file.name} imports {known}"


def test_cfg_needs_no_torch():
    code = "import sys, models.cfg, models.graph, models.lint; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_no_vague_names():
    for file in SOURCES:
        assert file.stem not in VAGUE, file


def test_importing_has_no_effect():
    """Every module in one fresh interpreter: environment, threads, log handlers and working folder stay the same."""
    code = f"""
import json, os, logging, sys, threading, warnings
import torch, numpy, cv2
before = (dict(os.environ), torch.get_num_threads(), torch.get_rng_state().sum().item(), len(logging.root.handlers),
          os.getcwd(), cv2.getNumThreads(), threading.active_count(), len(warnings.filters), sorted(os.listdir()))
import importlib
for name in {MODULES!r}:
    if name not in {SCRIPTS!r}:
        importlib.import_module(name)
after = (dict(os.environ), torch.get_num_threads(), torch.get_rng_state().sum().item(), len(logging.root.handlers),
         os.getcwd(), cv2.getNumThreads(), threading.active_count(), len(warnings.filters), sorted(os.listdir()))
print(json.dumps([str(a) for a, b in zip(before, after) if a != b]))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout.splitlines()[-1]) == []
    assert out.stderr == ""

"""What a start does not import. Nothing is timed here: benchmarks/startup.py does that."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.startup import FIRST_STEP
from tests.utils.tiny import CFG, write_pictures

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "tensorboard", "cv2", "numpy", "PIL", "yaml")
SAY_WHICH = "import atexit, sys; atexit.register(lambda: print(sorted({!r} & sys.modules.keys())))\n"


def imported(code: str, names, *arguments: str) -> str:
    """Which of ``names`` a fresh interpreter has imported when ``code`` ends."""
    command = [sys.executable, "-c", SAY_WHICH.format(set(names)) + code, *arguments]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout.splitlines()[-1]


@pytest.mark.parametrize("script", ["train", "test", "detect"])
def test_help_imports_nothing_heavy(script):
    code = f"import runpy; runpy.run_path('{script}.py', run_name='__main__')"
    assert imported(code, HEAVY, "--help") == "[]"


def test_import_models_imports_nothing_heavy():
    assert imported("import models, utils", HEAVY) == "[]"


def test_the_first_step_imports_only_what_it_uses(tmp_path):
    """No compiler of torch (as slow to import as torch), no torchvision; and pictures of the network come later."""
    data = write_pictures(tmp_path / "data")
    (tmp_path / "tiny.cfg").write_text(CFG)
    flags = ("--data", str(data), "--cfg", str(tmp_path / "tiny.cfg"), "--device", "cpu", "--workers", "0")
    code = FIRST_STEP.replace("os._exit(0)", "sys.exit(0)").replace("import os", "import sys")
    unused = ("torch._dynamo", "torch._inductor", "torchvision", "sympy", "torch.onnx", "matplotlib", "pandas")
    assert imported(code, unused, *flags, "--project", str(tmp_path / "runs")) == "[]"

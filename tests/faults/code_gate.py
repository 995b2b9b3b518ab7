"""What our own code must not do, read off its syntax: run text, unpickle, start programs, open sockets, install.

Names are followed through imports: ``from os import system as s`` is ``os.system`` wherever ``s`` is called.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train", "test", "detect")
SOURCES = sorted(
    [*(ROOT / "models").rglob("*.py"), *(ROOT / "utils").rglob("*.py"), *(ROOT / f"{name}.py" for name in SCRIPTS)]
)
FORBIDDEN_MODULES = re.compile(
    r"(c?pickle|_pickle|marshal|shelve|dill|cloudpickle|joblib|copyreg"  # data that executes
    r"|subprocess|pty|runpy|code|codeop|imp|importlib|pip|ensurepip|venv|pkg_resources|setuptools"  # programs, installs
    r"|socket|ssl|http|urllib\.request|ftplib|smtplib|xmlrpc|webbrowser|requests|urllib3|httpx|aiohttp"  # network
    r"|ctypes|cffi|tarfile|zipfile|torch\.hub|torch\.package|torchvision\.datasets|telemetry|sentry_sdk)(\..*)?"
)
FORBIDDEN_CALLS = re.compile(
    r"eval|exec|compile|__import__|breakpoint|input"
    r"|os\.(system|popen|startfile|posix_spawnp?|fork|forkpty|removedirs|(exec|spawn)[lvpe]+)"
    r"|shutil\.(rmtree|move|unpack_archive)|builtins\..*"
    r"|yaml\.(load|load_all|unsafe_load|unsafe_load_all|full_load|full_load_all)"
    r"|torch\.(jit\.load|load_state_dict_from_url)|pandas\.read_.*|multiprocessing\.Process"
)
SAFE_ONLY_WITH = {  # a call -> the keyword and value without which it can execute what it reads
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
}
UNPACKING = {"extract", "extractall"}
EXCUSED = {  # file, what: why
    ("utils/allocator.py", "imports ctypes"): "the C library's allocator can be told in no other way: two numbers",
    ("models/pretrained.py", "imports zipfile"): "the directory of a .pt is looked at, nothing is unpacked",
    (
        "models/exports/wish.py",
        "imports importlib",
    ): "the package of a format, by a name in our code, if it is installed",
    ("utils/datasets/shapes.py", "calls shutil.rmtree"): "the folder that the same call made, under a name by chance",
}


def relative(file: Path) -> str:
    """``models/cfg.py``."""
    return file.relative_to(ROOT).as_posix()


def dangers(source: str, file: str = "<test>") -> list[str]:
    """``"12: calls os.system"`` for each thing in ``source`` that is forbidden and, in this ``file``, not excused."""
    return [f"{line}: {what}" for line, what in findings(source) if (file, what) not in EXCUSED]


def findings(source: str) -> list[tuple[int, str]]:
    """(line, what) of each thing that is forbidden."""
    tree = ast.parse(source)
    names = _imported(tree)
    return [finding for node in ast.walk(tree) for finding in _look(node, names)]


def _imported(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names |= {alias.asname: alias.name} if alias.asname else {top: top}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _look(node: ast.AST, names: dict[str, str]) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Import):
        yield from ((node.lineno, f"imports {a.name}") for a in node.names if FORBIDDEN_MODULES.fullmatch(a.name))
    elif isinstance(node, ast.ImportFrom):
        for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
            if FORBIDDEN_MODULES.fullmatch(module):
                yield node.lineno, f"imports {module}"
                break
        for alias in node.names:
            if FORBIDDEN_CALLS.fullmatch(f"{node.module}.{alias.name}"):
                yield node.lineno, f"imports {node.module}.{alias.name}"
    elif isinstance(node, ast.Call):
        name = _dotted(node.func, names)
        keywords = {word.arg: word.value for word in node.keywords}
        if FORBIDDEN_CALLS.fullmatch(name):
            yield node.lineno, f"calls {name}"
        if name in SAFE_ONLY_WITH:
            keyword, value = SAFE_ONLY_WITH[name]
            given = keywords.get(keyword)
            if not (isinstance(given, ast.Constant) and given.value is value):
                yield node.lineno, f"calls {name} without {keyword}={value}"
        if "shell" in keywords:
            yield node.lineno, "calls with shell="
        if isinstance(node.func, ast.Attribute) and node.func.attr in UNPACKING:
            yield node.lineno, f"calls .{node.func.attr}"
    elif isinstance(node, ast.ExceptHandler) and node.type is None:
        yield node.lineno, "has a bare except"


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    """``np.load`` -> ``numpy.load``; "" for what is no plain name (``f().load``, ``self.model.compile``)."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or (parts and node.id not in names):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])

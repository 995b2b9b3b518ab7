"""Notes what a process of ours does, by Python's audit events, and takes the network away from it.

Given to ``server.start(before=...)``: the hook is set after all imports, since torch compiles and executes text while
it is imported, and before ``main``. Processes that are forked later carry it with them.
"""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

VARIABLE = "MATCHBOX_AUDIT"  # the file that takes the notes, a JSON list a line: event, arguments, who
NOTED = (
    "pickle.find_class",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.",
)
NOTED += ("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.", "ctypes.dlopen", "marshal.", "shutil.")
NOTED += (
    "os.remove",
    "os.rmdir",
    "os.rename",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.utime",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch() -> None:
    """Note what happens from here on."""
    import multiprocessing.sharedctypes  # noqa: F401  torch's loader imports it at its first worker; it runs text

    notes = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def hook(event: str, args: tuple) -> None:
        what = _worth_a_note(event, args)
        if what is not None:
            os.write(notes, (json.dumps([event, what, _callers()]) + "\n").encode())

    sys.addaudithook(hook)


def watch_offline() -> None:
    """The same in a network namespace of its own, without any interface that is up."""
    import ctypes

    NEW_USER, NEW_NET = 0x10000000, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    offline = libc.unshare(NEW_NET) == 0 or libc.unshare(NEW_USER | NEW_NET) == 0
    watch()
    sys.audit("socket.unshared", offline)


def misbehave() -> None:
    """Everything that must not happen, once: the hook sees each."""
    watch()
    exec("1 + 1")
    compile("1 + 1", "<text>", "eval")
    pickle.loads(pickle.dumps(Path("x")))
    subprocess.run(["true"], check=True)
    os.system("true")
    with socket.socket() as connection:
        connection.connect_ex(("127.0.0.1", 9))
    (Path(os.environ[VARIABLE]).parent / "stray").write_text("x")


def read_notes(path: Path) -> list[tuple[str, str, list[str]]]:
    """(event, argument, callers from the innermost)."""
    return [tuple(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _worth_a_note(event: str, args: tuple) -> str | None:
    if event == "open":
        path, mode, flags = args
        writes = (flags or 0) & WRITING if mode is None else set(mode) & set("wax+")
        return str(path) if writes and isinstance(path, (str, bytes, os.PathLike)) else None
    if event == "exec":  # of a module's code while it is imported: its file; of text: "<string>"
        file = getattr(args[0], "co_filename", "")
        return file if not os.path.exists(file) and not file.startswith("<frozen") else None  # noqa: PTH110
    if event == "compile":
        file = os.fsdecode(args[1]) if isinstance(args[1], (str, bytes)) else ""
        if "/ast.py:" in _callers(1, 3)[0]:
            return None  # numpy reads the head of a file by ast.literal_eval, which parses only
        return None if os.path.exists(file) else file or "?"  # noqa: PTH110
    return str(args[:3]) if event.startswith(NOTED) else None


def _callers(depth: int = 12, skipped: int = 2) -> list[str]:
    """Files of the functions that led here, without the innermost ones, which are the hook's."""
    frame, files = sys._getframe(skipped), []
    while frame is not None and len(files) < depth:
        files.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return files

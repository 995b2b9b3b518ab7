"""Nothing gets in or out: no pickle, no text that runs, no program, no socket, no file outside the run's folder.

``code_gate.py`` reads it off the syntax of our code, ``audit.py`` watches whole programs by Python's audit events. What
these do not see: what C extensions (torch, OpenCV) do by themselves; a network namespace without interfaces does.
"""

import hashlib
import io
import re
import socket
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from audit import VARIABLE, misbehave, read_notes, watch_offline
from code_gate import EXCUSED, SOURCES, dangers, findings, relative
from grid_network import CFG as GRID
from grid_network import write_grid_network
from harness import ROOT, Finished, refused
from tiny import write_pictures

import detect
from models.cfg import read_cfg
from models.loading import load_network
from utils.datasets.records import read_dataset, read_names

# ------------------------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize("file", [pytest.param(file, id=f"S2-{relative(file)}") for file in SOURCES])
def test_our_code_runs_no_text_and_starts_nothing(file):
    assert not dangers(file.read_text(encoding="utf-8"), relative(file))


def test_s2_every_excuse_is_needed():
    found = {(relative(file), what) for file in SOURCES for _, what in findings(file.read_text(encoding="utf-8"))}
    assert found >= {(file, what) for file, what in EXCUSED if (ROOT / file).exists()}


CAUGHT = {
    "S1-pickle": "import pickle",
    "S1-pickle-from": "from pickle import loads",
    "S1-torch-load": "import torch\ntorch.load('x')",
    "S1-torch-load-unsafe": "import torch as t\nt.load('x', weights_only=False)",
    "S1-torch-load-variable": "import torch\ntorch.load('x', weights_only=safe)",
    "S1-numpy": "import numpy as np\nnp.load('x')",
    "S1-numpy-unsafe": "from numpy import load\nload('x', allow_pickle=True)",
    "S1-joblib": "def f():\n    import joblib",
    "S1-yaml": "import yaml\nyaml.load(text, Loader=yaml.Loader)",
    "S1-yaml-unsafe": "from yaml import unsafe_load",
    "S2-eval": "eval('1')",
    "S2-exec": "exec('1')",
    "S2-compile": "compile('1', 'x', 'exec')",
    "S2-import": "__import__('os')",
    "S2-importlib": "import importlib",
    "S2-system": "import os\nos.system('x')",
    "S2-system-alias": "from os import system as s\ns('x')",
    "S2-popen": "import os as o\no.popen('x')",
    "S2-execv": "import os\nos.execvp('x', [])",
    "S2-spawn": "import os\nos.spawnlp(0, 'x')",
    "S2-shell": "run('x', shell=True)",
    "S2-subprocess": "import subprocess",
    "S2-bare-except": "try:\n    pass\nexcept:\n    pass",
    "S2-delete": "import shutil\nshutil.rmtree('x')",
    "S2-native": "import ctypes",
    "S3-socket": "import socket",
    "S3-urllib": "import urllib.request",
    "S3-urllib-from": "from urllib import request",
    "S3-requests": "import requests",
    "S3-hub": "from torch.hub import load_state_dict_from_url",
    "S3-http": "from http.client import HTTPConnection",
    "S4-pip": "import pip",
    "S4-pip-run": "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'pip'])",
    "S5-tar": "import tarfile",
    "S5-zip": "from zipfile import ZipFile",
    "S5-extract": "archive.extractall('x')",
    "S5-unpack": "from shutil import unpack_archive",
}


@pytest.mark.parametrize("source", [pytest.param(source, id=row) for row, source in CAUGHT.items()])
def test_the_gate_catches(source, seen):
    found = dangers(source)
    assert found and all(re.match(r"\d+: ", what) for what in found)


def test_s2_the_gate_lets_pass():
    harmless = "import re, torch, numpy as np\nre.compile('x')\nmodel.eval()\nmodel.compile()\ntorch.compile(f)\n"
    harmless += "torch.load('x', weights_only=True)\nnp.load('x', allow_pickle=False)\nimport yaml\nyaml.safe_dump({})"
    assert dangers(harmless) == []


# ------------------------------------------------------------------------------------------------- programs under watch


class Watched(NamedTuple):
    """What a program did."""

    ended: Finished
    notes: list  # (event, arguments, callers)
    project: Path  # where it may write
    stray: list[str]  # files that came to be in the home and the working folder
    data_is_same: bool
    offline: bool

    def of(self, *events: str) -> list:
        return [note for note in self.notes if note[0].startswith(events)]


def tree(folder: Path) -> dict[str, str]:
    """What there is: name, kind, time of change and checksum of everything below."""
    return {
        str(path.relative_to(folder)): f"{path.stat().st_mode} {path.stat().st_mtime_ns} "
        + (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in sorted(folder.rglob("*"))
    }


PROGRAMS = ("train", "resume", "workers", "test", "detect")


@pytest.fixture(scope="module")
def watched(server, tmp_path_factory):
    """``watched(program)``: each of ``PROGRAMS`` once, without a network, in an empty working folder and home."""
    folder, done = tmp_path_factory.mktemp("watched"), {}
    data = write_pictures(folder / "data")
    write_grid_network(folder / "net.safetensors")
    (folder / "tiny.cfg").write_text(GRID)
    project = folder / "runs"
    train = [
        "train.py",
        "--cfg",
        folder / "tiny.cfg",
        "--data",
        data,
        "--batch-size",
        2,
        "--project",
        project,
        "--device",
        "cpu",
    ]
    looks = [
        "--weights",
        folder / "net.safetensors",
        "--project",
        project,
        "--device",
        "cpu",
        "--save-txt",
        "--save-json",
    ]
    commands = {
        "train": [*train, "--name", "a", "--epochs", 1, "--workers", 0],
        "resume": ["train.py", "--resume", project / "a", "--epochs", 2],
        "workers": [*train, "--name", "b", "--epochs", 1, "--workers", 1, "--cache", "disk"],
        "test": ["test.py", *looks, "--name", "c", "--data", data, "--workers", 0],
        "detect": ["detect.py", *looks, "--name", "d", "--source", folder / "data/images/val", "--save-crop"],
    }

    def watch(program: str) -> Watched:
        if program == "resume":
            watch("train")
        if program not in done:
            home, here, notes = (folder / f"{program} {name}" for name in ("home", "here", "notes"))
            home.mkdir()
            here.mkdir()
            before = tree(folder / "data")
            places = {
                "HOME": home,
                "XDG_CACHE_HOME": home / "c",
                "XDG_CONFIG_HOME": home / "x",
                "TORCH_HOME": home / "t",
            }
            environment = {name: str(value) for name, value in {**places, VARIABLE: notes}.items()}
            ended = server.run(*commands[program], before=watch_offline, env=environment, cwd=here, pictures=True)
            assert ended.code == 0, ended.err
            noted = read_notes(notes)
            stray = [*tree(home), *(name for name in tree(here) if not name.startswith("runs"))]
            offline = noted[0][:2] == ("socket.unshared", "(True,)")
            done[program] = Watched(ended, noted[1:], project, stray, tree(folder / "data") == before, offline)
        return done[program]

    return watch


def each_program(row: str):
    return pytest.mark.parametrize("program", [pytest.param(program, id=f"{row}-{program}") for program in PROGRAMS])


@each_program("S1")
def test_nothing_is_unpickled(watched, program, seen):
    """Workers hand batches to the process that forked them by multiprocessing, which pickles: no file is read so."""
    between_processes = ("torch/utils/data/", "multiprocessing/queues.py", "multiprocessing/connection.py")
    importing = "<frozen importlib"
    notes = watched(program).of("pickle.", "marshal.")
    from_files = [
        note
        for note in notes
        if not any(where in caller for caller in note[2] for where in (*between_processes, importing))
    ]
    assert not from_files
    assert program == "workers" or not watched(program).of("pickle.")
    seen("no pickle.find_class in train, resume, test, detect; with workers only between the run's own processes")


@each_program("S2")
def test_no_text_is_run(watched, program, seen):
    assert not watched(program).of("exec", "compile")
    libraries = {note[1] for note in watched(program).of("ctypes.dlopen")}
    assert libraries <= {"(None,)", "('libnvidia-ml.so.1',)"}, "ours: the C library; torch's: is there a GPU?"
    seen("no exec or compile of text after the imports")


@each_program("S3")
def test_no_socket(watched, program, seen):
    """The host's name is asked for file names; workers hand over files by sockets that have no network (AF_UNIX)."""
    notes = [
        note
        for note in watched(program).of("socket.", "urllib.", "http.", "ftplib.", "smtplib.")
        if note[0] != "socket.gethostname"
    ]
    local = [note for note in notes if "family=1," in note[1] or note[1].endswith(", 1, 1)")]
    assert notes == local and (program == "workers" or not notes)
    seen("no socket; exit 0 in a network namespace without interfaces" if watched(program).offline else "no socket")


@each_program("S4")
def test_no_program_is_started(watched, program, seen):
    assert not watched(program).of(
        "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "pty.", "os.startfile"
    )
    seen("no process but data workers")


@each_program("S6")
def test_only_the_run_folder_is_written(watched, program, seen):
    """Every open, rename, link and removal; shared memory, and private temporary folders that are gone at the end."""
    done = watched(program)
    temporary = tuple(str(Path(tempfile.gettempdir()) / prefix) for prefix in ("tmp", "pymp-"))
    own = (str(done.project), "/dev/shm/", "/dev/null", "runs/cache")
    left = set()
    for event, what, callers in done.of("open", "os.", "shutil."):
        if any("/tempfile.py:" in caller for caller in callers):  # empties its own folder, by names relative to it
            continue
        for path in re.findall(r"b?'([^']+)'", what) or [what] * (event == "open"):
            assert path.startswith((*own, *temporary)) or path == "runs", f"{event} {what} by {callers[:4]}"
            left |= {path} if path.startswith(temporary) else set()
    assert not [path for path in left if Path(path).exists()] and not done.stray
    removed = [what for _, what, _ in done.of("shutil.rmtree", "os.rmdir")]
    assert all(any(folder in what for folder in temporary) for what in removed)
    seen("nothing in the home or the working folder; no folder removed but private temporary ones")


@each_program("S7")
def test_the_data_set_stays_as_it_was(watched, program, seen):
    assert watched(program).data_is_same
    seen("names, bytes, modes and times of change of the data set equal after each program")


@each_program("S11")
def test_nothing_is_sent(watched, program, seen):
    """What would be sent needs a socket (S3) or another program (S4); and nobody is asked whether to."""
    done = watched(program)
    assert not [note for note in done.of("socket.") if "family=2" in note[1] or "family=10" in note[1]]
    assert not re.search(
        r"telemetry|analytics|opt[- ]out|update available|new version", done.ended.out + done.ended.err, re.I
    )
    seen("none")


def test_s1_s2_s3_s4_s6_the_watch_sees_what_is_wrong(server, tmp_path):
    """A process that does each of these things once, so that a silent hook cannot pass for a silent program."""
    server.run(
        "detect.py", "--source", "x", "--weights", "y", before=misbehave, env={VARIABLE: str(tmp_path / "notes")}
    )
    events = {event for event, _, _ in read_notes(tmp_path / "notes")}
    assert {"exec", "compile", "pickle.find_class", "subprocess.Popen", "os.system", "socket.connect", "open"} <= events
    assert any(what.endswith("stray") for event, what, _ in read_notes(tmp_path / "notes") if event == "open")


@pytest.mark.parametrize("address", [pytest.param(("192.0.2.1", 80), id="S3-suite-connect")])
def test_the_suite_refuses_the_network(address):
    """``tests/conftest.py`` watches every test (192.0.2.0/24 is for examples; nobody is there)."""
    with socket.socket() as connection, pytest.raises(PermissionError, match="a test reaches for"):
        connection.connect(address)
    with pytest.raises(PermissionError):
        socket.getaddrinfo("host.invalid", 80)


# --------------------------------------------------------------------------------------------------------- archives


def tar(name: str, content: bytes = b"x", **more) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        for key, value in more.items():
            setattr(member, key, value)
        archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


OUTSIDE = Path(tempfile.gettempdir()) / "matchbox-outside.txt"  # where an absolute name would lead
ARCHIVES = {
    "S5-traversal": lambda: zipped({"../outside.txt": b"x"}),
    "S5-absolute": lambda: tar(str(OUTSIDE)),
    "S5-symlink": lambda: tar("link", b"", type=tarfile.SYMTYPE, linkname="/etc"),
    "S5-device": lambda: tar("device", b"", type=tarfile.CHRTYPE),
    "S5-bomb-by-ratio": lambda: zipped({"images/a.jpg": b"\0" * 20_000_000}),
    "S5-bomb-by-count": lambda: zipped({f"images/{number}.jpg": b"" for number in range(5000)}),
    "S5-bomb-by-size": lambda: tar("big", b"x", size=1)[:512].replace(b"00000000001 ", b"77777777777 ") + b"x" * 512,
}


@pytest.mark.parametrize("make", [pytest.param(make, id=row) for row, make in ARCHIVES.items()])
@pytest.mark.parametrize("suffix", [".zip", ".tar", ".pt", ".weights", ".safetensors", ".yaml"])
def test_no_archive_is_unpacked(tmp_path, make, suffix, seen):
    """Whatever it is called, wherever it is given; the network that a .weights would need is there."""
    file, cfg = tmp_path / f"archive{suffix}", tmp_path / "net.cfg"
    file.write_bytes(make())
    cfg.write_text(GRID)
    before = tree(tmp_path)
    for call in (
        lambda: load_network(file, cfg=cfg),
        lambda: read_dataset(file),
        lambda: read_names(file),
        lambda: read_cfg(file),
        lambda: detect.main(
            detect.parse_args(["--weights", str(file), "--cfg", str(cfg), "--source", str(tmp_path), "--device", "cpu"])
        ),
    ):
        seen(refused(call, where=str(file)).replace(str(tmp_path), "")[:100])
    assert tree(tmp_path) == before and not OUTSIDE.exists()

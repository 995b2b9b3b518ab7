"""The tutorial, command after command: on some pictures of BCCD where they are, else on generated ones."""

import re
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models.cfg import read_cfg
from models.darknet import Darknet
from models.darknet_weights import write_weights

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/faults"))

from server import Server  # noqa: E402

PAGE = ROOT / "docs/tutorial-bccd.md"
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.startswith("python ")]
SHORT = {  # what a test changes: not what is done, but how long it takes
    "train.py": ["--epochs", "1", "--img-size", "64", "--device", "cpu", "--workers", "0"],
    "test.py": ["--device", "cpu", "--workers", "0"],
    "detect.py": ["--device", "cpu"],
}
DOCTORS = {"utils.datasets.doctor", "models.doctor"}
LEAK = ("BloodImage_00037", "BloodImage_00038")  # the pictures that the page calls the same


def some_blood_cells(source: Path, folder: Path, num: int = 8) -> None:
    """BCCD with short lists."""
    for name in ("Annotations", "JPEGImages"):
        (folder / name).symlink_to(source / name)
    (folder / "ImageSets/Main").mkdir(parents=True)
    for split in ("train", "val", "test"):
        names = (source / f"ImageSets/Main/{split}.txt").read_text().split()
        chosen = sorted(names, key=lambda name: name not in LEAK)[:num]
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(chosen))


def generated_cells(server, folder: Path, made: Path, num: int = 6) -> None:
    """Discs of many sizes in the same layout; the test split repeats validation, which the doctor finds."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        (made / "images" / split).mkdir(parents=True)
        (made / "labels" / split).mkdir(parents=True)
        for number in range(num):
            image, rows = draw.integers(180, 255, (96, 128, 3), dtype=np.uint8), []
            for radius, x, y in draw.integers((6, 24, 24), (20, 104, 72), (4, 3)).tolist():
                cv2.circle(image, (x, y), radius, (60, 60, 200), -1)
                rows.append(f"{radius > 12:d} {x / 128} {y / 96} {radius / 64} {radius / 48}\n")
            cv2.imwrite(str(made / "images" / split / f"{number}.png"), image)
            (made / "labels" / split / f"{number}.txt").write_text("".join(rows))
    (made / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [RBC, WBC]\n")
    folder.rmdir()
    done = server.run("utils.datasets.convert", made / "data.yaml", folder, "--format", "voc")
    assert done.code == 0, done.err
    shutil.copy(folder / "ImageSets/Main/val.txt", folder / "ImageSets/Main/test.txt")


@pytest.fixture
def server(tmp_path_factory) -> Server:
    return Server(tmp_path_factory.mktemp("server"))


@pytest.fixture
def checkout(server, tmp_path, pytestconfig) -> Path:
    """A folder in which the commands find what they name: cfgs, weights, data."""
    cells, data_dir = tmp_path / "datasets/bccd", pytestconfig.getoption("--data-dir")
    cells.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data/bccd.yaml", tmp_path / "data")
    (tmp_path / "cfg").symlink_to(ROOT / "cfg")
    if (data_dir / "bccd").is_dir():
        some_blood_cells(data_dir / "bccd", cells)
    else:
        generated_cells(server, cells, tmp_path / "made")
    torch.manual_seed(0)
    write_weights(Darknet(read_cfg(ROOT / "cfg/yolo-fastest-1.1.cfg")), tmp_path / "yolo-fastest-1.1.weights")
    return tmp_path


def test_every_command_runs(server, checkout):
    for command in COMMANDS:
        program, *flags = [word for word in shlex.split(command)[1:] if word != "-m"]
        if program == "models.export" and not find_spec("onnxscript"):
            continue  # an optional package, which the page names
        done = server.run(program, *flags, *SHORT.get(program, []), cwd=checkout, timeout=200)
        assert done.code == (3 if program in DOCTORS else 0), f"{command}\n{done.out}{done.err}"
        assert "Traceback" not in done.err
    run = checkout / "runs/train/bccd"
    promised = [checkout / "bccd-tiny.cfg", run / "report.html", run / "weights/best.weights", run / "network.cfg"]
    promised += [checkout / "runs/doctor" / name / "report.html" for name in ("exp", "exp2")]
    promised += [run / "weights/best.onnx"] if find_spec("onnxscript") else []
    assert not [path for path in promised if not path.exists()]
    assert any((checkout / "runs/detect/bccd").iterdir())

"""Text that is made to hurt: names that drive a terminal or forge a line, lines that take quadratic time."""

import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from grid_network import CFG as GRID
from grid_network import grid_network, write_grid_network
from harness import refused

import detect
from models.cfg import parse_cfg
from models.graph import build_graph
from models.loading import load_network
from utils.arguments import class_numbers
from utils.checkpoint import with_prefix, write_checkpoint
from utils.config import read_yaml
from utils.datasets.records import read_dataset, read_names
from utils.errors import UNPRINTABLE, UserError
from utils.logger import read_rows

# ------------------------------------------------------------------------------------------------------ what is printed

HOSTILE = {
    "S12-ansi": "a\x1b[2Jb",
    "S12-newline": "a\nerror: b",
    "S12-return": "a\rb",
    "S12-csi": "a\x9bb",
    "S12-separator": "a\u2028b",
}


def is_one_line(text: str) -> bool:
    return UNPRINTABLE.search(text) is None


@pytest.fixture(params=[pytest.param(name, id=row) for row, name in HOSTILE.items()])
def hostile(request):
    return request.param


def test_an_error_is_one_line_whatever_it_quotes(tmp_path, hostile):
    """File names, keys, values, class names: by each reader."""
    bad = tmp_path / f"{hostile}.txt"
    bad.write_text("?", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text(f'train: images\n"{hostile.encode("unicode_escape").decode()}": 1\nnames: [a]\n')
    (tmp_path / "names.yaml").write_text(f'train: .\nnames: ["{hostile.encode("unicode_escape").decode()}"]\n')
    for call in (
        lambda: UserError(bad, f"found {hostile}", hostile),
        lambda: read_dataset(bad),
        lambda: load_network(bad),
        lambda: read_dataset(tmp_path / "bad.yaml"),
        lambda: read_dataset(tmp_path / "names.yaml"),
        lambda: build_graph(parse_cfg(f"[net]\n{hostile}=1\n[{hostile}]\n", "my.cfg")),
        lambda: build_graph(
            parse_cfg(f"[net]\nchannels={hostile}\n[convolutional]\nactivation={hostile}\n", f"{hostile}.cfg")
        ),
        lambda: class_numbers([hostile], ["a"]),
    ):
        try:
            error = call()
        except UserError as caught:
            error = caught
        assert isinstance(error, UserError)
        lines = str(error).split("\n")
        assert all(map(is_one_line, lines)) and (len(lines) == 1 or all(".cfg:" in line for line in lines))


def test_a_bad_picture_is_told_on_one_line(tmp_path, hostile, capsys, seen):
    """detect's warnings, a data set's summary and quarantine, names of result files."""
    write_grid_network(tmp_path / "net.safetensors")
    (tmp_path / "images/train").mkdir(parents=True)
    good = cv2.imencode(".png", np.full((64, 64, 3), 100, np.uint8))[1].tobytes()
    (tmp_path / f"images/train/{hostile}.png").write_bytes(b"no picture")
    (tmp_path / f"images/train/good {hostile}.png").write_bytes(good)
    arguments = [
        "--weights",
        tmp_path / "net.safetensors",
        "--source",
        tmp_path / "images/train",
        "--project",
        tmp_path / "runs",
    ]
    detect.main(detect.parse_args(list(map(str, [*arguments, "--device", "cpu", "--save-txt", "--save-json"]))))
    said = capsys.readouterr()
    told = [line for line in said.out.splitlines() if line.startswith("warning: ")]
    assert len(told) == 1 and all(map(is_one_line, (said.out + said.err).split("\n")[:-1]))
    assert all(is_one_line(file.name) for file in (tmp_path / "runs/exp").rglob("*"))
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / f"labels/train/good {hostile}.txt").write_text("0 .5 .5 .2 .2\n9 .5 .5 .2 .2\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [a]\n")
    data = read_dataset(tmp_path / "data.yaml")
    assert len(data.problems) >= 2
    for text in (*data.summary().split("\n"), *map(str, data.problems)):
        assert is_one_line(text)
    seen(told[0].replace(str(tmp_path), ""))


def test_class_names_of_a_checkpoint(tmp_path, hostile, seen):
    path = tmp_path / "net.safetensors"
    write_checkpoint(path, with_prefix("model", grid_network().state_dict()), {"cfg": GRID, "names": ["a", hostile]})
    seen(refused(lambda: load_network(path), where=str(path), says="class name").replace(str(tmp_path), ""))


# -------------------------------------------------------------------------------- time grows with the input


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def label_set(folder: Path, text: str):
    """A picture with this label file."""
    for name in ("images/train", "labels/train"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / "images/train/a.png"), np.zeros((32, 32, 3), np.uint8))
    write(folder / "labels/train/a.txt", text)
    return write(folder / "data.yaml", "train: images/train\nnames: [a]\n")


PICTURE = '{"images": [{"id": 1, "file_name": "images/train/a.png"}], "categories": [{"id": 1, "name": "a"}]'
BOX = '{"id": %d, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}'


def coco_of(num: int) -> str:
    return PICTURE + ', "annotations": [' + ", ".join(BOX % number for number in range(num)) + "]}"


READERS = {
    "cfg": lambda folder, text: parse_cfg(text),
    "label": lambda folder, text: read_dataset(label_set(folder, text)),
    "names": lambda folder, text: read_names(write(folder / "a.names", text)),
    "list": lambda folder, text: read_dataset(write(folder / "a.txt", text)),
    "data": lambda folder, text: read_dataset(write(folder / "a.data", text)),
    "yaml": lambda folder, text: read_yaml(write(folder / "a.yaml", text)),
    "json": lambda folder, text: read_dataset(write(label_set(folder, "").with_name("a.json"), text)),
    "log": lambda folder, text: read_rows(write(folder / "log.jsonl", text)),
}
LINEAR = {  # reader-what: text of about n bytes; less where a reader is slow by nature
    "S13-cfg-digits": lambda n: "[net]\nwidth=" + "1" * n,
    "S13-cfg-comment": lambda n: "[net]\nwidth=32 #" + " #;" * (n // 3),
    "S13-cfg-spaces": lambda n: "[net]\nwidth=32" + " " * n + "x",
    "S13-cfg-commas": lambda n: "[net]\nwidth=32\n[route]\nlayers=" + "1 , " * (n // 4),
    "S13-cfg-header": lambda n: "[" * n,
    "S13-cfg-keys": lambda n: "[net]\n" + "".join(f"k{i}=1\n" for i in range(n // 70)),
    "S13-cfg-sections": lambda n: "[net]\n" + "[route]\n" * (n // 70),
    "S13-label-digits": lambda n: "0 .5 .5 .5 " + "1" * n,
    "S13-label-columns": lambda n: "0 " + ".5 " * (n // 3),
    "S13-label-spaces": lambda n: "0 .5 .5 .5 .5" + " " * n + "x",
    "S13-label-rows": lambda n: "".join(f"0 .5 .5 .{i + 1:06d} .5\n" for i in range(n // 110)),
    "S13-names-lines": lambda n: "".join(f"name {i}\n" for i in range(n // 40)),
    "S13-names-line": lambda n: "x" * n + "\n",
    "S13-list-lines": lambda n: "".join(f"gone {i}.png\n" for i in range(n // 100)),
    "S13-data-line": lambda n: "classes=1\ntrain=" + "x" * n,
    "S13-yaml-scalar": lambda n: "train: " + "x " * (n // 8),
    "S13-yaml-keys": lambda n: "".join(f"k{i}: 1\n" for i in range(n // 400)),
    "S13-yaml-brackets": lambda n: "train: " + "[" * (n // 100),
    "S13-json-rows": lambda n: coco_of(n // 100),
    "S13-json-string": lambda n: '{"images": "' + "\\\\" * (n // 2),
    "S13-log-lines": lambda n: "".join(f'{{"epoch": {i}}}\n' for i in range(n // 20)),
    "S13-log-line": lambda n: '{"epoch": "' + "x" * n,
}


def seconds(read, folder: Path, text: str) -> float:
    """Of the processor, the least of three."""
    spent = []
    for _ in range(3):
        start = time.process_time()
        try:
            read(folder, text)
        except UserError:
            pass
        spent.append(time.process_time() - start)
    return min(spent)


@pytest.mark.parametrize("what, make", [pytest.param(row.split("-")[1], make, id=row) for row, make in LINEAR.items()])
def test_time_grows_with_the_input(tmp_path, what, make, seen):
    """Ten times as much takes at most 15 times as long; what takes no time at all is not compared."""
    for _ in range(4):  # a busy machine is no fault of ours
        small, large = (seconds(READERS[what], tmp_path, make(n)) for n in (100_000, 1_000_000))
        if large <= 15 * max(small, 0.002):
            break
    assert large <= 15 * max(small, 0.002), f"{small:.4f} s, ten times as much {large:.4f} s"
    seen("ten times as much takes at most 15 times as long")

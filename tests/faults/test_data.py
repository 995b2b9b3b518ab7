"""Rows D1 to D25: data files, paths, and the formats of annotations."""

import json
import multiprocessing
import os
import pickle
import random
import string
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from harness import refused

from tests.utils.datasets.painted import paint_records
from tests.utils.datasets.sets import (
    GOOD,
    GOOD_ANNOTATION,
    H,
    W,
    coco_set,
    picture,
    tree_hash,
    write,
    yolo_set,
)
from utils.datasets.augment import Augment
from utils.datasets.cache import build_cache
from utils.datasets.dataset import DetectionDataset
from utils.datasets.formats.yolo import label_paths
from utils.datasets.limits import Limits
from utils.datasets.loader import Draw
from utils.datasets.records import read_dataset
from utils.datasets.splits import build_loaders, read_splits

# ------------------------------------------------------------------------------------------------------------- the yaml

BOMB = "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else '1'] * 9)}]\n" for n in range(9))
REFUSED = {  # id -> (lines after the first, line that is told, what is said)
    "D1-object": ("names: !!python/object/apply:os.system ['touch SENTINEL']\n", 2, "tags"),
    "D1-name": ("names: !!python/name:os.system\n", 2, "tags"),
    "D3-alias": ("a: &a [1, 1]\nb: &b [*a, *a]\nnames: [*b]\n", 3, "aliases"),
    "D3-bomb": (
        "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else '1'] * 9)}]\n" for n in range(9)),
        3,
        "alias",
    ),
    "D4-brackets": ("names: " + "[" * 5000, 2, "nested deeper than 20"),
    "D4-braces": ("names: " + "{a: " * 5000, 2, "nested deeper than 20"),
    "D4-dashes": ("names:\n" + "- " * 5000 + "a\n", 3, "nested deeper than 20"),
    "D5": ("nc: 2\nnames: [cat, dog]\nnc: 3\n", 4, "'nc' is given twice, first on line 2"),
    "D6-yes": ("names: [yes, cat]\n", 2, "True (quote it)"),
    "D6-no": ("names: [cat, no]\n", 2, "False (quote it)"),
    "D6-octal": ("names: [012, cat]\n", 2, "10 (quote it)"),
    "D6-float": ("names: [1.0, cat]\n", 2, "1.0 (quote it)"),
    "D6-null": ("names: [null, cat]\n", 2, "None (quote it)"),
    "D6-in-a-map": ("names: {0: cat, 1: off}\n", 2, "False (quote it)"),
    "D7-tabs": ("names:\n\t- cat\n", 3, "not YAML"),
    "D7-windows-path": ('names: [cat]\npath: "C:\\data\\pictures"\n', 3, "not YAML"),
    "D8-nc": ("nc: 3\nnames: [cat, dog]\n", 2, "nc is 3, but there are 2 names"),
    "D8-nc-word": ("nc: two\nnames: [cat, dog]\n", 2, "nc is 'two'"),
    "D8-holes": ("names: {0: cat, 2: dog}\n", 2, "ids must run from 0 to 1"),
    "D8-empty": ("names: []\n", 2, "expected a list of class names"),
    "D8-line-end": ('names: ["cat\\nfish", dog]\n', 2, "text of one line"),
}


@pytest.mark.parametrize("yaml, line, says", [pytest.param(*values, id=row) for row, values in REFUSED.items()])
def test_a_wrong_yaml_is_refused_with_its_line(tmp_path, monkeypatch, seen, yaml, line, says):
    monkeypatch.chdir(tmp_path)
    path = yolo_set(tmp_path, {"a": GOOD}, yaml)
    before = tree_hash(tmp_path)
    seen(refused(lambda: read_dataset(path), where=f"{path}:{line}: ", says=says))
    assert tree_hash(tmp_path) == before


@pytest.mark.parametrize(
    "text, says",
    [
        pytest.param("", "an empty file", id="D7-empty"),
        pytest.param("- a\n- b\n", "a list", id="D7-list"),
        pytest.param(b"train: \xff\xfe", "not UTF-8", id="D7-latin1"),
        pytest.param("train: images/train\nnc: 2\n", "no 'names:'", id="D8-no-names"),
    ],
)
def test_a_yaml_that_says_nothing(tmp_path, seen, text, says):
    path = write(tmp_path / "data.yaml", text)
    seen(refused(lambda: read_dataset(path), where=str(path), says=says))


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("'import os; os.system(\"touch SENTINEL\")'", id="D2-python"),
        pytest.param("touch SENTINEL", id="D2-bash"),
        pytest.param("http://127.0.0.1:9/data.zip", id="D2-address"),
    ],
)
def test_download_is_ignored(tmp_path, monkeypatch, seen, value):
    monkeypatch.chdir(tmp_path)
    path = yolo_set(tmp_path, {"a": GOOD}, f"names: [cat]\ndownload: {value}\n")
    before = tree_hash(tmp_path)
    data = read_dataset(path)
    assert tree_hash(tmp_path) == before and len(data.records) == 1
    assert "'download' is ignored" in data.summary() and "data.yaml:3" in data.summary()
    seen("'download' is ignored: nothing is fetched or run")


def test_d8_double_names_are_told(tmp_path):
    data = read_dataset(yolo_set(tmp_path, {"a": GOOD}, "names: [cat, cat]\n"))
    assert data.names == ("cat", "cat") and "two classes have the same name" in data.summary()


# ------------------------------------------------------------------------------------------------- where pictures lie


def garbage(folder: Path) -> None:
    write(folder / "here", random.Random(0).randbytes(1000))


@pytest.mark.parametrize(
    "make, says",
    [
        pytest.param(lambda folder: None, "no such folder or list", id="D9-missing"),
        pytest.param(garbage, "neither a folder nor a list of pictures", id="D9-garbage"),
        pytest.param(lambda folder: (folder / "here").mkdir(), "no picture found", id="D9-empty"),
        pytest.param(lambda folder: write(folder / "here", ""), "no picture found", id="D9-empty-list"),
        pytest.param(lambda folder: os.mkfifo(folder / "here"), "not an ordinary file", id="D9-pipe"),
    ],
)
def test_a_split_that_is_nothing(tmp_path, seen, make, says):
    make(tmp_path)
    path = write(tmp_path / "data.yaml", "names: [cat]\ntrain: here\n")
    text = refused(lambda: read_dataset(path), where=f"{path}:2: ", says=says)
    assert str(tmp_path / "here") in text
    seen(text.replace(str(tmp_path), ""))


@pytest.mark.parametrize("kind", [pytest.param("same folder", id="D10-same"), pytest.param("copies", id="D10-copies")])
def test_pictures_in_both_splits(tmp_path, capsys, seen, kind):
    yaml = "val: images/train\nnames: [cat, dog]\n"
    if kind == "copies":
        yaml = "val: images/val\nnames: [cat, dog]\n"
        for shade in (1, 2):
            picture(tmp_path / "images" / "val" / f"{shade}.png", shade=shade)
            write(tmp_path / "labels" / "val" / f"{shade}.txt", GOOD)
    path = yolo_set(tmp_path, {"a": GOOD, "b": GOOD, "c": GOOD}, yaml)
    for shade, name in enumerate("abc", 2):  # a is a copy of val/2.png
        picture(tmp_path / "images" / "train" / f"{name}.jpg", shade=shade)
    num = 1 if kind == "copies" else 3
    assert len(read_splits(path).train) == 3
    assert f"{num} training pictures are validation pictures, too" in capsys.readouterr().out
    seen(refused(lambda: read_splits(path, limits=Limits(max_bad=0)), where=str(path), says=f"{num} training"))


def test_splits_with_other_classes_are_refused(tmp_path):
    """A COCO file per split, of which one lacks a category: every label behind it would mean something else."""
    coco_set(tmp_path, [GOOD_ANNOTATION])
    data = json.loads((tmp_path / "instances.json").read_text())
    write(tmp_path / "val.json", json.dumps(data | {"categories": data["categories"][:1]}))
    yaml = "format: coco\nannotations: {train: instances.json, val: val.json}\n"
    refused(
        lambda: read_splits(write(tmp_path / "data.yaml", yaml)), says="the training split has the classes cat, dog"
    )


def test_d11_d12_only_the_last_images_folder_and_the_suffix_change():
    rng, parts = random.Random(0), ["images", "jpgset", "png.d", "JPEGImages", "x.jpg", "labels", "my images", "图"]
    for _ in range(500):
        folders = rng.choices(parts, k=rng.randrange(1, 6))
        name = rng.choice(["a", "a.b", ".a", "jpg", "images"])
        suffix = rng.choice([".jpg", ".PNG", ".jpeg"])
        found = next(label_paths(Path("/", *folders, name + suffix)))
        expected = list(folders)
        for word in ("images", "JPEGImages"):
            if word in folders:
                expected[len(folders) - 1 - folders[::-1].index(word)] = "labels"
                break
        assert found == Path("/", *expected, f"{name}.txt")


NAMES = {
    "D13-spaces": "two  words ",
    "D13-quotes": 'it\'s "quoted"',
    "D13-nfc": unicodedata.normalize("NFC", "été"),
    "D13-nfd": unicodedata.normalize("NFD", "été"),
    "D13-line-end": "two\nlines",
    "D13-255-bytes": "x" * 251,
    "D13-leading-dot": ".hidden",
    "D13-two-dots": "a.b.c",
    "D13-no-text": os.fsdecode(b"\xff\xfe"),
    "D13-escape": "\x1b[31mred",
}


@pytest.mark.parametrize("name", [pytest.param(name, id=row) for row, name in NAMES.items()])
@pytest.mark.parametrize("suffix", [".jpg", ".JPG"])
def test_odd_names(tmp_path, capsys, name, suffix):
    path = yolo_set(tmp_path, {"good": GOOD})
    picture(tmp_path / "images" / "train" / f"{name}{suffix}")
    write(tmp_path / "labels" / "train" / f"{name}.txt", GOOD + "0 1\n")
    data = read_dataset(path)
    assert sorted(len(record.labels) for record in data.records) == [1, 1]
    (problem,) = data.problems
    assert str(problem).isprintable() and problem.where.endswith(".txt:2")
    print(data.summary())
    assert capsys.readouterr().out.encode("utf-8").count(b"\x1b") == 0
    dataset = DetectionDataset(data.records)
    assert dataset[Draw(0, 0, 0, (32, 32))] is not None and dataset[Draw(0, 0, 1, (32, 32))] is not None


LISTS = {
    "D14-windows": "images\\train\\a.jpg\nimages\\train\\b.jpg\n",
    "D14-crlf": "images/train/a.jpg\r\nimages/train/b.jpg\r\n",
    "D14-bom": "\ufeffimages/train/a.jpg\nimages/train/b.jpg",
    "D14-spaces": "images/train/a.jpg   \n  images/train/b.jpg\t\n",
    "D14-blank": "\n\nimages/train/a.jpg\n\nimages/train/b.jpg\n\n",
    "D15-dot": "./images/train/a.jpg\n./images/train/b.jpg\n",
    "D15-up": "../SET/images/train/a.jpg\n../SET/images/train/b.jpg\n",
    "D13-list-spaces": "images/train/a.jpg\nimages/train/b.jpg\nimages/train/c d.jpg\n",
}


@pytest.mark.parametrize("text", [pytest.param(text, id=row) for row, text in LISTS.items()])
def test_lists(tmp_path, monkeypatch, text):
    monkeypatch.chdir("/")
    yolo_set(tmp_path, {"a": GOOD, "b": GOOD, "c d": GOOD})
    write(tmp_path / "list.txt", text.replace("SET", tmp_path.name))
    data = read_dataset(write(tmp_path / "listed.yaml", "train: list.txt\nnames: [cat]\n"))
    assert data.problems == [] and data.num_boxes == len(data.records) == text.count(".jpg")


@pytest.mark.parametrize(
    "line", [pytest.param("images/train/gone.jpg", id="D16"), pytest.param("C:\\data\\gone.jpg", id="D14-drive")]
)
def test_a_listed_picture_that_is_not_there(tmp_path, seen, line):
    yolo_set(tmp_path, {"a": GOOD})
    write(tmp_path / "list.txt", f"images/train/a.jpg\n{line}\n")
    data = read_dataset(write(tmp_path / "listed.yaml", "train: list.txt\nnames: [cat]\n"))
    (problem,) = data.problems
    assert problem.action == "picture quarantined" and len(data.records) == 1 and "gone.jpg" in problem.path
    seen(f"{problem.reason}: {problem.found}")


def test_d15_a_list_counts_before_the_data_set(tmp_path):
    yolo_set(tmp_path, {"a": GOOD})
    picture(tmp_path / "lists" / "images" / "train" / "a.jpg", size=(10, 20))
    write(tmp_path / "lists" / "list.txt", "images/train/a.jpg\n")
    data = read_dataset(write(tmp_path / "listed.yaml", "train: [lists/list.txt, images]\nnames: [cat]\n"))
    assert [record.size for record in data.records] == [(10, 20), (H, W)]


def test_d17_doubles(tmp_path, seen):
    yolo_set(tmp_path, {"a": GOOD, "b": GOOD})
    picture(tmp_path / "images" / "train" / "a.png")
    data = read_dataset(write(tmp_path / "twice.yaml", "train: [images/train, images]\nnames: [cat]\n"))
    reasons = {problem.reason: problem.found for problem in data.problems}
    assert len(data.records) == 3 and all(problem.action == "kept" for problem in data.problems)
    assert reasons["pictures named more than once"].startswith("3, ")
    assert reasons["pictures that share one label file"].startswith("2, ")
    seen("; ".join(reasons))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda path: path.symlink_to(path), id="D18-loop"),
        pytest.param(lambda path: path.symlink_to("nowhere"), id="D18-dangling"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), id="D18-device"),
        pytest.param(os.mkfifo, id="D18-pipe"),
        pytest.param(os.mkdir, id="D18-folder"),
    ],
)
def test_what_is_no_file_is_never_opened(tmp_path, seen, make):
    yolo_set(tmp_path, {"a": GOOD})
    make(tmp_path / "images" / "train" / "x.jpg")
    write(tmp_path / "list.txt", "images/train/a.jpg\nimages/train/x.jpg\n")
    data = read_dataset(write(tmp_path / "listed.yaml", "train: list.txt\nnames: [cat]\n"))
    assert len(data.records) == 1
    (problem,) = data.problems
    assert problem.action == "picture quarantined"
    seen(problem.found)
    assert len(read_dataset(write(tmp_path / "folder.yaml", "train: images\nnames: [cat]\n")).records) == 1


def test_d18_a_link_to_elsewhere_is_a_picture(tmp_path):
    path = yolo_set(tmp_path / "set", {"a": GOOD, "b": GOOD})
    outside = picture(tmp_path / "outside.png")
    (tmp_path / "set/images/train/b.jpg").unlink()
    (tmp_path / "set/images/train/b.jpg").symlink_to(outside)
    assert read_dataset(path).num_boxes == 2


@pytest.mark.parametrize("kind", ["none", "ram", "disk"])
def test_d19_nothing_is_written_beside_the_data(tmp_path, kind):
    """Names, bytes and times of change are the same after reading, caching and training batches."""
    path = yolo_set(tmp_path / "set", {name: GOOD for name in "abcd"}, "val: images/train\nnames: [cat, dog]\n")
    for file in (tmp_path / "set").rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    before = tree_hash(tmp_path / "set")
    data = read_splits(path)
    cache = None
    if kind != "none":
        cache = build_cache(kind, data.train, max_side=64, folder=tmp_path / "runs")
    dataset = DetectionDataset(data.train, augment=Augment(mosaic=1), cache=cache)
    for index in range(4):
        dataset[Draw(0, index, index, (64, 64), (0, 1, 2, 3))]
    assert tree_hash(tmp_path / "set") == before


# ------------------------------------------------------------------------------------------------------------ the cache


def caches(tmp_path):
    """Records and a cache of them on the disk."""
    records = paint_records(tmp_path, 3)
    build_cache("disk", records, max_side=64, folder=tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("images.npy")
    return records, file


def test_d20_labels_are_read_anew(tmp_path):
    path = yolo_set(tmp_path, {"a": GOOD})
    assert read_dataset(path).records[0].labels.tolist() == [0]
    file = tmp_path / "labels" / "train" / "a.txt"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text(GOOD.replace("0", "1", 1))
    os.utime(file, ns=times)
    assert read_dataset(path).records[0].labels.tolist() == [1]


def test_d20_a_replaced_picture_is_decoded_anew(tmp_path):
    """Of the same size, with the same number of bytes and the same time of change."""
    records, _ = caches(tmp_path)
    picture_file = Path(records[0].path)
    state = picture_file.stat()
    new = tmp_path / "new.png"
    image = cv2.imread(str(picture_file))
    for value in range(256):  # until a picture has as many bytes
        image[0, 0] = value
        cv2.imwrite(str(new), image)
        if new.stat().st_size == state.st_size and new.read_bytes() != picture_file.read_bytes():
            break
    assert new.stat().st_size == state.st_size
    new.replace(picture_file)
    os.utime(picture_file, ns=(state.st_atime_ns, state.st_mtime_ns))
    again = build_cache("disk", records, max_side=64, folder=tmp_path / "cache")
    assert np.array_equal(again[0][0, 0], image[0, 0])


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("SENTINEL"),)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(pickle.dumps(Bomb()), id="D21-pickle"),
        pytest.param(b"", id="D21-empty"),
        pytest.param(random.Random(0).randbytes(5000), id="D21-garbage"),
        pytest.param(b"\x93NUMPY\x01\x00" + b"\xff" * 200, id="D21-header"),
        pytest.param("object", id="D21-array-of-objects"),
        pytest.param("short", id="D21-short"),
    ],
)
def test_a_poisoned_cache_is_made_anew(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    records, file = caches(tmp_path)
    good = file.read_bytes()
    if data == "object":
        np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    elif data == "short":
        np.save(file, np.zeros(7, np.uint8))
    else:
        file.write_bytes(data)
    cache = build_cache("disk", records, max_side=64, folder=tmp_path / "cache")
    assert file.read_bytes() == good and not Path("SENTINEL").exists() and len(cache) == 3


def _build(folder: Path, gate, answers) -> None:
    records = paint_records(folder, 0) or read_dataset(folder / "set" / "data.yaml").records
    gate.wait()
    cache = build_cache("disk", records, max_side=64, folder=folder / "cache")
    answers.put(int(sum(cache[index].sum() for index in range(len(cache)))))


def test_d22_two_runs_build_one_cache(tmp_path):
    yolo_set(tmp_path / "set", {name: GOOD for name in string.ascii_lowercase})
    context = multiprocessing.get_context("fork")
    gate, answers = context.Barrier(2), context.Queue()
    both = [context.Process(target=_build, args=(tmp_path, gate, answers)) for _ in range(2)]
    for process in both:
        process.start()
    sums = [answers.get(timeout=30) for _ in both]
    for process in both:
        process.join(30)
    assert sums[0] == sums[1] == 26 * H * W * 3 * 90 and [process.exitcode for process in both] == [0, 0]
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == ["images.npy"]


# ------------------------------------------------------------------------------------------------------------- too few


@pytest.mark.parametrize("num", [pytest.param(1, id="D23-one"), pytest.param(3, id="D23-fewer-than-a-batch")])
def test_few_pictures_train(tmp_path, num):
    labels = {f"p{number}": GOOD for number in range(num)}
    data = read_splits(yolo_set(tmp_path, labels, "val: images/train\nnames: [cat, dog]\n"))
    loaders = build_loaders(
        data, Augment(mosaic=1, mixup=1), batch_size=16, size=(64, 64), stride=32, channels=3, stretch=False,
        rect=False, balance=False, cache=None, seed=0, epochs=3, workers=0, pin_memory=False,
    )  # fmt: skip
    for loader in loaders:
        assert [len(batch) for batch in loader] == [num]


def test_d23_no_picture_and_no_label(tmp_path, seen):
    (tmp_path / "images" / "train").mkdir(parents=True)
    path = write(tmp_path / "data.yaml", "train: images/train\nnames: [cat]\n")
    seen(refused(lambda: read_dataset(path), where=f"{path}:1", says="no picture found"))
    yolo_set(tmp_path, {"a": None})
    refused(lambda: read_dataset(path), where=f"{path}:1", says="none of 1 pictures has a label file")

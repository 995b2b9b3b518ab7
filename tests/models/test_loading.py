"""From files to a network: every kind of file, the names of its classes, and what does not belong together."""

import pytest
import torch
from grid_network import CFG, NAMES, grid_network, write_grid_network

from models import loading
from models.loading import find_file, input_size, load_network, stretches
from utils.checkpoint import with_prefix, write_checkpoint
from utils.errors import UserError


def same(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_knows_everything(tmp_path):
    loaded = load_network(str(write_grid_network(tmp_path / "net.safetensors")))
    assert loaded.names == NAMES and loaded.meta["names"] == NAMES and not loaded.model.training
    assert same(loaded.model, grid_network())


def test_the_average_is_preferred(tmp_path):
    plain, average = grid_network(), grid_network()
    with torch.no_grad():
        next(average.parameters()).fill_(7)
    tensors = with_prefix("model", plain.state_dict()) | with_prefix("ema", average.state_dict())
    write_checkpoint(tmp_path / "x.safetensors", tensors, {"cfg": CFG, "names": NAMES})
    assert same(load_network(tmp_path / "x.safetensors").model, average)


def test_another_cfg_of_the_same_network(tmp_path):
    write_grid_network(tmp_path / "net.safetensors")
    (tmp_path / "wide.cfg").write_text(CFG.replace("width=64", "width=128"))
    loaded = load_network(tmp_path / "net.safetensors", cfg=tmp_path / "wide.cfg")
    assert loaded.model.size == (64, 128) and loaded.names == NAMES


@pytest.mark.parametrize("kind", ["weights", "pt"])
def test_files_that_need_a_cfg(tmp_path, kind):
    write_grid_network(tmp_path / "net.weights")
    torch.save(grid_network().state_dict(), tmp_path / "net.pt")
    path = tmp_path / f"net.{kind}"
    loaded = load_network(path, cfg=tmp_path / "net.cfg", names=["cat", "dog"])
    assert same(loaded.model, grid_network()) and loaded.names == ["cat", "dog"] and loaded.meta == {}
    assert load_network(path, cfg=tmp_path / "net.cfg").names == ["class0", "class1"]
    with pytest.raises(UserError, match=r"do not say which network they belong to \(add --cfg"):
        load_network(path)
    with pytest.raises(UserError, match=r"not for the 3 classes that are named: ") as caught:
        load_network(path, cfg=tmp_path / "net.cfg", names=["a", "b", "c"])
    assert "\n" not in str(caught.value) and f"train.py --weights {path} starts from it" in caught.value.hint


def test_a_cfg_with_the_wrong_class_count_follows_the_names(tmp_path):
    """80 classes in the cfg somebody started from, 2 in the network trained with it."""
    write_grid_network(tmp_path / "net.weights")
    cfg = CFG.replace("classes=2", "classes=80").replace("filters=14", "filters=170")
    (tmp_path / "net.cfg").write_text(cfg)
    assert same(load_network(tmp_path / "net.weights", cfg=tmp_path / "net.cfg", names=NAMES).model, grid_network())


@pytest.mark.parametrize(
    "names, place",
    [(["square"], 1), (["bar", "square"], 0), (["Square", "bar"], 0), ([*NAMES, *map(str, range(80))], 2)],
)
def test_names_of_a_checkpoint_are_binding(tmp_path, names, place):
    path = write_grid_network(tmp_path / "net.safetensors")
    with pytest.raises(
        UserError,
        match=rf"trained on the classes square, bar; asked for are .*part at class {place}: .*spelling and order",
    ) as caught:
        load_network(path, names=names)
    assert ("a data yaml with 'format: voc' and 'names:'" in caught.value.hint) == (names == sorted(NAMES))
    assert len(caught.value.message) < 120 and ("82 in all" in caught.value.message) == (len(names) > 6)


def test_another_network(tmp_path):
    write_grid_network(tmp_path / "net.safetensors")
    torch.save(grid_network().state_dict(), tmp_path / "net.pt")
    (tmp_path / "other.cfg").write_text(CFG.replace("filters=4", "filters=8"))
    for name in ("net.safetensors", "net.pt"):
        with pytest.raises(UserError, match=rf"{name}: .*(another network|does not fill)") as caught:
            load_network(tmp_path / name, cfg=tmp_path / "other.cfg")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff\xd8\xff\xe0JFIF", b"PK\x03\x04"])
def test_files_that_are_no_weights(tmp_path, content):
    (tmp_path / "net.weights").write_bytes(content)
    (tmp_path / "net.cfg").write_text(CFG)
    with pytest.raises(UserError, match=r"net\.weights: "):
        load_network(tmp_path / "net.weights", cfg=tmp_path / "net.cfg")


def test_plain_names_are_found_in_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("yolov3-tiny.cfg", "cfg") == loading.ROOT / "cfg" / "yolov3-tiny.cfg"
    assert find_file("coco.names", "names file") == loading.ROOT / "data" / "coco.names"
    (tmp_path / "yolov3-tiny.cfg").write_text(CFG)
    assert find_file("yolov3-tiny.cfg", "cfg").resolve() == (tmp_path / "yolov3-tiny.cfg").resolve(), "the nearest one"
    with pytest.raises(UserError, match=r"^x/yolov3\.cfg: no such cfg \(looked for [^ ]*x/yolov3\.cfg\)$"):
        find_file("x/yolov3.cfg", "cfg")
    with pytest.raises(UserError, match=r"looked for .* and .*weights/none\.weights"):
        find_file("none.weights", "weights file")


def test_input_size():
    model = grid_network()
    assert input_size(None, model) == (64, 64)
    assert input_size([96], model) == (96, 96) and input_size([32, 96], model) == (32, 96)
    for wanted, hint in ((60, "64 64"), (1, "16 16")):
        with pytest.raises(UserError, match=rf"no multiple of the network's stride 16 \(try {hint}\)"):
            input_size([wanted], model)
    with pytest.raises(UserError, match="found 3 numbers"):
        input_size([64, 64, 64], model)


@pytest.mark.parametrize(
    "letter_box, wanted, expected",
    [(None, None, True), (0, None, True), (1, None, False), (1, "stretch", True), (0, "letterbox", False)],
)
def test_how_pictures_are_fitted(letter_box, wanted, expected):
    """Darknet stretches unless the cfg says letter_box=1; a flag decides over both."""
    line = "" if letter_box is None else f"letter_box={letter_box}\n"
    assert stretches(wanted, grid_network(CFG.replace("[net]\n", f"[net]\n{line}"))) is expected

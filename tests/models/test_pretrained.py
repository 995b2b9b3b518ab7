"""Starting from other weights: what is taken, what is said about the rest, and what is refused."""

import os
import pickle
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch

from models.cfg import adapt_classes, parse_cfg, read_cfg
from models.darknet import Darknet
from models.darknet_weights import arrays_of, write_weights
from models.pretrained import load_pretrained
from utils.checkpoint import with_prefix, write_checkpoint
from utils.errors import UserError

CFG = """
[net]
width=32
height=32
channels=3
[convolutional]
batch_normalize=1
filters=8
size=3
stride=4
pad=1
activation=leaky
[convolutional]
batch_normalize=1
filters=16
size=3
stride=2
pad=1
activation=leaky
[convolutional]
filters=16
size=1
activation=linear
[yolo]
mask=0,1
anchors=4,5, 9,8
classes=3
num=2
"""


def network(classes: int = 3, seed: int = 0) -> Darknet:
    torch.manual_seed(seed)
    model = Darknet(adapt_classes(parse_cfg(CFG, "net.cfg"), classes)[0])
    for array in arrays_of(model):
        array.tensor.data.uniform_(0.1, 1)
    return model


def state(model: Darknet) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "num_batches" not in name}


def same(model: Darknet, tensors: dict[str, torch.Tensor], but: str = "nothing") -> bool:
    own = state(model)
    return all(torch.equal(own[name], tensor) for name, tensor in tensors.items() if but not in name)


def test_darknet_weights_of_the_same_network(tmp_path):
    source, model = network(seed=1), network()
    write_weights(source, tmp_path / "a.weights")
    report = load_pretrained(model, tmp_path / "a.weights")
    assert report.complete and not report.extra and len(report.matched) == len(state(model))
    assert same(model, state(source))
    assert "12 of 12 tensors" in report.summary() and "layer 0-2" in report.summary()


@pytest.mark.parametrize("classes", [1, 80])
def test_darknet_weights_of_another_class_count(tmp_path, classes):
    source, model = network(classes, seed=1), network()
    write_weights(source, tmp_path / "a.weights")
    before = state(model)
    report = load_pretrained(model, tmp_path / "a.weights")
    assert set(report.differs) == {"layers.2.conv.weight", "layers.2.conv.bias"} and not report.complete
    assert report.source == f"Darknet weights, {classes} classes"
    head = {name: tensor for name, tensor in before.items() if "layers.2" in name}
    assert same(model, head)
    assert same(model, {name: tensor for name, tensor in state(source).items() if "layers.2" not in name})
    assert f"conv.weight {2 * (5 + classes)}x16x1x1, here 16x16x1x1" in report.summary()


def test_a_head_that_no_convolution_feeds_starts_from_its_own_weights(tmp_path):
    """Its channels cannot follow another class count; with the cfg's own nothing needs to."""
    text = CFG.replace("[yolo]", "[sam]\nfrom=-1\n[yolo]")
    source, model = (Darknet(adapt_classes(parse_cfg(text, "net.cfg"), 3)[0]) for _ in range(2))
    write_weights(source, tmp_path / "a.weights")
    assert load_pretrained(model, tmp_path / "a.weights").complete and same(model, state(source))
    with pytest.raises(UserError, match="its channels cannot be adapted"):
        adapt_classes(parse_cfg(text, "net.cfg"), 4)


def test_a_backbone_is_a_file_that_ends_with_a_layer(tmp_path):
    source, model = network(seed=1), network()
    write_weights(source, tmp_path / "net.conv.2", cutoff=2)
    report = load_pretrained(model, tmp_path / "net.conv.2")
    assert report.missing == ("layers.2.conv.weight", "layers.2.conv.bias") and "layers 0-1" in report.source
    assert len(report.matched) == 10
    assert "missing" in report.summary()


@pytest.mark.parametrize("size", [0, 1, 150, 5001])
def test_sizes_that_fit_nothing_are_refused(tmp_path, size):
    path, model = tmp_path / "a.weights", network()
    path.write_bytes(np.array([0, 2, 5, 0, 0], "<i4").tobytes() + bytes(4 * size))
    before = state(model)
    with pytest.raises(UserError, match=r"runs out in layer|left over"):
        load_pretrained(model, path)
    assert same(model, before)


def test_real_files_into_other_class_counts(data_dir):
    weights = data_dir / "weights"
    cfg = read_cfg(weights / "yolo-fastest-1.1.cfg")
    report = load_pretrained(Darknet(adapt_classes(cfg, 3)[0]), weights / "yolo-fastest-1.1.weights")
    assert report.source.endswith("80 classes") and not report.missing and not report.extra
    assert len(report.differs) == 4  # weight and bias of two heads
    model = Darknet(adapt_classes(read_cfg(weights / "MobileNetV2-YOLOv3-Nano-voc.cfg"), 3)[0])
    report = load_pretrained(model, weights / "MobileNetV2-Nano.57")
    assert "layers 0-56" in report.source and report.missing and not report.differs


@pytest.mark.parametrize("wrap", [None, "model", "state_dict", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
def test_plain_state_dicts(tmp_path, wrap, prefix):
    source, model = network(seed=1), network()
    tensors = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save({wrap: tensors, "epoch": 3, "optimizer": None} if wrap else tensors, tmp_path / "a.pt")
    assert load_pretrained(model, tmp_path / "a.pt").complete
    assert same(model, state(source))


@pytest.mark.golden_case("darknet_model/*.npz")
def test_state_dicts_of_the_ancestor(case, tmp_path):
    data = np.load(case)
    model = Darknet(parse_cfg(str(data["cfg"])))
    names = [name for name in data.files if name.startswith("state/")]
    torch.save({n.removeprefix("state/"): torch.from_numpy(data[n]) for n in names}, tmp_path / "best.pt")
    report = load_pretrained(model, tmp_path / "best.pt")
    assert report.complete and not report.extra
    (tmp_path / "a.weights").write_bytes(data["weights_file"].tobytes())
    other = Darknet(parse_cfg(str(data["cfg"])))
    load_pretrained(other, tmp_path / "a.weights")
    assert same(model, state(other))


def test_our_checkpoints_the_average_first(tmp_path):
    plain, average, model = network(seed=1), network(seed=2), network()
    tensors = with_prefix("model", plain.state_dict()) | with_prefix("optim", {"x": torch.zeros(1)})
    meta = {"cfg": CFG, "names": ["a", "b", "c"]}
    write_checkpoint(tmp_path / "plain.safetensors", tensors, meta)
    write_checkpoint(tmp_path / "both.safetensors", tensors | with_prefix("ema", average.state_dict()), meta)
    assert load_pretrained(model, tmp_path / "plain.safetensors").complete and same(model, state(plain))
    assert "EMA" in load_pretrained(model, tmp_path / "both.safetensors").source and same(model, state(average))


def test_the_name_of_a_file_does_not_matter(tmp_path):
    source, model = network(seed=1), network()
    torch.save(source.state_dict(), tmp_path / "a.weights")
    write_weights(network(seed=2), tmp_path / "b.pt")
    load_pretrained(model, tmp_path / "a.weights")
    assert same(model, state(source))
    load_pretrained(model, tmp_path / "b.pt")
    assert same(model, state(network(seed=2)))


def test_what_is_left_over_or_unlike_is_said(tmp_path):
    tensors = network(seed=1).state_dict()
    tensors["layers.9.conv.weight"] = torch.zeros(2)
    tensors["layers.0.norm.weight"] = torch.zeros(5)
    del tensors["layers.1.norm.bias"]
    torch.save(tensors, tmp_path / "a.pt")
    report = load_pretrained(network(), tmp_path / "a.pt")
    assert report.extra == ("layers.9.conv.weight",) and report.missing == ("layers.1.norm.bias",)
    assert report.differs == {"layers.0.norm.weight": ((5,), (8,))}
    text = report.summary()
    for part in ("10 of 12", "norm.weight 5, here 8", "norm.bias missing", "not used: layers.9.conv.weight"):
        assert part in text


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["a.pt", "a.weights", "a.safetensors"])
def test_pickles_are_refused_and_never_run(tmp_path, name):
    path, mark = tmp_path / name, tmp_path / "was-here"
    torch.save({"model": Payload(mark)}, path)
    with pytest.raises(UserError, match="isolated environment"):
        load_pretrained(network(), path)
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UserError, match="pickle"):
        load_pretrained(network(), path)
    assert not mark.exists()


def test_whole_modules_are_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "a.pt")
    with pytest.raises(UserError, match="state_dict"):
        load_pretrained(network(), tmp_path / "a.pt")


def test_an_archive_larger_inside_than_outside_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in stored.namelist():
            bomb.writestr(member, stored.read(member))
    with pytest.raises(UserError, match="unpacks to"):
        load_pretrained(network(), tmp_path / "bomb.pt")


@pytest.mark.parametrize("keep", [0.2, 0.9, 0.99])
def test_truncated_archives_are_refused(tmp_path, keep):
    path = tmp_path / "a.pt"
    torch.save(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match="truncated or damaged"):
        load_pretrained(network(), path)


def test_no_flipped_byte_ends_in_anything_but_an_answer(tmp_path):
    path, rng = tmp_path / "a.pt", np.random.default_rng(0)
    torch.save(network(seed=1).state_dict(), path)
    data = path.read_bytes()
    for _ in range(100):
        flipped = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            flipped[at] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with suppress(UserError):
            load_pretrained(network(), path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"a": torch.zeros(1)}, torch.zeros(3)])
def test_archives_without_the_network_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"no state dict|none of its"):
        load_pretrained(network(), tmp_path / "a.pt")


@pytest.mark.parametrize("value, what", [(float("nan"), "not finite"), (-1.0, "negative")])
def test_broken_values_change_nothing(tmp_path, value, what):
    tensors = {name: tensor.clone() for name, tensor in network(seed=1).state_dict().items()}
    tensors["layers.1.norm.running_var"][3] = value
    torch.save(tensors, tmp_path / "a.pt")
    model = network()
    before = state(model)
    with pytest.raises(UserError, match=f"layers.1.norm.running_var: 1 of 16 .*{what}"):
        load_pretrained(model, tmp_path / "a.pt")
    assert same(model, before)

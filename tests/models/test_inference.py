"""A network made ready to look computes what the one it was made from computes."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models.inference as module
from models.cfg import parse_cfg, read_cfg
from models.darknet import Darknet
from models.inference import HalvingPool, PackedConvolutional, for_inference

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
KINDS = """
[net]
width=64
height=64
channels=3
[convolutional]
filters=8
size=3
pad=1
batch_normalize=1
activation={activation}
[maxpool]
size=2
stride=2
[convolutional]
filters=8
size=3
stride=2
pad=1
groups=4
activation={activation}
[convolutional]
filters=8
size=3
pad=1
group_normalize=2
activation={activation}
[convolutional]
filters=8
size=3
pad=1
binary=1
batch_normalize=1
activation={activation}
[convolutional]
filters=8
size=3
stride=2
pad=1
antialiasing=1
batch_normalize=1
activation={activation}
[convolutional]
filters=12
size=1
activation=linear
"""


def lived_in(cfg) -> Darknet:
    """A network whose statistics are not those of a new one."""
    torch.manual_seed(0)
    model = Darknet(cfg).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return model


def outputs(model, images):
    with torch.inference_mode():
        return model(images)


@pytest.mark.parametrize("activation", ["linear", "leaky", "relu", "logistic", "swish", "mish"])
def test_every_kind_of_convolution(activation):
    model = lived_in(parse_cfg(KINDS.format(activation=activation), "kinds"))
    images = torch.rand(2, 3, 96, 64)  # another size and batch than the cfg's
    for one, other in zip(outputs(model, images), outputs(for_inference(model, CPU, torch.float32), images)):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize("name", ["yolov3-tiny", "yolo-fastest-1.1", "rcnn-tiny-mask", "yolox-nano"])
def test_networks_in_float32_and_bf16(name):
    model = lived_in(read_cfg(ROOT / f"cfg/{name}.cfg"))
    images = torch.rand(1, 3, 2 * model.stride, 3 * model.stride)
    before = copy.deepcopy(model.state_dict())

    def flat(outputs):
        return [each for output in outputs for each in (output if isinstance(output, tuple) else (output,))]

    expected = flat(outputs(model, images))
    for one, other in zip(expected, flat(outputs(for_inference(model, CPU, torch.float32), images)), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * one.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        halves = flat(outputs(for_inference(model, CPU, torch.bfloat16), images))
    for one, other in zip(expected, halves, strict=True):
        torch.testing.assert_close(other.float(), one, rtol=0, atol=0.03 * one.abs().max().item())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the original has changed"


def test_convolutions_are_packed_where_torch_can_and_plain_where_not(monkeypatch):
    model = lived_in(read_cfg(ROOT / "cfg/yolov3-tiny.cfg"))
    assert (
        sum(isinstance(layer, PackedConvolutional) for layer in for_inference(model, CPU, torch.float32).layers) == 13
    )
    monkeypatch.setattr(module, "_has_onednn", lambda: False)
    plain = for_inference(model, CPU, torch.float32)
    assert not any(isinstance(layer, PackedConvolutional) for layer in plain.modules())
    images = torch.rand(1, 3, 64, 64)
    for one, other in zip(outputs(model, images), outputs(plain, images)):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * one.abs().max().item())


def test_float64_stays():
    model = lived_in(read_cfg(ROOT / "cfg/yolov3-tiny.cfg")).double()
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    for one, other in zip(outputs(model, images), outputs(for_inference(model, CPU, torch.float64), images)):
        assert other.dtype == torch.float64
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("size", [(2, 2), (6, 10), (5, 7), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halving_pool_equals_torch(size, dtype):
    x = torch.randn(2, 5, *size).to(dtype)
    x[0, 0, 0, 0] = torch.nan
    expected = F.max_pool2d(x, 2, 2, ceil_mode=True)
    assert torch.equal(HalvingPool()(x).nan_to_num(99), expected.nan_to_num(99))

"""Layers one by one against slow loops written from the format's rules, and their gradients."""

import numpy as np
import pytest
import torch

from models import rules
from models.activations import ACTIVATIONS
from models.cfg import parse_cfg
from models.convolutional import binary_input, binary_weights
from models.darknet import Darknet
from models.heads import HEADS
from models.layers import LAYERS


def network(body: str, channels: int = 3, height: int = 12, width: int = 16) -> Darknet:
    net = f"[net]\nwidth={width}\nheight={height}\nchannels={channels}\n"
    return Darknet(parse_cfg(net + body)).double().eval()


def outputs(body: str, image: torch.Tensor) -> torch.Tensor:
    channels, height, width = image.shape[1:]
    return network(body, channels, height, width).layer_outputs(image)[-1]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 8, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_every_section_of_the_rules_has_a_layer():
    assert set(rules.SECTIONS) == set(LAYERS | HEADS)
    assert set(rules.ACTIVATIONS) == set(ACTIVATIONS)


SCALAR = {
    "linear": lambda x: x,
    "leaky": lambda x: x if x > 0 else 0.1 * x,
    "revleaky": lambda x: x if x > 0 else 0.1 * x,
    "relu": lambda x: max(x, 0),
    "relu6": lambda x: min(max(x, 0), 6),
    "relie": lambda x: x if x > 0 else 0.01 * x,
    "ramp": lambda x: max(x, 0) + 0.1 * x,
    "elu": lambda x: x if x >= 0 else np.exp(x) - 1,
    "selu": lambda x: 1.0507 * (x if x >= 0 else 1.6732 * (np.exp(x) - 1)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(0.797885 * x + 0.035677 * x**3)),
    "tanh": np.tanh,
    "loggy": lambda x: 2 / (1 + np.exp(-x)) - 1,
    "hardtan": lambda x: min(max(x, -1), 1),
    "lhtan": lambda x: 0.001 * x if x < 0 else 0.001 * (x - 1) + 1 if x > 1 else x,
    "plse": lambda x: 0.01 * (x + 4) if x < -4 else 0.01 * (x - 4) + 1 if x > 4 else 0.125 * x + 0.5,
    "stair": lambda x: np.floor(x / 2) if np.floor(x) % 2 == 0 else (x - np.floor(x)) + np.floor(x / 2),
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "hard_mish": lambda x: x if x > 0 else x * x / 2 + x if x > -2 else 0,
    "swish": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {n for n in ACTIVATIONS if n.startswith("normalize")}))
def test_activation_is_its_definition(name):
    x = torch.linspace(-8, 8, 161, dtype=torch.float64) + 0.013
    wanted = torch.tensor([float(SCALAR[name](value)) for value in x.numpy()], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), wanted, atol=2e-4 if name == "selu" else 2e-6, rtol=1e-5)


def test_channel_activations(image):
    positive = image.clamp(min=0)
    torch.testing.assert_close(ACTIVATIONS["normalize_channels"](image), positive / (positive.sum(1)[:, None] + 1e-4))
    exp = image.exp()
    torch.testing.assert_close(ACTIVATIONS["normalize_channels_softmax"](image), exp / (exp.sum(1)[:, None] + 1e-4))
    huge = ACTIVATIONS["normalize_channels_softmax_maxval"](image * 1e4)
    assert huge.isfinite().all() and (huge.sum(1) - 1).abs().max() < 2e-4


def windows(image: torch.Tensor, size: int, stride: tuple[int, int], padding: int):
    """(row, column, the part of each window inside the map), by Darknet's rule."""
    height, width = image.shape[-2:]
    for row in range((height + padding - size) // stride[0] + 1):
        for column in range((width + padding - size) // stride[1] + 1):
            top, left = row * stride[0] - padding // 2, column * stride[1] - padding // 2
            yield row, column, image[..., max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)]


POOLS = [
    (2, 1, 1, None),
    (2, 2, 2, None),
    (3, 2, 2, None),
    (5, 1, 1, None),
    (4, 4, 3, None),
    (3, 1, 1, 0),
    (3, 2, 1, 1),
]


@pytest.mark.parametrize("kind, reduce", [("maxpool", torch.amax), ("local_avgpool", torch.mean)])
@pytest.mark.parametrize("size, stride_x, stride_y, padding", POOLS)
@pytest.mark.parametrize("height, width", [(12, 16), (13, 15)])
def test_pools_see_nothing_outside(kind, reduce, size, stride_x, stride_y, padding, height, width):
    image = torch.randn(2, 3, height, width, dtype=torch.float64) - 3  # all negative: a zero outside would win
    body = f"[{kind}]\nsize={size}\nstride_x={stride_x}\nstride_y={stride_y}\n"
    body += "" if padding is None else f"padding={padding}\n"
    found = outputs(body, image)
    cells = 0
    total = size - 1 if padding is None else padding
    for row, column, inside in windows(image, size, (stride_y, stride_x), total):
        torch.testing.assert_close(found[..., row, column], reduce(inside, (-2, -1)))
        cells += 1
    assert cells == found.shape[-2] * found.shape[-1]


def test_maxpool_depth(image):
    found = outputs("[maxpool]\nmaxpool_depth=1\nout_channels=4\n", image)
    torch.testing.assert_close(found, torch.maximum(image[:, :4], image[:, 4:]))


@pytest.mark.parametrize("kind, size, padding, kernel", [(1, 3, 1, [1, 2, 1]), (2, 2, 0, [1, 1])])
def test_antialiasing_blurs_after_a_dense_layer(image, kind, size, padding, kernel):
    found = outputs(f"[maxpool]\nsize=2\nstride=2\nantialiasing={kind}\n", image)
    dense = outputs("[maxpool]\nsize=2\nstride=1\n", image)
    kernel = torch.tensor(kernel, dtype=torch.float64)
    kernel = (torch.outer(kernel, kernel) / kernel.sum() ** 2).expand(8, 1, size, size)
    torch.testing.assert_close(found, torch.conv2d(dense, kernel, stride=2, padding=padding, groups=8))


def test_reorg_is_the_formula(image):
    channels, height, width, s = 8, 12, 16, 2
    flat, small = image[0].flatten(), channels // (s * s)
    found = outputs("[reorg]\nstride=2\n", image)[0].flatten()
    at = 0
    for k in range(channels):
        off = k // small
        for row in range(height):
            for column in range(width):
                source = column * s + off % s + width * s * (row * s + off // s + height * s * (k % small))
                assert found[at] == flat[source]
                at += 1


def test_reorg3d_is_space_to_depth_and_reverse_its_inverse(image):
    found = outputs("[reorg3d]\nstride=2\n", image)
    for dy in range(2):
        for dx in range(2):
            torch.testing.assert_close(found[:, (dy * 2 + dx) * 8 :][:, :8], image[:, :, dy::2, dx::2])
    torch.testing.assert_close(outputs("[reorg3d]\nstride=2\n[reorg3d]\nstride=2\nreverse=1\n", image), image)


def test_upsample_backwards_sums_blocks(image):
    found = outputs("[upsample]\nstride=-2\nscale=0.5\n", image)
    torch.testing.assert_close(found, image.unfold(2, 2, 2).unfold(3, 2, 2).sum((-2, -1)) / 2)


@pytest.mark.parametrize("kind, channels", [("per_feature", 1), ("per_channel", 8)])
@pytest.mark.parametrize("normalization", ["relu", "softmax"])
def test_weighted_shortcut(image, kind, channels, normalization):
    body = "[activation]\nactivation=relu\n[activation]\nactivation=tanh\n[shortcut]\nfrom=-2\n"
    model = network(f"{body}weights_type={kind}\nweights_normalization={normalization}\n", 8)
    weights = model.layers[2].weights
    weights.data.copy_(torch.randn(weights.shape, dtype=torch.float64))
    assert weights.numel() == 2 * channels
    share = weights.clamp(min=0) if normalization == "relu" else (weights - weights.amax(0)).exp()
    share = (share / (share.sum(0) + 1e-4))[:, None, :, None, None]
    relu, tanh, found = model.layer_outputs(image)
    torch.testing.assert_close(found, tanh * share[0] + relu * share[1])


def test_shortcut_leaves_the_previous_output_alone(image):
    model = network("[convolutional]\nfilters=4\n[convolutional]\nfilters=6\n[shortcut]\nfrom=-2\n", 8)
    narrow, before, found = model.layer_outputs(image)
    torch.testing.assert_close(found[:, :4], before[:, :4] + narrow)
    torch.testing.assert_close(found[:, 4:], before[:, 4:])


def test_lrn_is_its_definition(image):
    found = outputs("[normalization]\nalpha=.01\nbeta=.5\nkappa=2\nsize=3\n", image)
    for channel in range(8):
        energy = image[:, max(channel - 1, 0) : channel + 2].square().sum(1)
        torch.testing.assert_close(found[:, channel], image[:, channel] / (2 + 0.01 * energy) ** 0.5)


def test_softmax_groups_and_crop(image):
    found = outputs("[avgpool]\n[softmax]\ngroups=2\ntemperature=3\n", image)
    wanted = (image.mean((2, 3)).view(2, 2, 4) / 3).softmax(-1)
    torch.testing.assert_close(found.view(2, 2, 4), wanted)
    found = outputs("[crop]\ncrop_height=8\ncrop_width=10\n", image)
    torch.testing.assert_close(found, image[:, :, 2:10, 3:13] * 2 - 1)


def test_scale_channels_by_pixel_and_sam(image):
    body = "[convolutional]\nfilters=1\n[scale_channels]\nfrom=-2\nscale_wh=1\n"
    mask, found = network("[activation]\n" + body, 8).layer_outputs(image)[1:]
    torch.testing.assert_close(found, image * mask)
    relu, found = network("[empty]\n[activation]\nactivation=relu\n[sam]\nfrom=-2\n", 8).layer_outputs(image)[1:]
    torch.testing.assert_close(found, image * relu)


def test_implicit_is_the_same_for_every_picture(image):
    found = network("[implicit]\nfilters=8\n[sam]\nfrom=-1\n", 8).layers[0]
    assert found().shape == (1, 8, 1, 1)


def test_crnn_starts_from_nothing(image):
    model = network("[crnn]\nhidden=5\noutput=4\nsize=3\npad=1\nbatch_normalize=1\nactivation=leaky\n", 8)
    for norm in (part.norm for part in (model.layers[0].input, model.layers[0].state, model.layers[0].output)):
        norm.running_mean.normal_()
        norm.bias.data.normal_()
    layer = model.layers[0]
    state = layer.state.activation(layer.state.norm(torch.zeros(2, 5, 12, 16, dtype=torch.float64)))
    torch.testing.assert_close(model.layer_outputs(image)[0], layer.output(layer.input(image) + state))
    assert list(layer.darknet_arrays())[:5] == [
        "input biases",
        "input scales",
        "input mean",
        "input variance",
        "input weights",
    ]


def test_xnor_convolution_and_its_straight_through_gradient(image):
    model = network("[convolutional]\nfilters=4\nsize=3\npad=1\nxnor=1\nbin_output=1\nactivation=linear\n", 8)
    weight = model.layers[0].conv.weight
    mean = weight.abs().mean((1, 2, 3), keepdim=True)
    signs = torch.where(image > 0, 1.0, -1.0).double()
    wanted = torch.conv2d(signs, torch.where(weight > 0, mean, -mean), padding=1)
    torch.testing.assert_close(model.layer_outputs(image)[0], wanted)
    x = torch.tensor([[[[-1.5, -0.5, 0.0, 0.5, 2.0]]]], dtype=torch.float64, requires_grad=True)
    (binary_input(x) * torch.arange(1.0, 6)).sum().backward()
    assert x.grad.flatten().tolist() == [0, 2, 3, 4, 0]
    (binary_weights(weight) * 2).sum().backward()
    assert (weight.grad == 2).all()
    assert binary_input(torch.zeros(1)).item() == -1


def test_shared_convolution_counts_once_and_learns_from_both(image):
    body = "[convolutional]\nfilters=8\nsize=3\npad=1\nbatch_normalize=1\nactivation=leaky\n"
    model = network(body + "[convolutional]\nfilters=8\nsize=3\npad=1\nshare_index=0\nbatch_normalize=1\nstride=2\n", 8)
    first, second = model.layer_outputs(image)
    conv, norm = model.layers[0].conv, model.layers[0].norm
    torch.testing.assert_close(second, norm(torch.conv2d(first, conv.weight, stride=2, padding=1)).sigmoid())
    assert len(list(model.parameters())) == 3 and all(name.startswith("layers.0.") for name in model.state_dict())
    second.sum().backward()
    both = conv.weight.grad.clone()
    conv.weight.grad = None
    network_copy_gives_less = torch.autograd.grad(model.layer_outputs(image)[0].sum(), conv.weight)[0]
    assert not torch.allclose(both, network_copy_gives_less)


def test_sharing_goes_back_to_the_owner(image):
    body = "[convolutional]\nfilters=8\n"
    model = network(body + (body + "share_index=-1\n") * 2, 8)
    assert model.layers[2]._source == (model.layers[0],)
    assert model.layer_outputs(image)[2].isfinite().all()


def test_connected_reads_the_flat_vector(image):
    model = network("[connected]\noutput=5\nactivation=linear\nbatch_normalize=1\n", 8)
    layer = model.layers[0]
    layer.norm.running_mean.normal_()
    flat = image.flatten(1) @ layer.linear.weight.t()
    wanted = (flat - layer.norm.running_mean) / (layer.norm.running_var + 1e-5).sqrt()
    torch.testing.assert_close(model.layer_outputs(image)[0], wanted[:, :, None, None])
    assert list(layer.darknet_arrays()) == ["biases", "matrix", "scales", "mean", "variance"]


def test_dropout_only_in_training(image):
    model = network("[dropout]\nprobability=.5\n", 8)
    assert torch.equal(model.layer_outputs(image)[0], image)
    dropped = model.train().layer_outputs(image)[0]
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * image[kept])


def test_convolutions_start_as_darknets(image):
    conv = network("[convolutional]\nfilters=64\nsize=3\ngroups=2\n", 8).layers[0].conv
    bound = (2 / (4 * 9)) ** 0.5
    assert 0.95 * bound < conv.weight.abs().max() <= bound and (conv.bias == 0).all()


def test_shortcut_takes_every_other_pixel_of_a_larger_map(image):
    model = network("[empty]\n[convolutional]\nfilters=4\nsize=3\npad=1\nstride=2\n[shortcut]\nfrom=-2\n", 8)
    large, small, found = model.layer_outputs(image)
    torch.testing.assert_close(found, small + large[:, :4, ::2, ::2])

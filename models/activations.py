"""Darknet's activations as pure functions, by the name they have in a cfg."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNEL_EPS = 1e-4  # added to the sum of a channel normalisation


def linear(x: Tensor) -> Tensor:
    return x


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def relie(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.01)


def ramp(x: Tensor) -> Tensor:
    return F.relu(x) + 0.1 * x


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def loggy(x: Tensor) -> Tensor:
    return 2 * torch.sigmoid(x) - 1


def lhtan(x: Tensor) -> Tensor:
    """The identity on 0..1, slope 0.001 outside."""
    middle = x.clamp(0, 1)
    return middle + 0.001 * (x - middle)


def plse(x: Tensor) -> Tensor:
    """A piecewise linear sigmoid: x/8 + 1/2 on -4..4, slope 0.01 outside."""
    middle = x.clamp(-4, 4)
    return 0.125 * middle + 0.5 + 0.01 * (x - middle)


def stair(x: Tensor) -> Tensor:
    """Flat where floor(x) is even, slope 1 where it is odd."""
    floor = x.floor()
    return (floor / 2).floor() + torch.where(floor % 2 == 0, 0, x - floor)


def hard_mish(x: Tensor) -> Tensor:
    """x above 0, x*x/2 + x on -2..0, 0 below."""
    return 0.5 * x * (x + 2).clamp(0, 2)


def normalize_channels(x: Tensor) -> Tensor:
    """Positive part, divided by its sum over the channels."""
    positive = F.relu(x)
    return positive / (positive.sum(1, keepdim=True) + CHANNEL_EPS)


def normalize_channels_softmax(x: Tensor) -> Tensor:
    exp = x.exp()
    return exp / (exp.sum(1, keepdim=True) + CHANNEL_EPS)


def normalize_channels_softmax_maxval(x: Tensor) -> Tensor:
    return normalize_channels_softmax(x - x.amax(1, keepdim=True))


ACTIVATIONS = {
    "linear": linear,
    "leaky": leaky,
    "revleaky": leaky,
    "relu": F.relu,
    "relu6": F.relu6,
    "relie": relie,
    "ramp": ramp,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": gelu,
    "tanh": torch.tanh,
    "loggy": loggy,
    "hardtan": F.hardtanh,
    "lhtan": lhtan,
    "plse": plse,
    "stair": stair,
    "logistic": torch.sigmoid,
    "mish": F.mish,
    "hard_mish": hard_mish,
    "swish": F.silu,
    "normalize_channels": normalize_channels,
    "normalize_channels_softmax": normalize_channels_softmax,
    "normalize_channels_softmax_maxval": normalize_channels_softmax_maxval,
}


def leaky_(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1, inplace=True)


# The same into the memory of their argument, for those whose gradient follows from their result: a training step then
# keeps one map per convolution less. Only where nobody else reads the argument.
IN_PLACE = {leaky: leaky_, F.relu: F.relu_}

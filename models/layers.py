"""The layers without a matrix, one class per cfg section, and the dict of all of them.

Letters: B images, C channels, H W height and width; all maps are [B, C, H, W]. Every class has ``from_spec(spec)`` and
``forward(*inputs)``, pure and out of place, with its inputs in the order of ``LayerSpec.inputs``. Those with arrays in
a ``.weights`` file have ``darknet_arrays()``: name -> tensor in file order.

Semantics are Darknet's. The PyTorch ancestor differs in a shortcut from a narrower layer: it adds into the previous
layer's output, which later routes then see; here the sum is a new map. (Pools: see `models.pooling`.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.activations import ACTIVATIONS
from models.convolutional import BatchNorm, Connected, Convolutional, Crnn
from models.pooling import AvgPool, LocalAvgPool, MaxPool

FUSION_EPS = 1e-4  # added to the sum of normalised shortcut weights


class Identity(nn.Module):
    """[empty], [cost], [contrastive]: passes its input through; the latter two only mean something to a loss."""

    @classmethod
    def from_spec(cls, spec) -> "Identity":
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        return x


class Activation(nn.Module):
    """[activation]: a non-linearity alone."""

    def __init__(self, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]

    @classmethod
    def from_spec(cls, spec) -> "Activation":
        return cls(spec.section.str("activation", "linear"))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


class Route(nn.Module):
    """[route]: block ``group_id`` of ``groups`` equal channel blocks of every input, joined."""

    def __init__(self, groups: int, group_id: int):
        super().__init__()
        self.groups, self.group_id = groups, group_id

    @classmethod
    def from_spec(cls, spec) -> "Route":
        return cls(spec.section.int("groups", 1), spec.section.int("group_id", 0))

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.groups > 1:
            inputs = [x.narrow(1, x.shape[1] // self.groups * self.group_id, x.shape[1] // self.groups) for x in inputs]
        return inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)


def _fitted(x: Tensor, like: Tensor) -> Tensor:
    """Every n-th pixel of a larger map; further channels cut off, or channels of zeros added."""
    step, missing = x.shape[2] // like.shape[2], like.shape[1] - x.shape[1]
    x = x[:, : like.shape[1], ::step, ::step]
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing > 0 else x


class Shortcut(nn.Module):
    """[shortcut]: the previous map plus others, then the activation; the shape is the previous map's."""

    def __init__(self, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]

    @classmethod
    def from_spec(cls, spec) -> nn.Module:
        if spec.section.str("weights_type", "none") != "none":
            return WeightedShortcut.from_spec(spec)
        return cls(spec.section.str("activation", "linear"))

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            x = x + (other if other.shape == x.shape else _fitted(other, x))
        return self.activation(x)


def _relu_share(weights: Tensor) -> Tensor:
    positive = F.relu(weights)
    return positive / (positive.sum(0) + FUSION_EPS)


def _softmax_share(weights: Tensor) -> Tensor:
    exp = (weights - weights.amax(0)).exp()
    return exp / (exp.sum(0) + FUSION_EPS)


SHARES = {"relu": _relu_share, "avg_relu": _relu_share, "softmax": _softmax_share}


class WeightedShortcut(nn.Module):
    """[shortcut] with ``weights_type``: learned weights per source, or per source and channel (BiFPN, section 3.3)."""

    def __init__(self, num_sources: int, channels: int, normalization: str, activation: str):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_sources, channels))
        self.share = SHARES[normalization]
        self.activation = ACTIVATIONS[activation]

    @classmethod
    def from_spec(cls, spec) -> "WeightedShortcut":
        section = spec.section
        channels = {"per_feature": 1, "per_layer": 1, "per_channel": spec.in_shapes[0][0]}
        return cls(
            len(spec.inputs),
            channels[section.str("weights_type")],
            section.str("weights_normalization"),
            section.str("activation", "linear"),
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        shares = self.share(self.weights)[:, None, :, None, None]
        return self.activation(sum(_fitted(x, inputs[0]) * share for x, share in zip(inputs, shares)))

    def darknet_arrays(self) -> dict[str, Tensor]:
        return {"weights": self.weights}


class Upsample(nn.Module):
    """[upsample]: nearest neighbour times ``scale``; a negative stride sums blocks instead."""

    def __init__(self, stride: int, scale: float):
        super().__init__()
        self.stride, self.scale = stride, scale

    @classmethod
    def from_spec(cls, spec) -> "Upsample":
        return cls(spec.section.int("stride", 2), spec.section.float("scale", 1.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride < 0:
            x = F.avg_pool2d(x, -self.stride, divisor_override=1)
        else:
            x = F.interpolate(x, scale_factor=float(self.stride), mode="nearest")
        return x if self.scale == 1 else x * self.scale


class _Reorg(nn.Module):
    """Common to [reorg] and [reorg3d]: ``reverse`` makes maps of fewer channels and more pixels."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    @classmethod
    def from_spec(cls, spec) -> nn.Module:
        kind = ReorgReverse if spec.section.flag("reverse") else cls
        return kind(spec.section.int("stride", 1))


class Reorg(_Reorg):
    """[reorg]: YOLOv2's, which is not space to depth.

    The list of values is read as if it were a map [C/s/s, H*s, W*s], that is taken apart into s*s maps [C/s/s, H, W],
    and the result is called [C*s*s, H/s, W/s].
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        s = self.stride
        x = x.reshape(batch, channels // (s * s), height, s, width, s)
        return x.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * s * s, height // s, width // s)


class Reorg3d(_Reorg):
    """[reorg3d]: space to depth; output channel (dy * s + dx) * C + c is pixel (dy, dx) of channel c's blocks."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        s = self.stride
        x = x.reshape(batch, channels, height // s, s, width // s, s)
        return x.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * s * s, height // s, width // s)


class ReorgReverse(_Reorg):
    """``reverse=1`` of both: depth to space, the inverse of [reorg3d]."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        s = self.stride
        x = x.reshape(batch, s, s, channels // (s * s), height, width)
        return x.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // (s * s), height * s, width * s)


class Product(Activation):
    """[sam] and [scale_channels]: ``from`` times the previous map, which may be one number per channel or per pixel."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.activation(other * x)


class Dropout(nn.Module):
    """[dropout]: nothing at inference.

    Darknet drops inside the previous layer's output, so that a later reference to the layer *before* the dropout sees
    dropped values in training; here only readers of the dropout do.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    @classmethod
    def from_spec(cls, spec) -> "Dropout":
        return cls(spec.section.float("probability", 0.2))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.probability, self.training)


class Softmax(nn.Module):
    """[softmax]: over all values of a picture, in ``groups`` equal runs, of logits / ``temperature``."""

    def __init__(self, groups: int, temperature: float):
        super().__init__()
        self.groups, self.temperature = groups, temperature

    @classmethod
    def from_spec(cls, spec) -> "Softmax":
        return cls(spec.section.int("groups", 1), spec.section.float("temperature", 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(len(x), self.groups, -1) / self.temperature).softmax(-1).reshape(x.shape)


class Normalization(nn.Module):
    """[normalization]: local response normalisation over channels, x * (kappa + alpha * sum of squares) ** -beta.

    The window is the symmetric one of the definition (AlexNet, section 3.3).
    """

    def __init__(self, size: int, alpha: float, beta: float, kappa: float):
        super().__init__()
        self.size, self.alpha, self.beta, self.kappa = size, alpha, beta, kappa

    @classmethod
    def from_spec(cls, spec) -> "Normalization":
        section = spec.section
        return cls(
            section.int("size", 5),
            section.float("alpha", 1e-4),
            section.float("beta", 0.75),
            section.float("kappa", 1.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.local_response_norm(x, self.size, self.alpha * self.size, self.beta, self.kappa)


class Implicit(nn.Module):
    """[implicit]: a learned map, the same for every picture (YOLOR, section 3). Reads nothing; a batch of one."""

    def __init__(self, shape: tuple[int, int, int], mean: float, std: float):
        super().__init__()
        self.weights = nn.Parameter(nn.init.normal_(torch.empty(shape), mean, std))

    @classmethod
    def from_spec(cls, spec) -> "Implicit":
        return cls(spec.shape, spec.section.float("mean", 0.0), spec.section.float("std", 0.2))

    def forward(self) -> Tensor:
        return self.weights[None]

    def darknet_arrays(self) -> dict[str, Tensor]:
        return {"weights": self.weights}


class Crop(nn.Module):
    """[crop]: the middle of the picture, as -1..1 unless ``noadjust``. Darknet crops at random in training."""

    def __init__(self, height: int, width: int, scale: float, shift: float):
        super().__init__()
        self.height, self.width, self.scale, self.shift = height, width, scale, shift

    @classmethod
    def from_spec(cls, spec) -> "Crop":
        section = spec.section
        scale, shift = (1.0, 0.0) if section.flag("noadjust") else (2.0, -1.0)
        return cls(section.int("crop_height", 1), section.int("crop_width", 1), scale, shift)

    def forward(self, x: Tensor) -> Tensor:
        top, left = (x.shape[2] - self.height) // 2, (x.shape[3] - self.width) // 2
        return x[:, :, top : top + self.height, left : left + self.width] * self.scale + self.shift


LAYERS = {
    "convolutional": Convolutional,
    "connected": Connected,
    "crnn": Crnn,
    "batchnorm": BatchNorm,
    "activation": Activation,
    "maxpool": MaxPool,
    "local_avgpool": LocalAvgPool,
    "avgpool": AvgPool,
    "route": Route,
    "shortcut": Shortcut,
    "upsample": Upsample,
    "reorg": Reorg,
    "reorg3d": Reorg3d,
    "scale_channels": Product,
    "sam": Product,
    "dropout": Dropout,
    "softmax": Softmax,
    "normalization": Normalization,
    "implicit": Implicit,
    "crop": Crop,
    "contrastive": Identity,
    "cost": Identity,
    "empty": Identity,
}

"""Everything with a matrix in it: convolutions in Darknet's variants, fully connected and recurrent layers.

Letters: B images, C channels, H W height and width of a map; all maps are [B, C, H, W], any memory format.

Batch normalisation in training divides by the biased batch variance, as PyTorch and the PyTorch ancestor do; Darknet's
CPU code takes the unbiased one. Running variances start at 1, not at Darknet's 0. Inference is Darknet's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.activations import ACTIVATIONS, IN_PLACE

BN_EPS = 1e-5  # Darknet; OpenCV's reader adds 1e-6, the PyTorch ancestor 1e-4
# Share of the new batch in the running statistics: Darknet's GPU code 0.01, the ancestor 0.03. The larger one, because
# a fine-tuning of a few hundred steps must reach its own statistics before it is evaluated.
BN_MOMENTUM = 0.03


def batch_norm(channels: int, kind=nn.BatchNorm2d) -> nn.Module:
    return kind(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


class DarknetConv2d(nn.Conv2d):
    """A convolution that starts as Darknet's: weights uniform in +-sqrt(2 / fan_in), bias 0."""

    def reset_parameters(self) -> None:
        reset(self)


class DarknetLinear(nn.Linear):
    """A matrix that starts as Darknet's: weights uniform in +-sqrt(2 / fan_in), bias 0."""

    def reset_parameters(self) -> None:
        reset(self)


def reset(module: nn.Conv2d | nn.Linear) -> None:
    bound = math.sqrt(2 / module.weight[0].numel())
    nn.init.uniform_(module.weight, -bound, bound)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _sign(x: Tensor) -> Tensor:
    """+1 above zero, else -1 (zero included)."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def binary_weights(weight: Tensor) -> Tensor:
    """Each filter as plus or minus its mean magnitude; the gradient goes straight through (XNOR-Net, section 3.1)."""
    binary = weight.abs().mean((1, 2, 3), keepdim=True) * _sign(weight)
    return weight + (binary - weight).detach()


def binary_input(x: Tensor) -> Tensor:
    """The input as +-1; the gradient passes where it lies in -1..1 (XNOR-Net, section 3.2)."""
    passed = x.clamp(-1, 1)
    return passed + (_sign(x) - passed).detach()


class BinaryConv2d(DarknetConv2d):
    """``binary=1``: float input, binary weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            x, binary_weights(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class XnorConv2d(BinaryConv2d):
    """``xnor=1``: binary input and binary weights; the padding stays 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(binary_input(x))


class Blur(nn.Module):
    """A fixed depthwise low-pass with the stride that ``antialiasing`` took away from its layer (Zhang 2019).

    Args:
        kind: 1 is the 3x3 binomial kernel with padding 1, 2 the 2x2 mean without padding.
    """

    def __init__(self, kind: int, stride: tuple[int, int]):
        super().__init__()
        row = torch.tensor({1: [0.25, 0.5, 0.25], 2: [0.5, 0.5]}[kind])
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)
        self.stride, self.padding = stride, {1: 1, 2: 0}[kind]

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.expand(channels, -1, -1, -1), None, self.stride, self.padding, groups=channels)


def strides(section) -> tuple[int, int]:
    """(vertical, horizontal): ``stride_y`` and ``stride_x`` override ``stride``."""
    stride = section.int("stride", 1)
    return section.int("stride_y", stride), section.int("stride_x", stride)


def padding_of(section, size: int) -> int:
    """``pad`` is a flag for size / 2; ``padding`` counts only without it."""
    return size // 2 if section.flag("pad") else section.int("padding", 0)


def blur_of(section, stride: tuple[int, int]) -> nn.Module:
    kind = section.int("antialiasing", 0)
    return Blur(2 if kind == 2 else 1, stride) if kind else nn.Identity()


def convolution_keys(section) -> dict:
    """What a [convolutional] section says about its kernel, as keywords of ``nn.Conv2d`` without the channels."""
    size = section.int("size", 1)
    dilation = section.int("dilation", 1) if size > 1 else 1
    return {
        "kernel_size": size,
        "stride": (1, 1) if section.int("antialiasing", 0) else strides(section),
        "padding": padding_of(section, size) * dilation,
        "dilation": dilation,
        "groups": 1 if section.flag("xnor") else max(1, section.int("groups", 1)),
    }


def normalization_of(section, channels: int) -> nn.Module:
    """What stands between a convolution and its activation; an identity where the convolution has a bias."""
    if groups := section.int("group_normalize", 0):
        return nn.GroupNorm(groups, channels, eps=BN_EPS)
    return batch_norm(channels) if section.flag("batch_normalize") or section.flag("cbn") else nn.Identity()


class Convolutional(nn.Module):
    """[convolutional]: convolution, normalisation or bias, activation, and with ``antialiasing`` a blur.

    ``group_normalize=G`` (ours; Darknet does not know it) normalises every picture by itself, over G groups of
    channels: small batches do not hurt it, and there are no running statistics to store or to fold in. ``bin_output``
    only packs the signs for the next xnor layer and changes no result. Input [B, C, H, W]; output
    [B, filters, (H + 2p - k) / s + 1, ...].
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, activation: str, blur: nn.Module):
        super().__init__()
        self.conv, self.norm = conv, norm
        self.activation = ACTIVATIONS[activation]
        self.blur = blur
        self.fused = False

    @classmethod
    def from_spec(cls, spec) -> nn.Module:
        if "share_index" in spec.section:
            return SharedConvolutional.from_spec(spec)
        section, keys = spec.section, convolution_keys(spec.section)
        kind = XnorConv2d if section.flag("xnor") else BinaryConv2d if section.flag("binary") else DarknetConv2d
        norm = normalization_of(section, section.int("filters", 1))
        plain = isinstance(norm, nn.Identity)
        conv = kind(spec.in_shapes[0][0], section.int("filters", 1), bias=plain, **keys)
        return cls(conv, norm, section.str("activation", "logistic"), blur_of(section, strides(section)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blur(activated(self.activation, self.norm(self.conv(x))))

    def extra_repr(self) -> str:
        return f"activation={self.activation.__name__}"

    def darknet_arrays(self) -> dict[str, Tensor]:
        """Name -> tensor, in the order of the ``.weights`` file."""
        assert not self.fused, "a fused network has lost its statistics: write the one it was made from"
        if isinstance(self.norm, nn.Identity):
            return {"biases": self.conv.bias, "weights": self.conv.weight}
        return norm_arrays(self.norm) | {"weights": self.conv.weight}

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold running statistics, if any, into the kernel, for inference only. Same outputs up to rounding."""
        if not isinstance(self.norm, nn.BatchNorm2d):
            return
        norm, conv = self.norm, self.conv
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
        self.norm, self.fused = nn.Identity(), True


def activated(activation, x: Tensor) -> Tensor:
    """The activation of a map that a convolution or its normalisation has just made: no gradient needs ``x`` itself."""
    return IN_PLACE.get(activation, activation)(x)


def norm_arrays(norm: nn.Module) -> dict[str, Tensor]:
    if isinstance(norm, nn.GroupNorm):
        return {"biases": norm.bias, "scales": norm.weight}
    return {"biases": norm.bias, "scales": norm.weight, "mean": norm.running_mean, "variance": norm.running_var}


class SharedConvolutional(nn.Module):
    """[convolutional] with ``share_index``: the arrays of another layer, the stride and activation of this one.

    Holds no parameters of its own, so a checkpoint and an optimiser see each tensor once.
    """

    def __init__(self, keys: dict, activation: str, blur: nn.Module):
        super().__init__()
        self.keys = {name: value for name, value in keys.items() if name != "kernel_size"}
        self.activation = ACTIVATIONS[activation]
        self.blur = blur
        self._source: tuple[Convolutional, ...] = ()  # in a tuple: a module attribute would be registered twice

    @classmethod
    def from_spec(cls, spec) -> "SharedConvolutional":
        section = spec.section
        return cls(convolution_keys(section), section.str("activation", "logistic"), blur_of(section, strides(section)))

    def share(self, source: "Convolutional | SharedConvolutional") -> None:
        """Take the arrays of ``source`` from now on, or of the layer that it takes its own from."""
        self._source = source._source if isinstance(source, SharedConvolutional) else (source,)

    def forward(self, x: Tensor) -> Tensor:
        (source,) = self._source
        x = source.norm(F.conv2d(x, source.conv.weight, source.conv.bias, **self.keys))
        return self.blur(activated(self.activation, x))


class BatchNorm(nn.Module):
    """[batchnorm]: normalisation alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = batch_norm(channels)

    @classmethod
    def from_spec(cls, spec) -> "BatchNorm":
        return cls(spec.in_shapes[0][0])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def darknet_arrays(self) -> dict[str, Tensor]:
        return norm_arrays(self.norm)


class Connected(nn.Module):
    """[connected]: a matrix on the flat c, h, w vector. Output [B, outputs, 1, 1].

    Its bias stands after the normalisation, where it is the normalisation's own, and first in the file.
    """

    def __init__(self, inputs: int, outputs: int, activation: str, normalized: bool):
        super().__init__()
        self.linear = DarknetLinear(inputs, outputs, bias=not normalized)
        self.norm = batch_norm(outputs, nn.BatchNorm1d) if normalized else nn.Identity()
        self.activation = ACTIVATIONS[activation]

    @classmethod
    def from_spec(cls, spec) -> "Connected":
        section = spec.section
        inputs = math.prod(spec.in_shapes[0])
        return cls(
            inputs, section.int("output", 1), section.str("activation", "logistic"), section.flag("batch_normalize")
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.linear(x.flatten(1)))[:, :, None, None])

    def darknet_arrays(self) -> dict[str, Tensor]:
        """The other way round than a convolution: the matrix comes before the statistics."""
        if isinstance(self.norm, nn.Identity):
            return {"biases": self.linear.bias, "matrix": self.linear.weight}
        arrays = norm_arrays(self.norm)
        return {"biases": arrays.pop("biases"), "matrix": self.linear.weight} | arrays


class Crnn(nn.Module):
    """[crnn]: three convolutions, input -> hidden, hidden -> hidden, hidden -> output.

    Every picture is its own sequence of length one and the state before it is 0, for training and inference alike;
    Darknet carries the state from frame to frame of a video.
    """

    def __init__(self, channels: int, hidden: int, outputs: int, activation: str, normalized: bool, **keys):
        super().__init__()

        def layer(inputs: int, filters: int) -> Convolutional:
            conv = DarknetConv2d(inputs, filters, bias=not normalized, **keys)
            norm = batch_norm(filters) if normalized else nn.Identity()
            return Convolutional(conv, norm, activation, nn.Identity())

        self.input, self.state, self.output = layer(channels, hidden), layer(hidden, hidden), layer(hidden, outputs)

    @classmethod
    def from_spec(cls, spec) -> "Crnn":
        section, size = spec.section, spec.section.int("size", 3)
        return cls(
            spec.in_shapes[0][0],
            section.int("hidden", 1),
            section.int("output", 1),
            section.str("activation", "logistic"),
            section.flag("batch_normalize"),
            kernel_size=size,
            padding=padding_of(section, size),
        )

    def forward(self, x: Tensor) -> Tensor:
        entered = self.input(x)
        return self.output(entered + self.state(torch.zeros_like(entered)))

    def darknet_arrays(self) -> dict[str, Tensor]:
        parts = {"input": self.input, "self": self.state, "output": self.output}
        return {
            f"{part} {name}": array for part, layer in parts.items() for name, array in layer.darknet_arrays().items()
        }

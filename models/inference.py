"""A network made ready to look, no longer to learn: batch norms folded; on a CPU oneDNN's kernels, called directly.

torch hands a convolution's weights to oneDNN in a plain order, from which they are brought into the processor's own at
every call, and runs bias and activation as passes of their own. Here the weights are reordered once and the activation
is part of the kernel (torch's compiler does the same, after a minute). Results are equal up to rounding: 1e-7 of the
largest output in float32.

Letters: B images, C channels, H W height and width of a map; maps are [B, C, H, W], best in channels-last order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.activations import ACTIVATIONS
from models.convolutional import Convolutional, DarknetConv2d
from models.darknet import Darknet
from models.pooling import MaxPool

FUSED = {  # activation -> what oneDNN calls it, its parameters, its algorithm
    ACTIVATIONS["linear"]: ("none", [], ""),
    ACTIVATIONS["leaky"]: ("leaky_relu", [0.1], ""),
    ACTIVATIONS["relu"]: ("relu", [], ""),
    ACTIVATIONS["logistic"]: ("sigmoid", [], ""),
    ACTIVATIONS["swish"]: ("swish", [], ""),
}


class PackedConvolutional(nn.Module):
    """A fused [convolutional] whose weights are in the order of the processor, in float32 or bfloat16.

    Args:
        shape: (C, H, W) of its usual input, for which oneDNN chooses the order. Others are computed, too.
    """

    def __init__(self, layer: Convolutional, shape: tuple[int, int, int], dtype: torch.dtype):
        super().__init__()
        conv = layer.conv
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        weight = conv.weight.detach().to(dtype).to_mkldnn()
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *self.geometry, [1, *shape])
        self.bias = nn.Parameter(conv.bias.detach().to(dtype), requires_grad=False)
        self.post = FUSED.get(layer.activation, FUSED[ACTIVATIONS["linear"]])
        self.activation = nn.Identity() if layer.activation in FUSED else layer.activation
        self.blur = layer.blur

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.bias.dtype)
        return self.blur(
            self.activation(
                torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, *self.post)
            )
        )


class HalvingPool(nn.Module):
    """[maxpool] of size 2, stride 2: the larger column of two, then the larger row, several times torch's speed."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            return F.max_pool2d(x, 2, 2, ceil_mode=True)  # a window that reaches outside is what is inside of it
        columns = torch.maximum(x[..., ::2], x[..., 1::2])
        return torch.maximum(columns[:, :, ::2], columns[:, :, 1::2])


def for_inference(model: Darknet, device: torch.device, dtype: torch.dtype) -> Darknet:
    """A copy on ``device``, in eval mode, to be run under autocast to ``dtype`` (or float32, without). It cannot be
    trained or saved.
    """
    ready = model.fuse().to(device, memory_format=torch.channels_last)
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and _has_onednn():
        for index, (layer, spec) in enumerate(zip(ready.layers, ready.graph.layers)):
            if isinstance(layer, Convolutional) and _packable(layer):
                ready.layers[index] = PackedConvolutional(layer, spec.in_shapes[0], dtype)
            elif isinstance(layer, MaxPool) and (layer.size, layer.stride, layer.padding) == (2, (2, 2), 1):
                ready.layers[index] = nn.Sequential(HalvingPool(), layer.blur)
    return ready


def _packable(layer: Convolutional) -> bool:
    """A convolution and nothing else: not binary, batch norm folded, float32."""
    plain = type(layer.conv) is DarknetConv2d and isinstance(layer.norm, nn.Identity)
    return plain and layer.conv.weight.dtype == torch.float32


def _has_onednn() -> bool:
    """The two functions are not part of torch's public interface: without them convolutions stay as they are."""
    reorders = hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    return torch.backends.mkldnn.is_available() and reorders and hasattr(torch.ops.mkldnn, "_convolution_pointwise")

"""The network: what a cfg describes, as one module.

Letters: B images, C H W of the images, h w of a head's map, A anchors, P slots of all heads.
"""

import copy
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from models.activations import ACTIVATIONS
from models.cfg import Cfg
from models.convolutional import Convolutional, SharedConvolutional
from models.graph import build_graph
from models.heads import HEADS
from models.layers import LAYERS
from models.structures import Predictions

WITHOUT_PLACE = ("connected", "implicit")  # their outputs have no height and width


class Darknet(nn.Module):
    """A network built from a cfg, one submodule per section, in order.

    A head with ``new_coords=1`` reads sigmoids in Darknet (the convolution before it has ``activation=logistic``). Here
    that sigmoid belongs to the head, so that the raw map of every head is logits.

    Args:
        cfg: the compiled text. Input channels, width and height are its own, but any size that the strides divide runs.

    Raises:
        CfgError: the cfg cannot be built; all its problems at once.
    """

    def __init__(self, cfg: Cfg):
        super().__init__()
        self.cfg = cfg
        self.graph = build_graph(cfg)
        kinds = LAYERS | HEADS
        self.layers = nn.ModuleList(kinds[spec.section.type].from_spec(spec) for spec in self.graph.layers)
        self._share()
        self._move_sigmoids()
        self._init_heads()
        self._inputs = tuple(spec.inputs for spec in self.graph.layers)
        self._done = self._last_reads()
        self._needed = self._ancestors(self.graph.outputs)
        for index in set(range(len(self.layers))) - set(self._needed):
            self.layers[index].requires_grad_(False)  # a branch that only another program's loss reads

    @property
    def heads(self) -> list[nn.Module]:
        return [self.layers[index] for index in self.graph.heads]

    @property
    def num_classes(self) -> int:
        return max(head.num_classes for head in self.heads) if self.graph.heads else self.graph.layers[-1].shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the cfg."""
        return self.cfg.height, self.cfg.width

    @property
    def channels(self) -> int:
        return self.cfg.channels

    @property
    def stride(self) -> int:
        """Pixels per cell of the coarsest map, from the shapes: sides of an input are multiples of it.

        Maps behind a global pool do not count.
        """
        pooled, largest = set(), 1
        for spec in self.graph.layers:
            if spec.section.type == "avgpool" or (spec.inputs and pooled.issuperset(spec.inputs)):
                pooled.add(spec.index)
            elif spec.section.type not in WITHOUT_PLACE:
                largest = max(largest, round(self.cfg.height / spec.shape[1]))
        return largest

    def forward(self, images: Tensor) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Raw maps, one per head in the order of the cfg; of a classifier its only output.

        Args:
            images: float [B, C, H, W] in 0..1.

        Returns:
            float [B, A * (5 + classes), h, w] each (logits throughout); of a head of the second stage its pyramid, a
            tuple of maps.
        """
        wanted = dict.fromkeys(self.graph.outputs)
        for index, output in self._walk(images, self._needed):
            if index in wanted:
                wanted[index] = output
        return tuple(wanted.values())

    def layer_outputs(self, images: Tensor) -> list[Tensor]:
        """The output of every layer, in the order of the cfg: for looking, comparing and counting."""
        return [output for _, output in self._walk(images, range(len(self.layers)))]

    def decode(self, outputs: Sequence[Tensor | tuple[Tensor, ...]], size: tuple[int, int]) -> Predictions:
        """Raw maps -> predictions of all slots, in pixels of an input of ``size`` (H, W)."""
        return Predictions.cat([head.decode(output, size) for head, output in zip(self.heads, outputs)])

    def predict(self, images: Tensor) -> Predictions:
        return self.decode(self(images), tuple(images.shape[-2:]))

    def fuse(self) -> "Darknet":
        """A copy in eval mode, batch normalisations folded into their convolutions. Cannot be trained or saved."""
        fused = copy.deepcopy(self).eval()
        for module in fused.modules():
            if isinstance(module, Convolutional):
                module.fuse()
        return fused

    def _walk(self, images: Tensor, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(index, output) of layer after layer; an output is forgotten after its last reader."""
        outputs = {-1: images}
        for index in indices:
            output = outputs[index] = self.layers[index](*[outputs[source] for source in self._inputs[index]])
            yield index, output
            for source in self._done[index]:
                del outputs[source]

    def _ancestors(self, outputs: Sequence[int]) -> tuple[int, ...]:
        """The layers that the network's outputs are computed from, in order."""
        needed = set(outputs)
        for index in reversed(range(len(self.layers))):
            if index in needed:
                needed.update(self._inputs[index])
        return tuple(sorted(needed - {-1}))

    def _last_reads(self) -> tuple[tuple[int, ...], ...]:
        """Per layer, the outputs that nobody reads after it."""
        done = [[] for _ in self.layers]
        for source, reader in enumerate(self.graph.last_use):
            if reader < len(done):
                done[reader].append(source)
        return tuple(map(tuple, done))

    def _readers(self, index: int) -> list[int]:
        return [spec.index for spec in self.graph.layers if index in spec.inputs]

    def _share(self) -> None:
        """Give every ``share_index`` layer the arrays it names."""
        for spec, layer in zip(self.graph.layers, self.layers):
            if isinstance(layer, SharedConvolutional):
                source = spec.section.int("share_index")
                layer.share(self.layers[source if source >= 0 else spec.index + source])

    def _move_sigmoids(self) -> None:
        """Take the sigmoid of ``new_coords=1`` heads out of the convolution before them."""
        for index in self.graph.heads:
            spec = self.graph.layers[index]
            if not spec.section.flag("new_coords"):
                continue
            before = self.graph.layers[spec.inputs[0]]
            if before.section.type != "convolutional" or before.section.str("activation", "logistic") != "logistic":
                raise spec.section.error(
                    "reads raw values", "new_coords", "the layer before it needs activation=logistic"
                )
            if self._readers(before.index) != [index]:
                raise spec.section.error("shares its input with another layer", "new_coords", "give it its own")
            self.layers[before.index].activation = ACTIVATIONS["linear"]

    def _init_heads(self) -> None:
        """Let every head say how the biases of the convolutions before it start."""
        for index in self.graph.heads:
            before = [self.layers[source] for source in self.graph.layers[index].inputs]
            if all(isinstance(layer, Convolutional) and layer.conv.bias is not None for layer in before):
                self.layers[index].init_bias(*(layer.conv.bias for layer in before))

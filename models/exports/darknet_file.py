"""Darknet's ``.weights`` with its ``.cfg`` and ``.names``: what Darknet and OpenCV read."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from models.cfg import parse_cfg
from models.darknet import Darknet
from models.darknet_weights import Header, read_header, read_weights, write_weights
from models.exports.wish import Export, Wish, boxes_and_scores
from models.file_kind import DARKNET, file_kind
from models.foreign import foreign_to_darknet
from models.section import raise_errors

META = "# matchbox "  # starts the first line of the cfg, a comment


class DarknetExport(Export):
    """Measured by reading the files back. The header of a ``.weights`` file that it came from is kept."""

    def __init__(self, wish: Wish):
        raise_errors(foreign_to_darknet(wish.model.cfg))
        cfg, names = wish.model.cfg, wish.names
        height, width = wish.size
        self.text = cfg.with_options([(cfg.net, "width", width), (cfg.net, "height", height)]).text
        self.names = "".join(f"{name}\n" for name in names)
        header = read_header(wish.weights)[0] if file_kind(wish.weights) == DARKNET else Header()
        self.model = Darknet(parse_cfg(self.text, "exported cfg")).eval()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.weights"
            write_weights(wish.model, path, header)
            self.weights = path.read_bytes()
            read_weights(self.model, path)

    @torch.no_grad()
    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return boxes_and_scores(self.model, images)

    def files(self, meta: str) -> dict[str, bytes]:
        text = f"{META}{meta}\n{self.text}"
        return {".weights": self.weights, ".cfg": text.encode(), ".names": self.names.encode()}

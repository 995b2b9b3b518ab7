"""OpenVINO's ``.xml`` and ``.bin``, made from ONNX by OpenVINO's own reader."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.exports.onnx_file import OnnxExport
from models.exports.wish import Export, Wish, needed

META = "matchbox"  # the entry of the model's rt_info
INSTALL = "openvino onnx onnxscript"
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # else processors that have bfloat16 compute in it


class OpenvinoExport(Export):
    """Measured in OpenVINO on the CPU. ``half`` stores weights in float16; the device chooses how it computes."""

    offers = OnnxExport.offers

    def __init__(self, wish: Wish):
        openvino, *_ = (needed(package, "--format openvino", INSTALL) for package in INSTALL.split())
        source = OnnxExport(replace(wish, half=False), runtime=False)
        self.runtime = f"OpenVINO {openvino.__version__}"
        self.half, self.core = wish.half, openvino.Core()
        self.save = openvino.save_model
        self.model = self._read(source.model)
        plain = self._read(source.plain) if wish.nms else self.model
        self.compiled, self.suppressing = self._compile(plain), self._compile(self.model) if wish.nms else None

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return _tensors(self.compiled(images.numpy()))

    def detect(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _tensors(self.suppressing(images.numpy()))

    def files(self, meta: str) -> dict[str, bytes]:
        self.model.set_rt_info(meta, [META])
        return self._stored(self.model)

    def _read(self, proto):
        return self.core.read_model(proto.SerializeToString(), b"")

    def _stored(self, model) -> dict[str, bytes]:
        """OpenVINO writes to paths only."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.xml"
            self.save(model, str(path), compress_to_fp16=self.half)
            return {suffix: path.with_suffix(suffix).read_bytes() for suffix in (".xml", ".bin")}

    def _compile(self, model):
        """As it will be read back, hence with weights as they are stored."""
        stored = self._stored(model)
        return self.core.compile_model(self.core.read_model(stored[".xml"], stored[".bin"]), "CPU", EXACT)


def _tensors(results) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(value.copy()) for value in results.values())

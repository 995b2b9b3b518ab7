"""Networks for other programs: one file per format, and the dict of them."""

from models.exports.darknet_file import DarknetExport
from models.exports.onnx_file import OnnxExport
from models.exports.openvino_file import OpenvinoExport
from models.exports.torch_file import ScriptExport, TorchExport

EXPORTS = {
    "onnx": OnnxExport,
    "torchscript": ScriptExport,
    "torch": TorchExport,
    "darknet": DarknetExport,
    "openvino": OpenvinoExport,
}

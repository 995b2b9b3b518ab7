"""ONNX, by torch's exporter, and non-maximum suppression as ONNX operators behind it.

Letters: B pictures, P slots, N classes, K detections per picture.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from torch import Tensor

from models.exports.torch_file import exported_program
from models.exports.wish import INPUT, OUTPUTS, Export, Suppression, Wish, needed
from utils.errors import UserError

OPSET = 18  # the exporter's own, which OpenCV 4 reads
META = "matchbox"  # the key of metadata_props
INSTALL = "onnx onnxscript onnxruntime"
RAW = tuple(f"raw_{name}" for name in OUTPUTS)  # what boxes and scores are called before they are suppressed
LARGEST = 2**31 - 1  # bytes of one protobuf message

# Scores that survive stay in a table [B, P, N] that is zero elsewhere; the best K of each picture are read from it in
# the order of `postprocess`: by score, equal ones by slot, then class.
SUPPRESSION = """
<ir_version: {ir_version}, opset_import: ["" : {opset}]>
suppression (float[B, P, 4] raw_boxes, float[B, P, N] raw_scores)
    => (float[B, K, 4] boxes, float[B, K] scores, int64[B, K] labels)
<int64[1] max_det = {{{max_det}}}, float[1] iou_thres = {{{iou_thres}}}, float[1] conf_thres = {{{conf_thres}}},
 int64[3] image_slot_class = {{0, 2, 1}}, int64[2] flat = {{0, -1}}, int64[1] last = {{-1}}>
{{
    by_class = Transpose <perm = [0, 2, 1]> (raw_scores)
    kept = NonMaxSuppression (raw_boxes, by_class, max_det, iou_thres, conf_thres)
    place = Gather <axis = 1> (kept, image_slot_class)
    survivors = GatherND (raw_scores, place)
    extent = Shape (raw_scores)
    nothing = ConstantOfShape (extent)
    table = ScatterND (nothing, place, survivors)
    rows = Reshape (table, flat)
    candidates = Shape <start = 1> (rows)
    num = Min (candidates, max_det)
    scores, position = TopK <axis = 1> (rows, num)
    num_classes = Shape <start = 2> (raw_scores)
    labels = Mod (position, num_classes)
    slot = Div (position, num_classes)
    slot_of_image = Unsqueeze (slot, last)
    boxes = GatherND <batch_dims = 1> (raw_boxes, slot_of_image)
}}
"""


class OnnxExport(Export):
    """One ``.onnx`` file, weights inside; measured in ONNX Runtime if there is to be a ``runtime``."""

    offers = frozenset({"batch_size", "dynamic", "half", "nms"})

    def __init__(self, wish: Wish, runtime: bool = True):
        if runtime:
            *_, onnxruntime = (needed(package, "--format onnx", INSTALL) for package in INSTALL.split())
            self.runtime = f"ONNX Runtime {onnxruntime.__version__}"
        self.model = self.plain = to_onnx(wish)
        if wish.nms:
            self.model = with_suppression(self.plain, wish.nms)
        if runtime:
            self.session = session(self.plain)
            self.suppressing = session(self.model) if wish.nms else None

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(map(torch.from_numpy, self.session.run(None, {INPUT: images.numpy()})))

    def detect(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(map(torch.from_numpy, self.suppressing.run(None, {INPUT: images.numpy()})))

    def elsewhere(self, images: Tensor) -> tuple[str, Callable]:
        """OpenCV, which knows fixed shapes and no suppression."""
        return f"OpenCV {cv2.__version__}", self._in_opencv

    def _in_opencv(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with quiet_opencv():
            net = cv2.dnn.readNetFromONNX(np.frombuffer(self.model.SerializeToString(), np.uint8))
            net.setInput(images.numpy(), INPUT)
            return tuple(map(torch.from_numpy, net.forward(list(OUTPUTS))))

    def files(self, meta: str) -> dict[str, bytes]:
        entry = self.model.metadata_props.add()
        entry.key, entry.value = META, meta
        return {".onnx": self.model.SerializeToString()}


def to_onnx(wish: Wish):
    """The ModelProto of boxes and scores. Errors: UserError for a network beyond 2 GiB."""
    program = exported_program(wish)
    with quiet_torch():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=list(RAW if wish.nms else OUTPUTS),
            opset_version=OPSET,
            verbose=False,
        )
    model = exported.model_proto
    for part in (*model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]  # which line of ours made it
    if model.ByteSize() > LARGEST:
        raise UserError(wish.weights, f"{model.ByteSize()} bytes, one ONNX file holds {LARGEST}", "--format torch")
    return with_kernel_shapes(model)


def with_kernel_shapes(model):
    """The same ModelProto; every convolution says its kernel's size, which OpenCV does not take from the kernel."""
    import onnx

    kernels = {array.name: list(array.dims[2:]) for array in model.graph.initializer}
    for node in model.graph.node:
        said = {attribute.name for attribute in node.attribute}
        if node.op_type == "Conv" and "kernel_shape" not in said and node.input[1] in kernels:
            node.attribute.append(onnx.helper.make_attribute("kernel_shape", kernels[node.input[1]]))
    return model


def with_suppression(model, rule: Suppression):
    """The same ModelProto followed by non-maximum suppression; outputs boxes, scores, labels."""
    import onnx

    opset, ir_version = model.opset_import[0].version, model.ir_version
    tail = onnx.parser.parse_model(SUPPRESSION.format(opset=opset, ir_version=ir_version, **vars(rule)))
    joined = onnx.compose.merge_models(model, tail, [(name, name) for name in RAW])
    onnx.checker.check_model(joined)
    return joined


def session(model):
    """A ModelProto in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """torch.onnx's remarks about itself, held back."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """What OpenCV cannot read is said once, by its exception."""
    log = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # it moved within OpenCV 4
    level = log.getLogLevel()
    log.setLogLevel(0)
    try:
        yield
    finally:
        log.setLogLevel(level)

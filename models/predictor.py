"""Network and post-processing as one callable: uint8 pictures in, detections out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.darknet import Darknet
from models.postprocess import NMS_KINDS, postprocess
from utils.structures import Detections
from utils.timing import Timer


class Predictor:
    """``predictor(images) -> list[Detections]``, boxes in pixels of the images given, best first.

    Puts the model in eval mode and on the device. Overlap is measured as the last head's ``nms_kind`` and ``beta_nms``
    say, as in Darknet, unless ``kind`` says otherwise.

    Args:
        device: where to run; None: where the model is.
        conf_thres, iou_thres, max_det, classes, agnostic, multi_label: see `postprocess`.
        kind: a key of ``NMS_KINDS``.
        amp: autocast to bfloat16 or float16. None computes in the model's own dtype: exact parity with Darknet.

    ``timer.seconds`` collects "pre" (hand-over and scaling), "inference" (network) and "nms" (decoding too).
    """

    def __init__(
        self,
        model: Darknet,
        *,
        device: torch.device | str | None = None,
        conf_thres: float = 0.25,
        iou_thres: float = 0.45,
        max_det: int = 300,
        classes: Sequence[int] | None = None,
        agnostic: bool = False,
        multi_label: bool = True,
        kind: str | None = None,
        amp: torch.dtype | None = None,
    ):
        parameter = next(model.parameters())
        self.device, self.dtype, self.amp = torch.device(device or parameter.device), parameter.dtype, amp
        self.model = model.to(self.device).eval()
        section = model.heads[-1].section
        self.options = {
            "conf_thres": conf_thres,
            "iou_thres": iou_thres,
            "max_det": max_det,
            "classes": classes,
            "agnostic": agnostic,
            "multi_label": multi_label,
            "kind": kind or section.str("nms_kind", "default", choices=NMS_KINDS),
            "beta_nms": section.float("beta_nms", 0.6),
        }
        self.timer = Timer(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[Detections]:
        """What is in each of ``images`` (uint8 [B, C, H, W])."""
        assert images.dtype == torch.uint8 and images.ndim == 4, (
            f"uint8 [B, C, H, W], not {images.dtype} {images.shape}"
        )
        self.model.eval()  # a training loop may have switched it meanwhile
        with self.timer("pre"):
            images = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            images = images.to(self.dtype) / 255
        with self.timer("inference"), torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            outputs = self.model(images)
        with self.timer("nms"):
            size = tuple(images.shape[2:])
            return postprocess(self.model.decode(outputs, size), size=size, **self.options)

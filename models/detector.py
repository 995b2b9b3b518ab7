"""A detector in somebody's own program: ``from models import load``; pictures in, detections out.

    detector = load("best.safetensors")
    found = detector("dog.jpg")                 # Detections: boxes in pixels of the picture, scores, labels
    names = [detector.names[label] for label in found.labels]

test.py and detect.py stand on the same class: from weights to one ``predict`` happens here only.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import torch

from models.fusion import LOOKS, Fusion, View
from models.inference import for_inference
from models.loading import Loaded, find_file, input_size, load_networks, stretches
from models.predictor import Predictor
from utils.arguments import class_numbers
from utils.datasets.in_memory import as_image, is_several, place
from utils.datasets.records import read_names
from utils.errors import UserError, nearest
from utils.run import PRECISIONS, Precision, select_device, select_precision
from utils.structures import Detections

BATCH_SIZE = 8


class Detector:
    """``detector(images) -> Detections`` in the pixels of the original pictures, on the CPU, best first.

    Several networks, or one that looks several times, are one `Fusion`. Without ``img_size`` each sees the input size
    of its own cfg; pictures are first fitted to the largest.

    Args:
        networks: what `load_networks` returns.
        device, precision: where and how to compute.
        img_size: side, or height and width, of the network's input in pixels; None: the cfg's.
        resize: "letterbox" or "stretch"; None: as the cfg says.
        classes: names or numbers of those to keep; None: all.
        augment: look mirrored, smaller and larger, too (`LOOKS`).
        conf_thres, iou_thres, max_det, agnostic: see `postprocess`.

    ``names`` are those of the classes; ``predict`` is the `Predictor` or `Fusion` behind it, for uint8 batches of
    ``size`` or any other multiple of ``stride``; ``stretch`` says how pictures get there.

    Raises:
        UserError: networks are made for pictures that are fitted differently, or cannot be merged.
    """

    def __init__(
        self,
        networks: Sequence[Loaded],
        *,
        device: torch.device,
        precision: Precision,
        img_size: Sequence[int] | None = None,
        resize: str | None = None,
        classes: Sequence[str] | None = None,
        augment: bool = False,
        conf_thres: float = 0.25,
        iou_thres: float = 0.45,
        max_det: int = 300,
        agnostic: bool = False,
    ):
        models = [network.model for network in networks]
        self.names, self.channels = networks[0].names, models[0].channels
        self.stride = max(model.stride for model in models)
        ways = {stretches(resize, model) for model in models}
        if len(ways) > 1:
            raise UserError("--resize", "the cfgs differ in letter_box", "letterbox or stretch, for all of them")
        (self.stretch,) = ways
        sizes = [input_size(img_size, model) for model in models]
        self.size = max(height for height, _ in sizes), max(width for _, width in sizes)
        looks, thresholds = LOOKS if augment else LOOKS[:1], {"iou_thres": iou_thres, "max_det": max_det}
        num_views = len(models) * len(looks)
        predictors = [
            Predictor(
                for_inference(model, device, precision.dtype),
                device=device,
                amp=precision.autocast,
                classes=class_numbers(classes, self.names),
                conf_thres=conf_thres / num_views,  # what only one view finds must be surer by so much
                agnostic=agnostic,
                **thresholds,
            )
            for model in models
        ]
        self.predict = predictors[0]
        if num_views > 1:
            views = [
                View(predict=predict, scale=(scale * height / self.size[0], scale * width / self.size[1]), mirrored=way)
                for predict, (height, width) in zip(predictors, sizes)
                for scale, way in looks
            ]
            where = "--augment" if augment else "--weights"
            self.predict = Fusion(views, conf_thres=conf_thres, agnostic=agnostic, where=where, **thresholds)

    def __call__(self, images) -> Detections | list[Detections]:
        """What is in a picture, or a list of what is in each of several.

        Args:
            images: what `as_image` takes, or a list, an iterator, an array [B, H, W, C] or a tensor [B, C, H, W] of it.
                They may differ in size; at most `BATCH_SIZE` are held at once.

        Raises:
            UserError: what is no picture; names the file, or the place in the list.
        """
        if is_several(images):
            return list(self._look(images))
        return next(self._look([images]))

    def _look(self, pictures: Iterable) -> Iterator[Detections]:
        pictures, numbers = iter(pictures), count()
        while batch := list(islice(pictures, BATCH_SIZE)):
            images = [as_image(picture, self.channels, f"image {number}") for picture, number in zip(batch, numbers)]
            infos, canvases = place(images, self.size, stretch=self.stretch, paths=[""] * len(images))
            for info, found in zip(infos, self.predict(canvases), strict=True):
                yield found.cpu().to_original(info)


def load(
    weights: str | Path | Sequence[str | Path],
    *,
    cfg: str | Path | Sequence[str | Path] | None = None,
    names: str | Path | Sequence[str] | None = None,
    device: str = "",
    precision: str = "auto",
    img_size: int | Sequence[int] | None = None,
    resize: str | None = None,
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    max_det: int = 300,
    classes: Sequence[str | int] | None = None,
    agnostic: bool = False,
    augment: bool = False,
) -> Detector:
    """A detector from a file, or several; the words mean what they mean as flags of detect.py.

    Args:
        weights: a checkpoint, or ``.weights`` / ``.pt`` together with ``cfg``. A plain name is looked for in the
            project's folders, too. A list of them is an ensemble.
        names: the classes, as a list or a ``.names``, ``.yaml`` or ``.data`` file; a checkpoint knows its own.
        device: "" the first GPU if there is one, else the CPU; "cpu"; "0".
        precision: "float32", "bf16", "fp16" (CUDA), or "auto": bf16 where the processor has it.

    Raises:
        UserError (a ValueError): a file or value is wrong; one line that says which, what was found, and a cure.
    """
    known = ["auto", *PRECISIONS]
    if precision not in known:
        raise UserError("precision", f"no such precision: '{precision}'", nearest(precision, known))
    if resize not in (None, "letterbox", "stretch"):
        raise UserError("resize", f"found '{resize}'", "expected letterbox or stretch")
    for name, value in (("conf_thres", conf_thres), ("iou_thres", iou_thres)):
        if not 0 <= value <= 1:
            raise UserError(name, f"expected a number from 0 to 1, found {value}")
    if max_det < 1:
        raise UserError("max_det", f"expected a whole number from 1, found {max_det}")
    device = select_device(device)
    if isinstance(names, (str, Path)):
        names = read_names(find_file(names, "names file"))
    return Detector(
        load_networks(_listed(weights), cfg=_listed(cfg) if cfg else None, names=names),
        device=device,
        precision=select_precision(precision, device),
        img_size=[img_size] if isinstance(img_size, int) else img_size,
        resize=resize,
        classes=None if classes is None else [str(each) for each in classes],
        conf_thres=conf_thres,
        iou_thres=iou_thres,
        max_det=max_det,
        agnostic=agnostic,
        augment=augment,
    )


def _listed(files: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [files] if isinstance(files, (str, Path)) else list(files)

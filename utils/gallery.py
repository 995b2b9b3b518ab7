"""Pictures of a run to look at: what the network was shown, and what it found."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from utils.draw import batch_mosaic, draw_boxes, draw_detections
from utils.logger import Logger
from utils.results import write_image
from utils.structures import Batch, Detections

MAX_IMAGES = 16  # of a batch, in one picture


class Gallery:
    """Saves mosaics of batches into a run's folder and TensorBoard.

    Args:
        logger: a training's, which failing to draw must not stop; None: no TensorBoard, and errors are errors.
        num_batches: how many batches of each kind are drawn.
    """

    def __init__(self, folder: Path, names: list[str], logger: Logger | None = None, *, num_batches: int = 3):
        self.folder, self.names, self.logger, self.num_batches = folder, names, logger, num_batches
        self.guard = logger.guard if logger else nullcontext
        self.num_val = 0
        self.followed_batch: Batch | None = None  # the same after every epoch

    def train(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the first of them are drawn with their targets on the way."""
        for number, batch in enumerate(batches):
            if number < self.num_batches:
                with self.guard("train_batch pictures"):
                    self._save(f"train_batch{number}", [_with_targets(batch, row, self.names) for row in _rows(batch)])
            yield batch

    def val(self, batch: Batch, detections: list[Detections]) -> None:
        """The first batches of an evaluation: labels and predictions. Detections are in pixels of the originals."""
        if self.num_val < self.num_batches:
            with self.guard("val_batch pictures"):
                self._save(
                    f"val_batch{self.num_val}_labels", [_with_targets(batch, row, self.names) for row in _rows(batch)]
                )
                found = [_with_detections(batch, row, detections[row], self.names) for row in _rows(batch)]
                self._save(f"val_batch{self.num_val}_pred", found)
        self.num_val += 1

    def followed(self, epoch: int) -> Callable[[Batch, list[Detections]], None]:
        """An ``observe`` for an epoch's evaluation: what is found in its first batch, the same pictures every epoch."""
        seen = []

        def observe(batch: Batch, detections: list[Detections]) -> None:
            if not seen:
                self.followed_batch = batch
                with self.guard("pictures of the epochs"):
                    drawn = [_with_detections(batch, row, detections[row], self.names) for row in _rows(batch)]
                    self._save("val_batch0_epoch", drawn, epoch)
            seen.append(len(batch))

        return observe

    def sheets(self, name: str, draw: Callable[[], list[np.ndarray]], epoch: int) -> None:
        """Pictures of an epoch; the files are the newest, TensorBoard keeps all."""
        with self.logger.guard(f"{name} pictures"):
            for number, picture in enumerate(draw()):
                self._save(f"{name}{number}", [picture], epoch)

    def _save(self, name: str, images: list[np.ndarray], epoch: int = 0) -> None:
        picture = batch_mosaic(images)
        write_image(self.folder / f"{name}.jpg", picture)
        if self.logger:
            self.logger.picture(name, picture, epoch)


def _rows(batch: Batch) -> range:
    return range(min(len(batch), MAX_IMAGES))


def _image(batch: Batch, row: int) -> np.ndarray:
    """uint8 [H, W, 3]; grey pictures are shown as such."""
    image = batch.images[row].permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def _with_targets(batch: Batch, row: int, names: list[str]) -> np.ndarray:
    mine = batch.targets.image == row
    boxes, labels, masks = batch.targets.boxes[mine], batch.targets.labels[mine], batch.targets.masks
    return draw_boxes(_image(batch, row), boxes, labels, names, masks=None if masks is None else masks[mine])


def _with_detections(batch: Batch, row: int, found: Detections, names: list[str]) -> np.ndarray:
    shown = found[torch.nonzero(found.scores >= 0.25).squeeze(1)]
    placed = replace(shown, boxes=batch.infos[row].letterbox.apply(shown.boxes))
    return draw_detections(_image(batch, row), placed, names)

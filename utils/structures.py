"""The data's nouns. Boxes are float32 xyxy in pixels; which pixels is part of each type.

Letters: B images, N objects, R ignore regions, n rows of one image, H W height and width, G rings of n objects, V their
corners, S side of a mask in its box's frame.

A mask is an outline (``Outlines``) where objects still move, and pixels in the frame of its own box where a network
sees or makes it: ``[S, S]`` cells that divide the box evenly, whatever its size. ``utils/outlines.py`` makes pixels,
``utils/mask_frames.py`` puts them on a picture.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from utils.mask_frames import reframe


@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """How an image was placed on the network's canvas: ``canvas = image * scale + pad``.

    Law: ``undo(apply(boxes)) == boxes`` up to float rounding. Darknet's plain stretch is the case of two different
    scales and no pad.
    """

    scale: tuple[float, float] = (1.0, 1.0)  # x, y
    pad: tuple[float, float] = (0.0, 0.0)  # left, top, in canvas pixels

    def apply(self, boxes):
        """Boxes [n, 4] or points [n, 2] (numpy or torch), original pixels -> canvas pixels."""
        return boxes * self._like(boxes, self.scale) + self._like(boxes, self.pad)

    def undo(self, boxes):
        """Boxes [n, 4] or points [n, 2] (numpy or torch), canvas pixels -> original pixels. Does not clip."""
        return (boxes - self._like(boxes, self.pad)) / self._like(boxes, self.scale)

    @staticmethod
    def _like(boxes, pair):
        values = pair * (boxes.shape[-1] // 2)
        if isinstance(boxes, Tensor):
            return torch.tensor(values, dtype=boxes.dtype, device=boxes.device)
        return np.asarray(values, dtype=boxes.dtype)


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """One picture's identity and how it was placed."""

    id: int  # position in the data set's list of records; evaluation joins on it
    path: str
    size: tuple[int, int]  # height, width of the original, EXIF orientation applied
    letterbox: Letterbox = Letterbox()


@dataclass(frozen=True, kw_only=True)
class Outlines:
    """What n objects cover: each the union of its rings, each ring a closed polygon filled by the even-odd rule.

    Flat, so that the outlines of a whole data set are three arrays. Corners are in the pixels of the boxes beside them.
    """

    corners: np.ndarray  # float32 [V, 2] x, y, ring after ring
    starts: np.ndarray  # int64 [G + 1]: the first corner of each ring, and their number
    owner: np.ndarray  # int64 [G], non-decreasing: the object a ring belongs to; one may have none
    num: int  # n

    @classmethod
    def of(cls, objects) -> "Outlines":
        """From a list of rings [k, 2] for each object."""
        rings = [ring for mine in objects for ring in mine]
        return cls(
            corners=np.concatenate([np.zeros((0, 2)), *rings]).astype(np.float32),
            starts=np.cumsum([0, *map(len, rings)], dtype=np.int64),
            owner=np.repeat(np.arange(len(objects)), [len(mine) for mine in objects]),
            num=len(objects),
        )

    @classmethod
    def cat(cls, parts: list["Outlines"]) -> "Outlines":
        """The objects of several, one after the other."""
        lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.starts) for part in parts)])
        first = np.cumsum([0, *(part.num for part in parts)])
        return cls(
            corners=np.concatenate([np.zeros((0, 2), np.float32), *(part.corners for part in parts)]),
            starts=np.append(0, np.cumsum(lengths)),
            owner=np.concatenate([np.zeros(0, np.int64), *(part.owner + row for part, row in zip(parts, first))]),
            num=int(first[-1]),
        )

    def __len__(self) -> int:
        return self.num

    def between(self, start: int, stop: int) -> "Outlines":
        """The objects start..stop - 1, at a cost that does not grow with the others."""
        low, high = np.searchsorted(self.owner, (start, stop))
        corner, end = self.starts[low], self.starts[high]
        return Outlines(
            corners=self.corners[corner:end],
            starts=self.starts[low : high + 1] - corner,
            owner=self.owner[low:high] - start,
            num=stop - start,
        )

    def __getitem__(self, kept: np.ndarray) -> "Outlines":
        """The objects where ``kept`` (bool [n])."""
        rings, lengths = kept[self.owner], np.diff(self.starts)
        return Outlines(
            corners=self.corners[np.repeat(rings, lengths)],
            starts=np.append(0, np.cumsum(lengths[rings])),
            owner=(np.cumsum(kept) - 1)[self.owner[rings]],
            num=int(kept.sum()),
        )

    def moved(self, corners: np.ndarray) -> "Outlines":
        """The same rings with other corners [V, 2]."""
        return replace(self, corners=corners.astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class Record:
    """One annotated picture as a data set describes it, in pixels of the original (EXIF orientation applied).

    A row with ``ignore`` is a region where nothing is right or wrong (COCO iscrowd, VOC difficult): no gradient inside,
    not counted by evaluation. ``crowd`` marks those of them that COCO matches by intersection over detection area.
    """

    path: str
    size: tuple[int, int]  # height, width
    boxes: np.ndarray  # float32 [n, 4] xyxy
    labels: np.ndarray  # int64 [n], 0-based position in names
    ignore: np.ndarray  # bool [n]
    crowd: np.ndarray  # bool [n], a subset of ignore
    area: np.ndarray  # float32 [n], the annotated (mask) area where there is one, else width * height
    image_id: int | str | None = None  # the data set's own id (COCO), for results files
    outlines: Outlines | None = None  # of the n objects, where masks were asked for


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture on its way to the network: the image and its boxes always move together."""

    image: np.ndarray  # uint8 [H, W, C], RGB or grey
    boxes: np.ndarray  # float32 [n, 4] xyxy, pixels of ``image``
    labels: np.ndarray  # int64 [n]
    ignore: np.ndarray  # bool [n]
    info: ImageInfo
    outlines: Outlines | None = None  # of the n objects, pixels of ``image``; may reach beyond their clipped boxes

    def replace(self, **changes) -> "Sample":
        return replace(self, **changes)

    def outlines_after(self, change) -> Outlines | None:
        """The outlines when ``change`` (corners [V, 2] -> corners [V, 2]) is made to them."""
        return None if self.outlines is None else self.outlines.moved(change(self.outlines.corners))


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The objects of a batch, flat: row i belongs to picture ``image[i]``; boxes in pixels of the network's input.

    Ignore regions stand apart (``ignore_image`` [R], ``ignore_boxes`` [R, 4]), so that no assigner needs a boolean
    mask over objects, which would be a device sync.
    """

    image: Tensor  # int64 [N], non-decreasing
    labels: Tensor  # int64 [N]
    boxes: Tensor  # float32 [N, 4] xyxy
    ignore_image: Tensor  # int64 [R]
    ignore_boxes: Tensor  # float32 [R, 4] xyxy
    max_per_image: int  # objects of the fullest picture: sizes tables on the device without asking it
    masks: Tensor | None = None  # uint8 [N, S, S] of 0 and 1: what each object covers of its own box; None: not known

    @classmethod
    def of(cls, image, labels, boxes, ignore_image=None, ignore_boxes=None, masks=None) -> "Targets":
        """Targets without ignore regions unless they are given. Counts objects, hence for tensors of the host."""
        if ignore_image is None:
            ignore_image, ignore_boxes = image.new_zeros(0), boxes.new_zeros(0, 4)
        return cls(
            image=image,
            labels=labels,
            boxes=boxes,
            ignore_image=ignore_image,
            ignore_boxes=ignore_boxes,
            max_per_image=int(image.bincount().max()) if len(image) else 0,
            masks=masks,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, *args, **kwargs) -> "Targets":
        return Targets(**{name: _to(value, *args, **kwargs) for name, value in vars(self).items()})

    def pin_memory(self) -> "Targets":
        pinned = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **pinned)


def _to(tensor: Tensor | int | None, device=None, dtype=None, non_blocking: bool = False) -> Tensor | int | None:
    """Move a tensor; a dtype applies to floating-point tensors only (indices stay integers)."""
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, non_blocking=non_blocking)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the loader hands over: images stay uint8 until they are on the device.

    ``pin_memory`` is called by torch's loader; without the method it would silently pin nothing.
    """

    images: Tensor  # uint8 [B, C, H, W], channels-last in memory
    targets: Targets
    infos: tuple[ImageInfo, ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device, non_blocking: bool = True) -> "Batch":
        return Batch(
            images=self.images.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            infos=self.infos,
        )

    def pin_memory(self) -> "Batch":
        return Batch(images=self.images.pin_memory(), targets=self.targets.pin_memory(), infos=self.infos)


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What was found in one picture, best first. The producer says which pixels the boxes are in."""

    boxes: Tensor  # float32 [n, 4] xyxy
    scores: Tensor  # float32 [n] in 0..1
    labels: Tensor  # int64 [n]
    masks: Tensor | None = None  # float32 [n, S, S] in 0..1: whether a cell of the box is the object; None: boxes only
    ids: Tensor | None = None  # int64 [n]: the number of an object over the frames of a video, 0: none yet
    num_invalid: int = 0  # of what the network said here, left out because a box or score was no number

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows) -> "Detections":
        return self._each(lambda tensor: tensor[rows])

    def cpu(self) -> "Detections":
        return self._each(Tensor.cpu)

    def _each(self, change) -> "Detections":
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def to_original(self, info: ImageInfo) -> "Detections":
        """From pixels of the network's input to pixels of the original picture, clipped to it.

        What lies in the letterbox's margin only is no detection in the picture, and left out.
        """
        boxes = info.letterbox.undo(self.boxes)
        height, width = info.size
        x, y = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
        inside = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
        masks = None if self.masks is None else reframe(self.masks, boxes, inside)
        clipped = replace(self, boxes=inside, masks=masks)
        return clipped[((x[:, 0] < x[:, 1]) & (y[:, 0] < y[:, 1])).nonzero().squeeze(1)]

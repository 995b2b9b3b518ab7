"""Pictures that a program already has, in whatever form, and how several of them become one batch.

Letters: B pictures, C channels, H W height and width.
"""

import os
from collections.abc import Callable, Iterable, Sequence

import cv2
import numpy as np
import torch
from PIL.Image import Image
from PIL.ImageOps import exif_transpose
from torch import Tensor

from utils.datasets.images import decode_image, read_image
from utils.datasets.letterbox import letterbox
from utils.errors import UserError
from utils.structures import ImageInfo

CHANNELS = (1, 3, 4)  # grey, colour, colour with alpha, which is dropped


def as_image(picture, channels: int = 3, where: object = "<image>") -> np.ndarray:
    """uint8 [H, W, C], RGB or grey, upright: what the file reader would have given.

    Args:
        picture: the path of an image file; the bytes of one; a PIL image (its EXIF orientation is applied); an array
            uint8 [H, W] or [H, W, C], RGB; a tensor, uint8 or float in 0..1, [H, W] or [C, H, W], RGB.
        channels: 3 or 1.
        where: what errors name if the picture has no path.

    Raises:
        UserError: none of these; its text says what was found. ImageError of a file that cannot be used.
    """
    for kinds, convert in CONVERSIONS.items():
        if isinstance(picture, kinds):
            return convert(picture, channels, where)
    raise UserError(where, f"found {type(picture).__name__}", "expected a path, bytes, array, tensor or PIL image")


def is_several(pictures) -> bool:
    """Whether this is pictures (a list, an iterator, an array or tensor with four axes) or one picture."""
    if isinstance(pictures, (np.ndarray, Tensor)):
        return pictures.ndim == 4
    return isinstance(pictures, Iterable) and not isinstance(pictures, sum(CONVERSIONS, ()))


def place(
    images: Sequence[np.ndarray], size: tuple[int, int], *, stretch: bool, paths: Sequence[str]
) -> tuple[list[ImageInfo], Tensor]:
    """Pictures uint8 [H, W, C] on canvases of ``size`` (H, W): where each lies, and the batch uint8 [B, C, H, W]."""
    placed = [letterbox(image, size, stretch=stretch) for image in images]
    infos = [
        ImageInfo(id=number, path=path, size=image.shape[:2], letterbox=box)
        for number, (image, path, (_, box)) in enumerate(zip(images, paths, placed, strict=True))
    ]
    return infos, torch.from_numpy(np.stack([canvas for canvas, _ in placed])).permute(0, 3, 1, 2)


def _from_file(path, channels: int, where: object) -> np.ndarray:
    return read_image(os.fspath(path), channels)


def _from_bytes(data: bytes, channels: int, where: object) -> np.ndarray:
    return decode_image(bytes(data), channels, where=where)


def _from_pil(picture: Image, channels: int, where: object) -> np.ndarray:
    picture = exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # as the reader of files: the upper eight bits
        return _from_array((np.asarray(picture) >> 8).astype(np.uint8), channels, where)
    if picture.mode in ("I", "F"):
        raise UserError(where, f"a PIL image of mode {picture.mode}, whose range is not defined", "convert it to RGB")
    return _from_array(np.asarray(picture if picture.mode == "L" else picture.convert("RGB")), channels, where)


def _from_tensor(picture: Tensor, channels: int, where: object) -> np.ndarray:
    shape, picture = tuple(picture.shape), picture.detach().cpu()
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and shape[0] not in CHANNELS):
        raise UserError(where, f"a tensor of shape {shape}", "tensors are [C, H, W] or [B, C, H, W], arrays [H, W, C]")
    if picture.is_floating_point():
        if picture.numel() and not (picture.min() >= 0 and picture.max() <= 1):  # also false for what is no number
            found = f"a float tensor from {picture.min():.4g} to {picture.max():.4g}"
            raise UserError(where, f"{found}, expected 0..1", "divide by 255, or pass uint8")
        picture = (picture * 255).round().to(torch.uint8)
    if picture.ndim == 3:
        picture = picture.permute(1, 2, 0)
    return _from_array(picture.numpy(), channels, where)


def _from_array(picture: np.ndarray, channels: int, where: object) -> np.ndarray:
    if picture.dtype != np.uint8:
        raise UserError(where, f"pixels of type {picture.dtype}, expected uint8", "0..255; floats only as a tensor")
    if picture.ndim == 2:
        picture = picture[:, :, None]
    if picture.ndim != 3 or picture.shape[2] not in CHANNELS or not picture.size:
        hint = "arrays are [H, W, C] or [B, H, W, C], tensors [C, H, W]"
        raise UserError(where, f"an array of shape {picture.shape}", hint)
    picture = np.ascontiguousarray(picture[:, :, :3])
    if picture.shape[2] == channels:
        return picture
    colours = cv2.COLOR_GRAY2RGB if channels == 3 else cv2.COLOR_RGB2GRAY
    return cv2.cvtColor(picture, colours).reshape(*picture.shape[:2], channels)


CONVERSIONS: dict[tuple[type, ...], Callable] = {
    (str, os.PathLike): _from_file,
    (bytes, bytearray, memoryview): _from_bytes,
    (Image,): _from_pil,
    (Tensor,): _from_tensor,
    (np.ndarray,): _from_array,
}

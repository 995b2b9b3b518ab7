"""Darknet's ``.weights``: little-endian, a header of 16 or 20 bytes, then float32 arrays in the order of the cfg.

No names, no checksum: the size is the only sign that a file belongs to a cfg, so it has to be right to the byte. Unlike
Darknet, which reads whatever is there and stops, a file of another size is refused unless a ``cutoff`` is asked for.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.darknet import Darknet
from models.file_kind import DARKNET, file_kind
from utils.errors import UserError
from utils.files import atomic_write, read_bytes

TURNED_ABOVE = 1000  # a major or minor version above it: matrices of [connected] are stored [in][out]
SCALES = ("scales", "mean", "variance")  # what ``dontloadscales`` leaves out


@dataclass(frozen=True, kw_only=True)
class Header:
    """The start of a file; the default is what Darknet writes today. ``seen`` counts training images."""

    major: int = 0
    minor: int = 2
    revision: int = 5
    seen: int = 0

    @property
    def seen_type(self) -> str:
        return "<u8" if self.major * 10 + self.minor >= 2 else "<u4"

    @property
    def turned(self) -> bool:
        return max(self.major, self.minor) > TURNED_ABOVE

    def to_bytes(self) -> bytes:
        version = np.array([self.major, self.minor, self.revision], "<i4")
        return version.tobytes() + np.array([self.seen], self.seen_type).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Header":
        version = dict(zip(("major", "minor", "revision"), map(int, np.frombuffer(data, "<i4", 3))))
        seen = np.frombuffer(data, cls(**version).seen_type, 1, offset=12)
        return cls(**version, seen=int(seen[0]))


@dataclass(frozen=True)
class Array:
    """One array of a file: which layer it belongs to, what it is called, and the tensor it fills."""

    layer: int
    section: object
    name: str
    tensor: Tensor

    @property
    def where(self) -> str:
        return f"layer {self.layer} [{self.section.type}] {self.name}"


def arrays_of(model: Darknet) -> list[Array]:
    """All arrays of a network in file order; a layer with ``share_index`` has none of its own."""
    return [
        Array(spec.index, spec.section, name, tensor)
        for spec, layer in zip(model.graph.layers, model.layers)
        if hasattr(layer, "darknet_arrays")
        for name, tensor in layer.darknet_arrays().items()
    ]


def count_floats(arrays: Sequence[Array]) -> int:
    return sum(array.tensor.numel() for array in arrays)


def read_header(path: str | Path) -> tuple[Header, int]:
    """The header and the number of floats after it.

    Raises:
        UserError: not Darknet weights, shorter than its header, or not a whole number of floats.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind != DARKNET:
        raise UserError(path, f"a {kind} file, expected Darknet weights", "load it with --weights, which reads both")
    data = read_bytes(path, "Darknet weights", 20).ljust(20, b"\0")
    header = Header.from_bytes(data)
    size = path.stat().st_size - len(header.to_bytes())
    if size < 0 or size % 4:
        raise UserError(
            path, f"{path.stat().st_size} bytes: not a header and whole floats", "is the download complete?"
        )
    return header, size // 4


def read_weights(model: Darknet, path: str | Path, cutoff: int | None = None) -> Header:
    """Fill a network from a file of exactly its size. All or nothing: a refused file changes no tensor.

    A layer with ``dontload=1`` has no bytes in the file and ``dontloadscales=1`` none for its statistics; a file that
    Darknet wrote after training with such a cfg holds them all the same, and its size tells.

    Args:
        model: any device and dtype; values are converted.
        path: the file.
        cutoff: read layers 0..cutoff-1 from a file that ends there (``darknet53.conv.74``: 74).

    Raises:
        UserError: another kind of file, too short (names the layer where it runs out), too long, NaN, infinity or a
            negative variance (names the array).
    """
    path = Path(path)
    header, found = read_header(path)
    arrays = _stored(arrays_of(model), found, cutoff)
    expected = count_floats(arrays)
    if found != expected:
        raise _wrong_size(model, path, header, arrays, found)
    values = torch.from_numpy(np.fromfile(path, "<f4", offset=len(header.to_bytes())).astype(np.float32, copy=False))
    if len(values) != found:
        raise UserError(path, f"{found} floats became {len(values)} while they were read", "is it still being written?")
    parts = list(zip(arrays, values.split([array.tensor.numel() for array in arrays])))
    _check(path, values, parts)
    with torch.no_grad():
        for array, part in parts:
            array.tensor.copy_(_shaped(array, part, header))
    return header


def write_weights(model: Darknet, path: str | Path, header: Header | None = None, cutoff: int | None = None) -> None:
    """Write all layers, or the first ``cutoff`` of them, atomically. With the header that was read: the same bytes.

    Raises:
        UserError: ``cutoff`` beyond the network. ResourceError: cannot be written; an old file is untouched.
    """
    header, arrays = header or Header(), arrays_of(model)
    if cutoff is not None and not 0 < cutoff <= len(model.layers):
        raise UserError(path, f"cutoff {cutoff}: expected 1..{len(model.layers)} layers")
    with atomic_write(path) as file:
        file.write(header.to_bytes())
        for array in arrays[: _end(arrays, cutoff)]:
            tensor = array.tensor.detach().float()
            if array.name == "matrix" and header.turned:
                tensor = tensor.t()
            file.write(tensor.contiguous().cpu().numpy().astype("<f4", copy=False).tobytes())


def boundaries(model: Darknet) -> dict[int, int]:
    """Number of floats -> number of layers, for every prefix of the network that ends with a layer that has arrays."""
    total, ends = 0, {}
    for array in declared(arrays_of(model)):
        total += array.tensor.numel()
        ends[array.layer] = total
    return {floats: layer + 1 for layer, floats in ends.items()}


def declared(arrays: Sequence[Array]) -> list[Array]:
    """What the cfg says is in the file."""
    return [
        array
        for array in arrays
        if not array.section.flag("dontload") and not (array.section.flag("dontloadscales") and array.name in SCALES)
    ]


def _end(arrays: Sequence[Array], cutoff: int | None) -> int:
    return len(arrays) if cutoff is None else sum(array.layer < cutoff for array in arrays)


def _stored(arrays: list[Array], found: int, cutoff: int | None) -> list[Array]:
    arrays = arrays[: _end(arrays, cutoff)]
    return arrays if found == count_floats(arrays) else declared(arrays)


def _shaped(array: Array, values: Tensor, header: Header) -> Tensor:
    shape = array.tensor.shape
    if array.name == "matrix" and header.turned:
        return values.view(shape[::-1]).t()
    return values.view(shape)


def _wrong_size(model: Darknet, path: Path, header: Header, arrays: Sequence[Array], found: int) -> UserError:
    start = len(header.to_bytes())
    size, needed = start + 4 * found, start + 4 * count_floats(arrays)
    message = f"{size} bytes, {model.cfg.path} needs {needed}"
    if size > needed:
        return UserError(path, f"{message}: {size - needed} left over", "weights of another cfg or class count?")
    if found in (ends := boundaries(model)):
        return UserError(
            path, f"{message}: it ends with layer {ends[found] - 1}", "a backbone? train.py --weights starts from it"
        )
    left = found
    for array in arrays:
        left -= array.tensor.numel()
        if left < 0:
            break
    return UserError(path, f"{message}: it runs out in {array.where}", "incomplete, or weights of another cfg")


def _check(path: Path, values: Tensor, parts: Sequence[tuple[Array, Tensor]]) -> None:
    """Refuse values that no training made."""
    if not values.any():
        warnings.warn(f"{path}: every weight is zero", stacklevel=3)
    for array, part in parts:
        if wrong := flaw(array.name, part):
            raise UserError(path, f"{array.where}: {wrong}", "damaged, or weights of another cfg")


def flaw(name: str, values: Tensor) -> str:
    """What is wrong with the values of an array, in words; nothing if they are sound."""
    if not values.isfinite().all():
        return f"{int((~values.isfinite()).sum())} of {values.numel()} values are not finite"
    if name.endswith(("variance", "running_var")) and (values < 0).any():
        return f"{int((values < 0).sum())} of {values.numel()} variances are negative"
    return ""

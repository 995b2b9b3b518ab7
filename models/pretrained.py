"""Start from somebody's weights: take every tensor that fits, and say of each one what became of it.

Reads Darknet ``.weights`` (of this cfg, of this cfg with another number of classes, or of its first layers), our
checkpoints, and plain ``.pt`` state dicts. What a file is, its first bytes decide (`models.file_kind`); nothing that
needs a pickle is read.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.cfg import adapt_classes
from models.darknet import Darknet
from models.darknet_weights import arrays_of, boundaries, count_floats, flaw, read_header, read_weights
from models.file_kind import CHECKPOINT, DARKNET, TORCH, file_kind
from utils.checkpoint import read_checkpoint, without_prefix
from utils.errors import UserError

__all__ = ["CHECKPOINT", "DARKNET", "TORCH", "TransferReport", "file_kind", "load_pretrained"]

NESTED = ("ema", "model", "state_dict", "model_state_dict")  # where trainers keep the state dict, the best one first
WRAPPERS = ("_orig_mod.", "module.", "model.")  # prefixes of torch.compile, DDP and modules that hold the network
ANCESTOR = (("module_list.", "layers."), (".Conv2d.", ".conv."), (".BatchNorm2d.", ".norm."))  # the PyTorch ancestor's
SAFE_TORCH = (2, 10)  # from here on weights_only=True is known to be safe
UNIMPORTANT = "num_batches_tracked"  # counts calls; nothing is computed from it


@dataclass(frozen=True, kw_only=True)
class TransferReport:
    """What became of every tensor, by the names of the network's state dict."""

    path: str
    source: str  # what the file was
    sections: tuple[str, ...]  # type of every layer, for the table
    matched: tuple[str, ...]
    differs: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name -> shape in the file, shape here
    missing: tuple[str, ...]  # here, not in the file
    extra: tuple[str, ...]  # in the file, not here

    @property
    def complete(self) -> bool:
        """The network is filled by this file alone."""
        return not self.differs and not self.missing

    def summary(self) -> str:
        """A line for the whole, and one for every run of layers with the same fate."""
        total = len(self.matched) + len(self.differs) + len(self.missing)
        lines = [f"{self.path} ({self.source}): {len(self.matched)} of {total} tensors transferred"]
        for first, last, fate in self._runs():
            span = first if first == last else f"{first}-{last}"
            kind = self.sections[int(first)] if first == last else ""
            lines.append(f"  layer {span:<9} {kind:<15} {fate}".rstrip())
        if self.extra:
            more = f" and {len(self.extra) - 3} more" if len(self.extra) > 3 else ""
            lines.append(f"  not used: {', '.join(self.extra[:3])}{more}")
        return "\n".join(lines)

    def _runs(self) -> list[tuple[str, str, str]]:
        """(first layer, last layer, what happened), neighbours with the same fate joined."""
        fates: dict[str, list[str]] = {_layer(name): [] for name in (*self.matched, *self.differs)}
        gone = {_layer(name) for name in self.missing} - fates.keys()
        fates |= {layer: ["missing"] for layer in gone}
        for name in self.missing:
            if _layer(name) not in gone:
                fates[_layer(name)].append(f"{_short(name)} missing")
        for name, (theirs, ours) in self.differs.items():
            fates[_layer(name)].append(f"{_short(name)} {_times(theirs)}, here {_times(ours)}")
        runs: list[tuple[str, str, str]] = []
        for layer in sorted(fates, key=lambda text: (len(text), text)):
            fate = "; ".join(fates[layer]) or "matched"
            if runs and runs[-1][2] == fate:
                runs[-1] = (runs[-1][0], layer, fate)
            else:
                runs.append((layer, layer, fate))
        return runs


def load_pretrained(model: Darknet, path: str | Path) -> TransferReport:
    """Copy into ``model`` every tensor of a file whose name and shape fit.

    Raises:
        UserError: not a file of weights, damaged, needs a pickle, or nothing in it fits. The model is then unchanged.
    """
    path = Path(path)
    tensors, source = READERS[file_kind(path)](model, path)
    own = {name: tensor for name, tensor in model.state_dict().items() if UNIMPORTANT not in name}
    theirs = {name: tensor for name, tensor in tensors.items() if UNIMPORTANT not in name}
    matched = [name for name, tensor in own.items() if name in theirs and theirs[name].shape == tensor.shape]
    report = TransferReport(
        path=str(path),
        source=source,
        sections=tuple(spec.section.type for spec in model.graph.layers),
        matched=tuple(matched),
        differs={
            name: (tuple(theirs[name].shape), tuple(tensor.shape))
            for name, tensor in own.items()
            if name in theirs and theirs[name].shape != tensor.shape
        },
        missing=tuple(name for name in own if name not in theirs),
        extra=tuple(name for name in theirs if name not in own),
    )
    if not matched:
        raise UserError(path, f"none of its {len(theirs)} tensors fits {model.cfg.path}", "weights of another network")
    for name in matched:
        if wrong := flaw(name, theirs[name]):
            raise UserError(path, f"{name}: {wrong}", "damaged")
    with torch.no_grad():
        for name in matched:
            own[name].copy_(theirs[name])
    return report


def _read_darknet(model: Darknet, path: Path) -> tuple[dict[str, Tensor], str]:
    """Whole files, files of another class count, and backbones, told apart by size alone."""
    _, floats = read_header(path)
    layers = boundaries(model).get(floats)
    whole = count_floats(arrays_of(model)) == floats or layers == max(boundaries(model).values())
    classes = None if whole else _class_count(model, floats)
    if classes is not None and layers is not None:
        message = f"its size fits both {classes} classes and the first {layers} layers of {model.cfg.path}"
        raise UserError(path, message, "cut it with the network it belongs to")
    if classes is not None:
        twin = _twin(model, classes)
        read_weights(twin, path)
        return twin.state_dict(), f"Darknet weights, {classes} classes"
    twin = _twin(model, model.num_classes)
    if whole or layers is None:  # a size that fits nothing is refused there, with the place where it runs out
        read_weights(twin, path)
        return twin.state_dict(), "Darknet weights"
    read_weights(twin, path, cutoff=layers)
    names = {name for name in twin.state_dict() if int(_layer(name)) < layers}
    return {n: v for n, v in twin.state_dict().items() if n in names}, f"Darknet weights, layers 0-{layers - 1}"


def _twin(model: Darknet, num_classes: int) -> Darknet:
    """The same network with other classes and no values yet, beside which ``model`` stays untouched."""
    with torch.device("meta"):
        twin = Darknet(adapt_classes(model.cfg, num_classes)[0] if num_classes != model.num_classes else model.cfg)
    return twin.to_empty(device="cpu")


def _class_count(model: Darknet, floats: int) -> int | None:
    """The number of classes with which this cfg has so many floats: the count is linear in it."""
    if not model.graph.heads:
        return None
    with torch.device("meta"):
        one, two = (count_floats(arrays_of(Darknet(adapt_classes(model.cfg, number)[0]))) for number in (1, 2))
    classes, rest = divmod(floats - one, two - one)
    return classes + 1 if not rest and classes >= 0 else None


def _read_checkpoint(model: Darknet, path: Path) -> tuple[dict[str, Tensor], str]:
    tensors, _ = read_checkpoint(path)
    averaged = without_prefix("ema", tensors)
    return averaged or without_prefix("model", tensors), f"checkpoint, {'EMA' if averaged else 'plain'} weights"


def _read_torch(model: Darknet, path: Path) -> tuple[dict[str, Tensor], str]:
    """A state dict saved by ``torch.save``, also inside a dict of other plain values."""
    release = torch.__version__
    if tuple(int(part) for part in release.split(".")[:2]) < SAFE_TORCH:
        found = f"torch {release} can be made to run code by such a file (CVE-2025-32434, CVE-2026-24747)"
        raise UserError(path, found, f"update torch to {'.'.join(map(str, SAFE_TORCH))} or newer")
    _refuse_bomb(path)
    try:
        with path.open("rb") as file:  # given a path, torch would decide by its name
            needs = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            file.seek(0)
            content = None if needs else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes torch's reader raises whatever they make it run into
        raise UserError(path, "a damaged PyTorch archive", "fetch it again") from error
    if needs:
        hint = "in an isolated environment: torch.save(model.state_dict(), 'plain.pt')"
        raise UserError(path, f"holds more than tensors ({', '.join(needs[:3])}), which needs a pickle", hint)
    found = _state_dict(content)
    if not found:
        raise UserError(path, "no state dict in it", f"looked at the top and under {', '.join(NESTED)}")
    return {_own_name(name): tensor for name, tensor in found.items()}, "PyTorch state dict"


def _refuse_bomb(path: Path) -> None:
    """torch stores without compression, so an archive cannot be larger inside than outside."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile raises whatever a damaged directory makes it run into
        raise UserError(path, "a truncated or damaged PyTorch archive", "fetch it again") from error
    inside, size = sum(member.file_size for member in members), path.stat().st_size
    if inside > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(path, f"unpacks to {inside} bytes from {size}: compressed, so not written by torch.save")


def _state_dict(content: object) -> dict[str, Tensor]:
    """The tensors of a state dict: the content itself or the first of its nested ones."""
    if not isinstance(content, Mapping):
        return {}
    nested = [content[key] for key in NESTED if isinstance(content.get(key), Mapping)]
    source = nested[0] if nested else content
    return {
        str(name): value
        for name, value in source.items()
        if isinstance(value, Tensor) and value.layout == torch.strided
    }


def _own_name(name: str) -> str:
    for prefix in WRAPPERS:
        name = name.removeprefix(prefix)
    for theirs, ours in ANCESTOR:
        name = name.replace(theirs, ours)
    return name


def _layer(name: str) -> str:
    """``layers.12.conv.weight`` -> ``12``."""
    return name.split(".")[1]


def _short(name: str) -> str:
    """``layers.12.conv.weight`` -> ``conv.weight``."""
    return name.split(".", 2)[2]


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


READERS = {DARKNET: _read_darknet, CHECKPOINT: _read_checkpoint, TORCH: _read_torch}

"""One file that continues a training: safetensors with a JSON header. Tensors and plain values, never a pickled object.

Tensor names: ``model.*`` ``ema.*`` (state dicts), ``criterion.*``, ``optim.<parameter>.<slot>``, ``rng.*``.
Header (``meta``): ``format`` (version), ``cfg`` (text), ``names``, ``recipe``, ``args``, ``epoch`` (the next one),
``step`` (optimiser steps done), ``ema_updates``, ``best`` (fitness and epoch), ``sha256`` of the tensors.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.errors import UserError
from utils.files import atomic_write

FORMAT = 1
SUFFIX = ".safetensors"


def write_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Replace ``path`` by a checkpoint, atomically. ``meta`` holds JSON values only.

    Raises:
        ResourceError: folder not writable, disk full; the old file is untouched.
    """
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    header = {**meta, "format": FORMAT, "sha256": fingerprint(tensors)}
    data = save(tensors, metadata={"matchbox": json.dumps(header)})
    with atomic_write(path) as file:
        file.write(data)


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and meta of a checkpoint, verified.

    Raises:
        UserError: not such a file, damaged, or written by a newer version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("matchbox")
            if header is None:
                raise UserError(path, "safetensors, but not a checkpoint of ours", "start from it with --weights")
            meta = json.loads(header)
            if meta["format"] > FORMAT:
                raise UserError(path, f"format {meta['format']}, this version reads up to {FORMAT}", "update Matchbox")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safetensors handle, no dict
    except OSError as error:
        raise UserError(path, f"cannot read: {error.strerror or error}") from error
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise UserError(path, f"not a safetensors checkpoint, or damaged: {error}") from error
    if fingerprint(tensors) != meta.get("sha256"):
        raise UserError(path, "damaged: the tensors do not match their checksum", "use an older checkpoint")
    return tensors, meta


def latest_valid(folder: str | Path) -> tuple[Path, list[UserError]]:
    """The newest checkpoint of a folder that reads well, and why newer ones were passed over.

    Raises:
        UserError: there is none.
    """
    files = sorted(Path(folder).glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    damaged = []
    for file in files:
        try:
            read_checkpoint(file)
        except UserError as error:
            damaged.append(error)
        else:
            return file, damaged
    raise UserError(folder, f"no readable checkpoint among {len(files)}", "; ".join(map(str, damaged)))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``{"a": x} -> {"prefix.a": x}``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``prefix``, by their names without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network to look at pictures with: the averaged weights where there are any, else the plain ones."""
    return without_prefix("ema", tensors) or without_prefix("model", tensors)


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    """Fill a module exactly. Raises UserError that lists what is missing, too much, or of another shape."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in own]
    for name in own.keys() & tensors.keys():
        if own[name].shape != tensors[name].shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}")
    if problems:
        shown = ", ".join(sorted(problems)[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(where, f"checkpoint of another network: {shown}", "to start from its weights use --weights")
    module.load_state_dict(tensors)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """State of an optimiser made by ``build_optimizer``, by parameter name: ``layers.0.weight.momentum_buffer``."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            for slot, value in optimizer.state[parameter].items() if parameter in optimizer.state else ():
                if isinstance(value, Tensor):
                    tensors[f"{name}.{slot}"] = value
    return tensors


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse. Slots take the device and memory layout of their parameter (a step counter stays a scalar)."""
    parameters = {
        name: parameter for group in optimizer.param_groups for name, parameter in zip(group["names"], group["params"])
    }
    for key, value in tensors.items():
        name, _, slot = key.rpartition(".")
        parameter = parameters[name]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        else:
            value = value.to(parameter.device)
        optimizer.state[parameter][slot] = value

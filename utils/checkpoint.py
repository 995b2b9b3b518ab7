"""One file that continues a training: safetensors with a JSON header. Tensors and plain values, never a pickled object.

Tensor names: ``model.*`` ``ema.*`` (state dicts), ``criterion.*``, ``optim.<parameter>.<slot>``, ``rng.*``.
Header (``meta``): ``format`` (version), ``cfg`` (text), ``names``, ``recipe``, ``args``, ``epoch`` (the next one),
``step`` (optimiser steps done), ``ema_updates``, ``best`` (fitness and epoch), ``sha256`` of all else.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.errors import UserError
from utils.files import atomic_write, distrust

FORMAT = 2
SUFFIX = ".safetensors"
CHECKSUM = "sha256"


def write_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Replace ``path`` by a checkpoint, atomically. ``meta`` holds JSON values only.

    Raises:
        ResourceError: folder not writable, disk full; the old file is untouched.
    """
    with atomic_write(path) as file:
        file.write(checkpoint_bytes(tensors, meta))


def checkpoint_bytes(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """What a checkpoint file holds."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    header = json.loads(json.dumps({**meta, "format": FORMAT}))  # as it will be read
    header[CHECKSUM] = CHECKSUMS[FORMAT](tensors, header)
    return save(tensors, metadata={"matchbox": json.dumps(header)})


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and meta of a checkpoint, verified. Says so where others could have changed the file.

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
        expected = CHECKSUMS[meta["format"]](tensors, meta)
        reason = distrust(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(path, f"cannot read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(path, f"not a safetensors checkpoint, or damaged: {error}") from error
    if expected != meta.get(CHECKSUM):
        raise UserError(path, "damaged: its contents do not match their checksum", "use an older checkpoint")
    if reason:
        print(f"warning: {path}: {reason}", file=sys.stderr)
    return tensors, meta


def step_of(path: Path) -> int:
    """Of the header alone, unverified; -1 where there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return int(json.loads(file.metadata()["matchbox"])["step"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return -1


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _fingerprint_of_all(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """sha256 over the tensors' and the header without its own checksum."""
    text = json.dumps({**header, CHECKSUM: fingerprint(tensors)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


CHECKSUMS = {1: lambda tensors, header: fingerprint(tensors), 2: _fingerprint_of_all}  # by format


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

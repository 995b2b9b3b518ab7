"""PyTorch's own two formats, which need no code of ours to run: torch.export (``.pt2``) and TorchScript."""

import io
import warnings

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from models.exports.portable import Portable
from models.exports.wish import INPUT, Export, Wish
from utils.errors import UserError

META = "matchbox.json"  # the extra file inside


def example(wish: Wish) -> Tensor:
    """Pictures to trace with. A length of 1 would be taken for a constant where it may be any."""
    batch_size, size = wish.batch_size, wish.size
    if wish.dynamic:
        batch_size, size = 2, tuple(max(side, 2 * wish.model.stride) for side in size)
    return torch.zeros(batch_size, wish.model.channels, *size)


def exported_program(wish: Wish) -> ExportedProgram:
    """The network as torch.export sees it. Errors: UserError where it cannot have any size."""
    shapes = None
    if wish.dynamic:
        stride = wish.model.stride
        shapes = {INPUT: {0: Dim("batch"), 2: stride * Dim("rows"), 3: stride * Dim("columns")}}
    try:
        with torch.no_grad():
            program = torch.export.export(Portable(wish).eval(), (example(wish),), dynamic_shapes=shapes)
    except torch._dynamo.exc.UserError as error:
        if not wish.dynamic:
            raise
        first = str(error).strip().splitlines()[0]
        raise UserError("--dynamic", f"this network has a fixed size: {first}", "leave it out") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with the folders of this machine
    return program


class TorchExport(Export):
    """torch.export: ``torch.export.load(file).module()(images)``."""

    offers = frozenset({"batch_size", "dynamic", "half"})

    def __init__(self, wish: Wish):
        self.program = exported_program(wish)
        self.program.example_inputs = None  # they would be stored, too
        self.module = self.program.module()

    @torch.no_grad()
    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(images)

    def files(self, meta: str) -> dict[str, bytes]:
        file = io.BytesIO()
        torch.export.save(self.program, file, extra_files={META: meta})
        return {".pt2": file.getvalue()}


class ScriptExport(Export):
    """TorchScript, for programs that cannot read torch.export's files yet; torch itself calls it deprecated."""

    offers = frozenset({"batch_size", "dynamic", "half"})

    def __init__(self, wish: Wish):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # that a trace holds for its inputs is measured, not assumed
            self.module = torch.jit.trace(Portable(wish).eval(), example(wish), check_trace=False)

    @torch.no_grad()
    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(images)

    def files(self, meta: str) -> dict[str, bytes]:
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(self.module, file, _extra_files={META: meta})
        return {".torchscript": file.getvalue()}

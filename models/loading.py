"""From files to a network that can look at pictures: the one place test.py, detect.py and other programs load from."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.cfg import adapt_classes, parse_cfg, read_cfg
from models.darknet import Darknet
from models.darknet_weights import read_weights
from models.file_kind import CHECKPOINT, DARKNET, file_kind
from models.pretrained import load_pretrained
from models.section import listing
from utils.checkpoint import load_module, read_checkpoint, without_prefix
from utils.datasets.formats.rows import is_name
from utils.errors import UserError
from utils.files import read_bytes

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"cfg": "cfg", "weights file": "weights", "names file": "data"}  # where the project keeps each kind


FEW = 6  # names of classes that an error shows


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A network in eval mode, the names of its classes, and what its file said about itself."""

    model: Darknet
    names: list[str]
    meta: dict  # the checkpoint's header; {} for other files


def find_file(text: str | Path, kind: str) -> Path:
    """A file as typed, or a plain name in the folder where its kind (a key of FOLDERS) lives: ``yolov3.cfg``.

    Raises:
        UserError: not there; names the places looked at.
    """
    try:
        path = Path(text).expanduser()
        places = [path] if path.parent.name else [path, ROOT / FOLDERS[kind] / path.name]
        files = [place for place in places if place.is_file()] or [place for place in places if place.exists()]
    except (OSError, RuntimeError) as error:  # a name that no file can have, or ~ of nobody
        raise UserError(text, f"no such {kind}", getattr(error, "strerror", None) or str(error)) from error
    if not files:
        places = " and ".join(str(place.absolute()) for place in places)
        raise UserError(text, f"no such {kind}", f"looked for {places}")
    read_bytes(files[0], f"a {kind}", 0)  # says what it is if it is none, or cannot be read
    return files[0]


def load_network(weights: str | Path, *, cfg: str | Path | None = None, names: list[str] | None = None) -> Loaded:
    """The network behind a weights file. Says on stderr what was noticed in a ``cfg``.

    Args:
        weights: one of our checkpoints (knows its cfg and names), or ``.weights`` / ``.pt`` together with ``cfg``.
        cfg: the network; overrides the checkpoint's.
        names: class names of the data or of a ``.names`` file; a checkpoint's must be the same, in the same order.
            Without any, classes are called class0, class1, ...

    Raises:
        UserError: a file is missing or unreadable, cfg and weights do not belong together, or the names are others.
    """
    path = find_file(weights, "weights file")
    if file_kind(path) == CHECKPOINT:
        tensors, meta = read_checkpoint(path)
        network = read_cfg(find_file(cfg, "cfg")) if cfg else parse_cfg(meta["cfg"], f"{path}[cfg]")
        if names and list(names) != meta["names"]:
            found = f"was trained on the classes {_few(meta['names'])}; asked for are {_few(names)}"
            same = [mine == wanted for mine, wanted in zip(meta["names"], names)]
            place = (*same, False).index(False)
            hint = f"they part at class {place}: names must agree in number, spelling and order"
            if list(names) == sorted(meta["names"]):  # in YOLO files a number would then mean another class
                hint += "; of a VOC folder classes are sorted: a data yaml with 'format: voc' and 'names:' orders them"
            raise UserError(path, found, hint)
        names = meta["names"]
        model = Darknet(network)
        load_module(model, without_prefix("ema", tensors) or without_prefix("model", tensors), path)
    elif cfg is None:
        raise UserError(path, "these weights do not say which network they belong to", "add --cfg NETWORK.cfg")
    else:
        meta, network = {}, read_cfg(find_file(cfg, "cfg"))
        network, changes = adapt_classes(network, len(names)) if names else (network, [])
        model = Darknet(network)
        try:
            _fill(model, path)
        except UserError as error:
            if not changes:
                raise
            found = f"not for the {len(names)} classes that are named: {error.message}"
            hint = f"name the classes it was trained on; for new ones, train.py --weights {path} starts from it"
            raise UserError(path, found, hint) from error
    if cfg and (noticed := (*network.warnings, *model.graph.problems)):
        print(f"warning: {listing(noticed)}", file=sys.stderr)
    names = names or [f"class{number}" for number in range(model.num_classes)]
    if len(names) != model.num_classes:
        found = f"the network has {model.num_classes} classes, but {len(names)} names were given"
        raise UserError(path, found, "pass the names it was trained on")
    odd = [name for name in names if not is_name(name)]
    if odd:
        raise UserError(path, f"class name {odd[0]!r}, expected text on one line", "name the classes anew: --names")
    return Loaded(model=model.eval(), names=list(names), meta=meta)


def load_networks(
    weights: Sequence[str | Path], *, cfg: Sequence[str | Path] | None = None, names: list[str] | None = None
) -> list[Loaded]:
    """The networks behind one or several files, which are to look at the same pictures.

    Args:
        cfg: one for each, or one for all.

    Raises:
        UserError: as `load_network`, or they do not find the same classes in the same kind of picture.
    """
    cfgs = list(cfg or [None])
    if len(cfgs) not in (1, len(weights)):
        raise UserError("--cfg", f"{len(cfgs)} files for {len(weights)} of weights", "one for each, or one for all")
    cfgs = cfgs * len(weights) if len(cfgs) == 1 else cfgs
    first, *others = networks = [load_network(file, cfg=one, names=names) for file, one in zip(weights, cfgs)]
    for file, other in zip(weights[1:], others):
        if other.names != first.names:
            found = f"finds {_few(other.names)}; {weights[0]} finds {_few(first.names)}"
            raise UserError(
                file, found, "networks that look together find the same classes, in the same order: --names"
            )
        if other.model.channels != first.model.channels:
            found = f"sees {other.model.channels} channels; {weights[0]} sees {first.model.channels}"
            raise UserError(file, found, "networks that look together see the same")
    return networks


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:FEW]) + f", ... ({len(names)} in all)" * (len(names) > FEW)


def _fill(model: Darknet, path: Path) -> None:
    """Every weight of the model from a file that does not know its network."""
    if file_kind(path) == DARKNET:
        read_weights(model, path)
        return
    report = load_pretrained(model, path)
    if not report.complete:
        first, *fates = (line.strip() for line in report.summary().splitlines())
        raise UserError(path, f"does not fill {model.cfg.path}: {first}", "; ".join(fates[:4]))


def input_size(wanted: list[int] | None, model) -> tuple[int, int]:
    """(H, W) as asked for, a multiple of the network's stride."""
    if wanted and len(wanted) > 2:
        raise UserError("--img-size", f"expected a side, or height and width, found {len(wanted)} numbers")
    height, width = (wanted[0], wanted[-1]) if wanted else model.size
    if height % model.stride or width % model.stride or min(height, width) <= 0:
        raise UserError(
            "--img-size",
            f"{height}x{width} is no multiple of the network's stride {model.stride}",
            "try " + " ".join(str(max(round(side / model.stride), 1) * model.stride) for side in (height, width)),
        )
    return height, width


def stretches(wanted: str | None, model: Darknet) -> bool:
    """Whether pictures fill the input without keeping their aspect: as asked for, else by ``letter_box`` of the cfg."""
    return wanted == "stretch" if wanted else not model.cfg.net.flag("letter_box")

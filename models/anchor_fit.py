"""Anchors for the boxes of a data set: k-means by overlap, what they can reach head by head, written into a cfg.

Letters: N boxes, K anchors. Sizes [N, 2] are width and height of boxes placed on the network's input, in its pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.cfg import Cfg, head_anchors, head_mask
from models.graph import build_graph
from models.section import Section
from utils.boxes import wh_iou
from utils.datasets.formats.description import known_splits
from utils.datasets.letterbox import fit
from utils.datasets.records import DataSet, read_dataset
from utils.errors import UserError

ANCHOR_HEADS = ("yolo", "Gaussian_yolo", "region")
RESTARTS = 10  # k-means ends in the nearest hollow: the best of so many
MAX_STEPS = 300
SAMPLE = 20_000  # boxes that k-means looks at; all are measured


def _within(factor: float, sizes: Tensor, anchors: Tensor) -> Tensor:
    ratio = sizes[:, None] / anchors[None]
    return torch.maximum(ratio, 1 / ratio).amax(dim=2) < factor


# who could answer for a box at all, by the rule that each recipe matches with: bool [N, K]
RECALLS = {
    "overlap > 0.2 (recipe yolov3)": lambda sizes, anchors: wh_iou(sizes, anchors) > 0.2,
    "overlap > 0.5": lambda sizes, anchors: wh_iou(sizes, anchors) > 0.5,
    "sides within a factor of 4 (recipe yolov5)": lambda sizes, anchors: _within(4.0, sizes, anchors),
}


class AnchorHead(NamedTuple):
    """A head with anchors, and what it has now."""

    section: Section
    stride: tuple[float, float]  # x, y, pixels
    anchors: Tensor  # float32 [K, 2], pixels of the input

    @property
    def unit(self) -> tuple[float, float]:
        """What an anchor of the cfg is counted in: pixels, or cells in a [region]."""
        return self.stride if self.section.type == "region" else (1.0, 1.0)


def anchor_heads(cfg: Cfg) -> list[AnchorHead]:
    """The heads that carry anchors, the finest first. Raises CfgError where there is none."""
    graph, heads = build_graph(cfg), []
    for index in graph.heads:
        section, (_, rows, columns) = cfg.layers[index], graph.layers[index].shape
        if section.type in ANCHOR_HEADS:
            head = AnchorHead(section, (graph.width / columns, graph.height / rows), torch.empty(0))
            table = torch.tensor(head_anchors(section)) * torch.tensor(head.unit)
            heads.append(head._replace(anchors=table[list(head_mask(section))]))
    if not heads:
        raise cfg.net.error("no head with anchors", hint=f"they are in: {', '.join(ANCHOR_HEADS)}")
    return sorted(heads, key=lambda head: head.stride)


def input_sizes(data: DataSet, cfg: Cfg) -> Tensor:
    """Sizes [N, 2] of all boxes but ignored ones, placed on the network's input as ``train.py`` places pictures."""
    stretch = "letter_box" in cfg.net and not cfg.net.flag("letter_box")
    parts = [torch.zeros(0, 2)]
    for record in data.records:
        _, placed = fit(record.size, (cfg.height, cfg.width), stretch=stretch)
        boxes = torch.from_numpy(record.boxes[~record.ignore])
        parts.append((boxes[:, 2:] - boxes[:, :2]) * torch.tensor(placed.scale))
    return torch.cat(parts)


def fit_anchors(sizes: Tensor, num: int, *, seed: int = 0) -> Tensor:
    """K = ``num`` anchors [K, 2], the smallest first: k-means with the distance 1 - IoU (YOLO9000, section 2).

    A cluster's centre is its median, not its mean: large boxes pull a mean away from all others (on COCO a mean overlap
    of 0.59 instead of 0.62, below that of the published anchors). The best of ``RESTARTS`` beginnings (k-means++)
    by the mean overlap of a box with its best anchor, rounded as they are written.
    """
    rng = torch.Generator().manual_seed(seed)
    seen = sizes[torch.randperm(len(sizes), generator=rng)[:SAMPLE]]
    found = [_rounded(_k_means(seen, _spread(seen, num, rng))) for _ in range(RESTARTS)]
    best = max(found, key=lambda anchors: mean_overlap(sizes, anchors))
    return best[best.prod(dim=1).argsort(stable=True)]


def mean_overlap(sizes: Tensor, anchors: Tensor) -> float:
    """The mean over N boxes of the overlap with the best of K anchors."""
    return wh_iou(sizes, anchors).amax(dim=1).mean().item()


def _spread(sizes: Tensor, num: int, rng: torch.Generator) -> Tensor:
    """``num`` boxes to begin with, each drawn by its squared distance from those before it (k-means++)."""
    chosen = sizes[torch.randint(len(sizes), (1,), generator=rng)]
    while len(chosen) < num:
        distance = (1 - wh_iou(sizes, chosen).amax(dim=1)).square() + 1e-9
        chosen = torch.cat([chosen, sizes[distance.multinomial(1, generator=rng)]])
    return chosen


def _k_means(sizes: Tensor, anchors: Tensor) -> Tensor:
    nearest = torch.full((len(sizes),), -1)
    for _ in range(MAX_STEPS):
        before, nearest = nearest, wh_iou(sizes, anchors).argmax(dim=1)
        if torch.equal(before, nearest):
            break
        mine = [sizes[nearest == number] for number in range(len(anchors))]
        anchors = torch.stack([own.median(dim=0).values if len(own) else old for own, old in zip(mine, anchors)])
    return anchors


def _rounded(anchors: Tensor) -> Tensor:
    """As they are written: whole pixels from 100 on, tenths below, none of nothing."""
    return torch.where(anchors >= 100, anchors.round(), (anchors * 10).round() / 10).clamp(min=0.1)


def with_anchors(cfg: Cfg, anchors: Tensor) -> Cfg:
    """The cfg with other ``anchors``, ``num`` and ``mask``: the finest head gets the smallest, each as many as it had.

    Args:
        anchors: float32 [K, 2], pixels of the input, the smallest first.
    """
    changes, start = [], 0
    for head in anchor_heads(cfg):
        mask = range(start, start + len(head.anchors))
        start = mask.stop
        written = (anchors / torch.tensor(head.unit)).tolist()
        table = ", ".join(f"{width:.4g},{height:.4g}" for width, height in written)
        values = {"anchors": table, "num": len(anchors), "mask": ",".join(map(str, mask))}
        wanted = [key for key in values if key != "mask" or key in head.section or len(mask) < len(anchors)]
        changes += [(head.section, key, values[key]) for key in wanted]
    return cfg.with_options(changes)


def table(heads: list[AnchorHead], sizes: Tensor) -> str:
    """Per head: its anchors, the share of boxes whose best anchor it has, their mean overlap; then the whole."""
    overlap, best = wh_iou(sizes, torch.cat([head.anchors for head in heads])).max(dim=1)
    rows, start = [("head", "stride", "boxes", "overlap", "anchors")], 0
    for head in heads:
        mine = overlap[(best >= start) & (best < start + len(head.anchors))]
        start += len(head.anchors)
        anchors = "  ".join(f"{width:.4g}x{height:.4g}" for width, height in head.anchors.tolist())
        where = f"[{head.section.type}] line {head.section.line}"
        mean = f"{mine.mean():.3f}" if len(mine) else "-"
        rows.append((where, f"{head.stride[0]:g}", f"{len(mine) / len(sizes):.1%}", mean, anchors))
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligns = (str.ljust, str.rjust, str.rjust, str.rjust, str.ljust)
    lines = ["  ".join(align(cell, width) for align, cell, width in zip(aligns, row, widths)).rstrip() for row in rows]
    mean = f"mean overlap of a box with its best anchor: {overlap.mean():.3f}"
    return "\n".join([*lines, mean, *_recalls(heads, sizes)])


def _recalls(heads: list[AnchorHead], sizes: Tensor) -> list[str]:
    """What part of the boxes anybody could answer for, whatever is learnt."""
    anchors = torch.cat([head.anchors for head in heads])
    reached = {name: rule(sizes, anchors).any(dim=1).float().mean().item() for name, rule in RECALLS.items()}
    return [f"best possible recall, {name}: {share:.4f}" for name, share in reached.items()]


def refit(cfg: Cfg, source: str) -> tuple[Cfg, int]:
    """A cfg with anchors for the training boxes of a data set, and how many classes that has; prints what was found.

    The cfg's own anchors stay where k-means finds no better ones.

    Raises:
        CfgError: no head with anchors.
        UserError: as ``read_dataset``; too few boxes.
    """
    heads = anchor_heads(cfg)
    splits = known_splits(source)
    data = read_dataset(source, "train" if "train" in splits else splits[0])
    sizes, num = input_sizes(data, cfg), sum(len(head.anchors) for head in heads)
    if len(sizes.unique(dim=0)) < num:
        found = f"{len(sizes)} boxes of {len(sizes.unique(dim=0))} sizes, expected {num} for as many anchors"
        raise UserError(source, found)
    print(f"{source} [{data.split}]: {len(sizes)} boxes, seen at {cfg.width}x{cfg.height}")
    print(f"anchors of {cfg.path}\n{table(heads, sizes)}")
    changed = with_anchors(cfg, fit_anchors(sizes, num))
    fitted = anchor_heads(changed)
    print(f"anchors by k-means\n{table(fitted, sizes)}")
    before, after = (mean_overlap(sizes, torch.cat([head.anchors for head in each])) for each in (heads, fitted))
    if after <= before:
        print("no better ones were found: the anchors stay")
    return (changed if after > before else cfg), len(data.names)

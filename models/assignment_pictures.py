"""Pictures of assignments: for every picture of a batch, who answers for whom by each assigner.

Letters: H W of the picture, n objects, K points, L levels.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from models.compare_assigners import Comparison, build_criteria, compare
from models.structures import Priors
from utils.draw import batch_mosaic
from utils.draw_assignment import draw_assignment
from utils.structures import Batch, Targets

SPREAD = 0.75  # of a cell: over so much of it the anchors of one cell stand side by side
ROOM = 0.48  # radius of a point of full weight, in its share of that,
LARGEST = 0.012  # but never more of the picture's longer side
MOST = 0.5  # negatives are marked one by one where a larger share of the slots than this is ignored


def sheets(model: nn.Module, batch: Batch, *, max_pictures: int = 4) -> list[np.ndarray]:
    """A sheet of every assigner that the network can have, for each of the first pictures of a batch."""
    batch = _first(batch, max_pictures).to(next(model.parameters()).device)
    criteria, _ = build_criteria(model)
    with torch.no_grad():
        comparison = compare(model.predict(batch.images.float() / 255), batch.targets, criteria)
    numbers = range(len(batch))
    return [sheet(comparison, panels(comparison, batch, number), number, max_size=1400) for number in numbers]


def panels(comparison: Comparison, batch: Batch, picture: int) -> dict[str, np.ndarray]:
    """One RGB picture per assigner, of one picture of the batch."""
    return {name: _panel(name, comparison, batch, picture) for name in comparison.names}


def sheet(comparison: Comparison, drawn: Mapping[str, np.ndarray], picture: int, *, max_size: int = 2600) -> np.ndarray:
    """The panels of a picture side by side, each under its name and numbers."""
    captions = [f"{name}: {caption(comparison, name, picture)}" for name in drawn]
    return batch_mosaic(list(drawn.values()), captions=captions, max_size=max_size)


def caption(comparison: Comparison, name: str, picture: int) -> str:
    """The numbers of one panel."""
    mine = (comparison.targets.image == picture).numpy()
    counts = comparison.per_object(name)[mine]
    alone = int((counts == 0).sum())
    text = f"{counts.sum()} points for {len(counts)} objects"
    return f"{text}, nobody for {alone}" if alone else text


def level_order(priors: Priors) -> np.ndarray:
    """Rank [L] of every head by its stride, the finest 0: cfgs list heads in either order."""
    return np.argsort(np.argsort([priors.stride[grid.start].max().item() for grid in priors.grids], kind="stable"))


def _first(batch: Batch, num: int) -> Batch:
    """The first ``num`` pictures of a batch."""
    targets = batch.targets
    mine, ignored = targets.image < num, targets.ignore_image < num
    kept = targets.image[mine], targets.labels[mine], targets.boxes[mine]
    masks = None if targets.masks is None else targets.masks[mine]
    kept = Targets.of(*kept, targets.ignore_image[ignored], targets.ignore_boxes[ignored], masks=masks)
    return Batch(images=batch.images[:num], targets=kept, infos=batch.infos[:num])


def _panel(name: str, comparison: Comparison, batch: Batch, picture: int) -> np.ndarray:
    assignment, priors, image = comparison.assignments[name], comparison.priors, _image(batch, picture)
    mine = assignment.image == picture
    prior, weight = assignment.prior[mine], assignment.weight[mine].numpy()
    anchors = torch.tensor([grid.anchors for grid in priors.grids])[priors.level[prior]]
    points = priors.center[prior].clone()
    points[:, 0] += ((priors.anchor[prior] + 0.5) / anchors - 0.5) * SPREAD * priors.stride[prior, 0]
    room = (ROOM * SPREAD * priors.stride[prior, 0] / anchors).clamp(max=LARGEST * max(image.shape[:2])).numpy()
    first = int((comparison.targets.image < picture).sum())
    ignore = assignment.ignore[picture]
    negative = ~ignore
    negative[prior] = False
    return draw_assignment(
        image,
        comparison.targets.boxes[comparison.targets.image == picture].numpy(),
        points.numpy(),
        level_order(priors)[priors.level[prior].numpy()],
        assignment.target[mine].numpy() - first,
        room * np.sqrt(weight / weight.max(initial=1e-9)),
        _ignored(ignore, priors, image.shape[:2]),
        priors.center[negative].numpy() if ignore.double().mean() > MOST else np.zeros((0, 2)),
        _regions(comparison, name, picture, positive=False),
        _regions(comparison, name, picture, positive=True),
    )


def _regions(comparison: Comparison, name: str, picture: int, *, positive: bool) -> np.ndarray:
    """Boxes [R, 4] of the second stage's regions in a picture: with an object, or without."""
    if name not in comparison.regions:
        return np.zeros((0, 4))
    regions = comparison.regions[name]
    found = (regions.target < len(comparison.targets)) == positive
    return regions.boxes[found & (regions.image == picture)].numpy()


def _ignored(ignore: torch.Tensor, priors: Priors, size: tuple[int, int]) -> np.ndarray:
    """Mean over the levels of the share of each pixel's slots that are ignored, float [H, W]."""
    maps = []
    for grid in priors.grids:
        share = ignore[grid.slots].view(grid.anchors, grid.rows, grid.columns).float().mean(0)
        maps.append(torch.nn.functional.interpolate(share[None, None], size, mode="nearest")[0, 0])
    return torch.stack(maps).mean(0).numpy()


def _image(batch: Batch, picture: int) -> np.ndarray:
    """uint8 [H, W, 3]; grey pictures are shown as such."""
    image = batch.images[picture].permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))

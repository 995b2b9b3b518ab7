"""The loss head by head: which one still has something to learn. For looking: it waits for the device.

Letters: P slots, K rows of an assignment.
"""

from dataclasses import replace

import torch

from models.assigners import build_targets
from models.darknet import Darknet
from models.losses import Criterion
from utils.structures import Batch


@torch.no_grad()
def head_losses(model: Darknet, criterion: Criterion, batch: Batch) -> dict[str, float]:
    """Each loss term as if one head were alone: ``head/stride32/box``. Empty for a network in two stages.

    The other heads' rows get no weight and their slots are ignored, so that every loss knows what to do. Terms are not
    parts of a sum: each is normalised by what its own head has. Changes nothing, not even torch's generators. For one
    process: losses of several average their counts.
    """
    parameter = next(model.parameters())
    ready = batch.to(parameter.device)
    with torch.random.fork_rng([parameter.device] if parameter.device.type == "cuda" else []):
        preds = model.predict(ready.images.to(parameter.dtype) / 255)
        if preds.refine:
            return {}
        whole, found = build_targets(preds, ready.targets, criterion.assigner), {}
        for number, grid in enumerate(preds.priors.grids):
            mine = preds.priors.level == number  # [P]
            alone = replace(whole, weight=whole.weight * mine[whole.prior], ignore=whole.ignore | ~mine)
            terms = criterion.loss(preds, ready.targets, alone)
            stride = round(preds.priors.stride[grid.start].max().item())
            found |= {f"head/stride{stride}/{name}": value.item() for name, value in terms.items()}
    return found

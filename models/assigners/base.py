"""What every assigner has to do, and what several of them need.

Letters: B images, N objects, P slots, K rows, A anchors of a head, R ignore regions.
"""

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from models.structures import Assignment, Grid, Predictions, Priors
from utils.structures import Targets


class Assigner(Protocol):
    """Decides which output slot answers for which object.

    The contract, which the tests check for every row of ``ASSIGNERS``:

    * pure: the same arguments give the same assignment, on every device; nothing is stored and no argument changes;
    * the whole batch at once, without a device sync: no ``.item()``, ``nonzero`` or boolean-mask indexing. What is not
      known on the host stays in the table with weight 0. On a CPU, where nobody waits, a shorter list of the same rows
      may be made from it;
    * any number of objects, none included; any picture may be without objects;
    * rows in a fixed order that does not depend on the device;
    * no gradient (``build_targets`` sees to it);
    * a slot that answers for an object is never ignored, even inside an ignore region.

    ``needs`` names what every head must offer (``offers`` of ``models.heads``); ``build_criterion`` refuses the others.
    A field ``num_classes`` or ``heads`` is no recipe key: ``build_criterion`` fills it in.
    """

    needs: ClassVar[tuple[str, ...]]

    def __call__(self, preds: Predictions, targets: Targets) -> Assignment: ...


@torch.no_grad()
def build_targets(preds: Predictions, targets: Targets, assigner: Assigner) -> Assignment:
    """Ask the assigner which slot answers for which object."""
    return assigner(preds, targets)


def cells_of(centers: Tensor, priors: Priors, grid: Grid) -> tuple[Tensor, Tensor]:
    """Row [N] and column [N] of the cells of a head that hold ``centers`` [N, 2] (pixels).

    A center on the right or lower border of the image, or beyond it, belongs to the last cell.
    """
    column, row = (centers / priors.stride[grid.start]).floor().long().unbind(-1)
    return row.clamp(0, grid.rows - 1), column.clamp(0, grid.columns - 1)


def anchors_of(priors: Priors, grid: Grid) -> Tensor:
    """Width and height [A, 2] of a head's anchors, in pixels."""
    return priors.size[grid.slots][:: grid.rows * grid.columns]


def ignored_slots(
    priors: Priors, targets: Targets, num_images: int, image: Tensor, prior: Tensor, weight: Tensor
) -> Tensor:
    """Slots [B, P] whose cell's middle lies in an ignore region of that image, save those that answer for an object.

    ``image``, ``prior``, ``weight`` [K] are the rows of the assignment.
    """
    shape = (num_images, len(priors))
    if len(targets.ignore_image) == 0:
        return torch.zeros(shape, dtype=torch.bool, device=prior.device)
    low, high = targets.ignore_boxes[:, None, :2], targets.ignore_boxes[:, None, 2:]
    inside = ((priors.center >= low) & (priors.center <= high)).all(-1)  # [R, P]
    num_regions = torch.zeros(shape, dtype=torch.int32, device=prior.device)
    num_regions = num_regions.index_add(0, targets.ignore_image, inside.int())
    return (num_regions > 0) & ~slots_with_rows(shape, image, prior, weight)


def slots_with_rows(shape: tuple[int, int], image: Tensor, prior: Tensor, weight: Tensor) -> Tensor:
    """Slots of ``shape`` [B, P] that a row [K] with weight stands on."""
    best = torch.zeros(shape, dtype=weight.dtype, device=prior.device).flatten()
    return best.scatter_reduce(0, image * shape[1] + prior, weight, "amax").view(shape) > 0

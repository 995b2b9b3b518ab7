"""The RPN's loss: is this anchor an object, and how far is the object from it.

Letters: B images, P slots, K rows of the assignment, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.coders import AnchorDeltas
from models.losses.functional import bce, smooth_targets
from models.losses.yolo import objectness_targets
from models.structures import Assignment, Predictions
from utils.boxes import at_least_float32
from utils.distributed import all_reduce_mean
from utils.structures import Targets


class RCNNLoss(nn.Module):
    """Objectness BCE and smooth L1 on box deltas, both sums divided by ``batch_size_per_image`` times images.

    * obj: over all slots that are not ignored, target 1 for those that answer for an object, else 0;
    * box: over rows and the four deltas (centre shift in anchor sizes, log of the size factor). A head that speaks
      R-CNN deltas is compared in its raw outputs, beyond the clamp of its decoder too; any other in the deltas of its
      decoded boxes, so that every head with anchors can be taught this way;
    * cls: BCE over rows and classes; nothing when there is one class. An RPN proper has one, "object"; this term is for
      heads that also name what they see.

    The divisor is a constant, not the number of samples drawn: a picture with two positives is not louder per anchor
    than one with a hundred. It is averaged over all processes.

    Args:
        num_classes: of the network.
        heads: of the network; whose coder tells what ``deltas`` mean.
        beta: where smooth L1 turns from a parabola into a line, in deltas. 0 is exactly L1.
        batch_size_per_image: the assigner's ``num_samples``, whether or not that many are found.
        obj, box, cls: gains.

    Raises:
        ValueError: a value out of range, naming it.

    Source: detectron2 ``RPN.losses``, fvcore ``smooth_l1_loss``. A target without width or height has finite deltas
    (there: -inf).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        heads: tuple = (),
        beta: float = 0.0,
        batch_size_per_image: int = 256,
        obj: float = 1.0,
        box: float = 1.0,
        cls: float = 1.0,
    ):
        super().__init__()
        for name, value in {"beta": beta, "obj": obj, "box": box, "cls": cls}.items():
            if value < 0:
                raise ValueError(f"{name} is {value}, expected 0 or more")
        if batch_size_per_image < 1:
            raise ValueError(f"batch_size_per_image is {batch_size_per_image}, expected 1 or more")
        self.num_classes, self.beta, self.batch_size_per_image = num_classes, beta, batch_size_per_image
        self.gains = {"box": box, "obj": obj, "cls": cls}
        self.raw = any(isinstance(head.coder, AnchorDeltas) for head in heads)
        self.coder = next((head.coder for head in heads if isinstance(head.coder, AnchorDeltas)), AnchorDeltas())

    def forward(self, preds: Predictions, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
        """Weighted scalars ``box``, ``obj``, ``cls``; the total is their sum."""
        image, prior, target = assignment.image, assignment.prior, assignment.target
        weight = assignment.weight.to(preds.obj.dtype)
        positive = objectness_targets(assignment, torch.ones_like(weight))
        terms = {
            "box": (weight * self._distance(preds, targets, assignment)).sum(),
            "obj": (~assignment.ignore * bce(preds.obj, positive)).sum(),
            "cls": torch.zeros_like(weight.sum()),
        }
        if self.num_classes > 1:
            named = smooth_targets(targets.labels[target], self.num_classes, 0.0, weight.dtype)
            terms["cls"] = (weight * bce(preds.cls[image, prior], named).sum(1)).sum()
        num_samples = all_reduce_mean(preds.obj.new_full((), self.batch_size_per_image * len(preds.obj)))
        return {name: gain * terms[name] / num_samples for name, gain in self.gains.items()}

    def _distance(self, preds: Predictions, targets: Targets, assignment: Assignment) -> Tensor:
        """Smooth L1 [K] between what was said of a box and what is true, in deltas from its anchor."""
        image, prior, target = assignment.image, assignment.prior, assignment.target
        anchor = [getattr(preds.priors, name)[prior] for name in ("center", "size", "stride")]
        wanted = self.coder.encode(targets.boxes[target].to(anchor[0].dtype), *anchor)
        if self.raw:
            said = at_least_float32(preds.deltas[image, prior])
        else:
            said = self.coder.encode(at_least_float32(preds.boxes[image, prior]), *anchor)
        return F.smooth_l1_loss(said, wanted, beta=self.beta, reduction="none").sum(-1)

"""Element-wise losses on logits. No reduction: whoever calls weighs, sums and divides.

All take logits and targets in 0..1 of one shape [...] and return that shape, in float32 at least. Values and gradients
are finite for logits in +-1e4. Smooth L1 needs nothing of ours: ``F.smooth_l1_loss`` is exactly L1 at beta 0, and equal
to fvcore at every beta (a test holds it).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.boxes import at_least_float32


def bce(logits: Tensor, targets: Tensor, pos_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy; the positive part times ``pos_weight``."""
    logits = at_least_float32(logits)
    # a new_full, not a new_tensor: filling happens on the device, copying a host value would wait for it
    weight = None if pos_weight == 1 else logits.new_full((1,), pos_weight)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), pos_weight=weight, reduction="none")


def bce_blur(logits: Tensor, targets: Tensor, alpha: float = 0.05, pos_weight: float = 1.0) -> Tensor:
    """BCE that forgives confident positives without a label: they may be objects nobody annotated.

    Times ``1 - exp((probability - target - 1) / alpha)``, which is 0 only where the probability is 1 and the target 0.
    Source: yolov5 v7.0, BCEBlurWithLogitsLoss, which always returns the mean of this; the factor keeps its gradient.
    """
    forgiven = torch.exp((at_least_float32(logits).sigmoid() - targets - 1) / (alpha + 1e-4))
    return bce(logits, targets, pos_weight) * (1 - forgiven)


def focal(logits: Tensor, targets: Tensor, gamma: float = 1.5, alpha: float = 0.25, pos_weight: float = 1.0) -> Tensor:
    """Focal loss: BCE times ``(1 - p_true)^gamma``, positives times alpha, negatives times 1 - alpha.

    Lin et al. 2017, equation 5; soft targets mix both sides as in yolov3 and yolov5. Unlike there, the gradient is
    finite at saturated logits for gamma < 1 too.
    """
    logits = at_least_float32(logits)
    # sigmoid(-x), not 1 - sigmoid(x): the latter is 0 from x = 17 on in float32
    missing = targets * (-logits).sigmoid() + (1 - targets) * logits.sigmoid()
    return bce(logits, targets, pos_weight) * _alpha(targets, alpha) * _power(missing, gamma)


def quality_focal(
    logits: Tensor, targets: Tensor, gamma: float = 1.5, alpha: float = 0.25, pos_weight: float = 1.0
) -> Tensor:
    """Quality focal loss: BCE times ``|target - probability|^gamma``, for targets that are themselves an IoU.

    Li et al. 2020, equation 1, with the alpha of yolov5 v7.0's QFocalLoss.
    """
    gap = (targets - at_least_float32(logits).sigmoid()).abs()
    return bce(logits, targets, pos_weight) * _alpha(targets, alpha) * _power(gap, gamma)


def _alpha(targets: Tensor, alpha: float) -> Tensor:
    return targets * alpha + (1 - targets) * (1 - alpha)


def _power(base: Tensor, gamma: float) -> Tensor:
    """``base ** gamma`` for base in 0..1; the floor keeps the slope at 0 finite, so that its product with 0 is 0."""
    return base.clamp(min=torch.finfo(base.dtype).tiny) ** gamma


def smooth_targets(labels: Tensor, num_classes: int, smoothing: float, dtype: torch.dtype) -> Tensor:
    """Class targets [K, C] of labels [K]: ``1 - smoothing / 2`` at the label, ``smoothing / 2`` elsewhere.

    Each class is a yes-or-no question of its own, so the rest does not shrink with C. Source: yolov5, smooth_BCE.
    """
    targets = torch.full((len(labels), num_classes), smoothing / 2, dtype=dtype, device=labels.device)
    return targets.scatter(1, labels[:, None], 1 - smoothing / 2)

"""What the tests of point-based assigners share: priors of anchor-free heads, and golden predictions on them."""

import torch

from models.heads import FcosHead
from models.structures import Predictions, Priors
from utils.structures import Targets


def fcos_priors(strides, size, offset=0.5, dtype=torch.float32) -> Priors:
    """Slots of ``[fcos]`` heads of these strides on an input of ``size`` (height, width)."""
    head = FcosHead(num_classes=1, offset=offset, with_objectness=True, section=None)
    return Priors.cat([head.priors((size[0] // s, size[1] // s), size, dtype=dtype) for s in strides])


def predictions(priors, cls, boxes=None, obj=None) -> Predictions:
    """Predictions [B, P] with these class logits [B, P, C]; without ``obj`` objectness is certain."""
    obj = torch.full_like(cls[..., 0], 40.0) if obj is None else obj
    boxes = torch.zeros(*cls.shape[:2], 4, dtype=cls.dtype) if boxes is None else boxes
    return Predictions(boxes=boxes, deltas=boxes, obj=obj, cls=cls, priors=priors)


def targets_of(data, labels="gt_labels{}", boxes="gt_bboxes{}", num_images=1) -> Targets:
    """Targets from one array of labels and of boxes per image."""
    label_parts = [torch.tensor(data[labels.format(k)]).long() for k in range(num_images)]
    box_parts = [torch.tensor(data[boxes.format(k)]).view(-1, 4) for k in range(num_images)]
    image = torch.cat([torch.full((len(part),), k) for k, part in enumerate(label_parts)])
    return Targets.of(image, torch.cat(label_parts), torch.cat(box_parts))


def owners(assignment, num_objects=None) -> torch.Tensor:
    """Object [B, P] that each slot answers for, -1 for none; asserts that no slot answers twice."""
    rows = assignment.compact()
    owner = torch.full(assignment.ignore.shape, -1)
    slots = rows.image * owner.shape[1] + rows.prior
    assert len(slots.unique()) == len(slots)
    owner[rows.image, rows.prior] = rows.target
    return owner

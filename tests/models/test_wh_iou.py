"""The numbers of docs/assigners/yolov3.md."""

import pytest
import torch

from models.assigners import build_targets
from models.assigners.wh_iou import WhIoU
from tests.models.yolov3_case import ANCHORS, decode, make_raws, make_targets
from utils.boxes import wh_iou

SIZE = (96, 128)


def test_worked_example():
    """An object of 40 x 50 pixels around (41, 55): seven anchors are enough like it, each in one cell."""
    shapes = [wh_iou(torch.tensor(sizes).float(), torch.tensor([[40.0, 50.0]])).flatten().tolist() for sizes in ANCHORS]
    assert shapes[0] == pytest.approx([0.602, 0.285, 0.192], abs=5e-4)
    assert shapes[1] == pytest.approx([0.644, 0.381, 0.380], abs=6e-4)
    assert shapes[2] == pytest.approx([0.065, 0.240, 0.333], abs=6e-4)
    preds = decode([raw[:1] for raw in make_raws()], ANCHORS, SIZE)
    rows = build_targets(preds, make_targets([(0, 0, 21, 30, 61, 80)]), WhIoU()).compact()
    found = []
    for slot in rows.prior.tolist():
        level = int(preds.priors.level[slot])
        grid = preds.priors.grids[level]
        anchor, place = divmod(slot - grid.start, grid.rows * grid.columns)
        found.append((level, anchor, (place % grid.columns, place // grid.columns)))
    cells = [(1, 1), (2, 3), (5, 6)]
    assert found == [
        (level, anchor, cells[level]) for level, anchor in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2))
    ]

"""Small picture files with one bright rectangle, and their records."""

import cv2
import numpy as np

from utils.structures import Record


def paint_records(folder, num, *, sizes=((48, 64), (64, 48), (60, 60)), suffix=".png") -> list[Record]:
    """``num`` pictures of noise; picture i has i % 3 objects of class i % 2 and, every fourth, an ignore region."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(num):
        size = sizes[number % len(sizes)]
        path = folder / f"{number:03d}{suffix}"
        cv2.imwrite(str(path), rng.integers(0, 256, (*size, 3), np.uint8))
        objects, regions = number % 3, int(number % 4 == 0)
        boxes = np.array([[4 + row, 6, 30 + row, 40] for row in range(objects + regions)], np.float32).reshape(-1, 4)
        ignore = np.arange(objects + regions) >= objects
        records.append(
            Record(
                path=str(path),
                size=size,
                boxes=boxes,
                labels=np.full(len(boxes), number % 2, np.int64),
                ignore=ignore,
                crowd=ignore & False,
                area=(boxes[:, 2:] - boxes[:, :2]).prod(1),
            )
        )
    return records

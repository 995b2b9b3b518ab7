"""Pictures with as much in them as photographs have, each seed another one."""

import cv2
import numpy as np

from tests.utils.datasets.sets import write


def scene(seed: int, size=(120, 160)) -> np.ndarray:
    """Blobs of many sizes, as photographs have."""
    rng = np.random.default_rng(seed)
    canvas = np.zeros(size, np.float32)
    for scale in (3, 8, 25):
        noise = cv2.GaussianBlur(rng.standard_normal(size).astype(np.float32), (0, 0), scale)
        canvas += noise / noise.std()
    return np.clip(128 + 40 * canvas, 0, 255).astype(np.uint8)


def save(path, image, *options) -> str:
    suffix = path.suffix
    return str(write(path, cv2.imencode(suffix, image, options)[1].tobytes()))

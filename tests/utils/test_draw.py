"""Boxes on pictures: the right pixels, the input untouched, nothing that a wild box could break."""

import numpy as np
import pytest
import torch

from utils.draw import batch_mosaic, colour_of, draw_boxes, draw_detections, plain_text, text_patch
from utils.structures import Detections

NAMES = ["disc", "square", "triangle"]


def detections(boxes, labels=None) -> Detections:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes)).long() if labels is None else torch.tensor(labels)
    return Detections(boxes=boxes, scores=torch.linspace(0.9, 0.3, len(boxes)), labels=labels)


def grey(height=240, width=320, channels=3) -> np.ndarray:
    return np.full((height, width, channels), 100, np.uint8)


def test_edges_have_the_class_colour_and_the_inside_is_untouched():
    image = grey()
    drawn = draw_detections(image, detections([[60, 80, 200, 180]], [1]), NAMES, line_thickness=1)
    for x, y in ((60, 120), (200, 120), (130, 180), (190, 80)):
        assert tuple(drawn[y, x]) == colour_of(1), (x, y)
    assert (drawn[90:170, 70:190] == 100).all()
    assert (image == 100).all(), "the picture itself is left alone"
    assert drawn.shape == image.shape and drawn.dtype == np.uint8


def test_the_caption_lies_on_the_box_and_can_be_hidden():
    found = detections([[60, 80, 200, 180]])
    with_text, without = (draw_detections(grey(), found, NAMES, hide_labels=hide) for hide in (False, True))
    above = slice(60, 76)
    assert (with_text[above, 62:90] != 100).any() and (without[above] == 100).all()
    short = draw_detections(grey(), found, NAMES, hide_conf=True)
    assert (short != 100).sum() < (with_text != 100).sum()


def test_a_box_at_the_border_keeps_its_caption_in_the_picture():
    drawn = draw_detections(grey(), detections([[300, 0, 320, 20]]), NAMES)
    assert (drawn[0:16, 250:300] != 100).any()


def test_the_more_certain_box_is_on_top():
    drawn = draw_detections(grey(), detections([[60, 80, 200, 180]] * 2, [0, 1]), NAMES)
    assert tuple(drawn[180, 130]) == colour_of(0)


@pytest.mark.parametrize(
    "box",
    [
        [float("nan")] * 4,
        [-1e30, -1e30, 1e30, 1e30],
        [float("-inf"), 0, float("inf"), 9],
        [900, 900, 950, 950],
        [-50, -50, -10, -10],
        [5, 5, 5, 5],
        [200, 180, 60, 80],
    ],
)
def test_wild_boxes_are_safe(box):
    drawn = draw_detections(grey(), detections([box, [60, 80, 200, 180]]), NAMES)
    assert tuple(drawn[180, 130]) == colour_of(0)


def test_grey_pictures_and_tiny_ones():
    assert draw_boxes(grey(channels=1), np.array([[5, 5, 50, 50]]), [2], NAMES).shape == (240, 320, 3)
    for size in ((1, 1), (3, 40), (40, 3)):
        assert draw_detections(grey(*size), detections([[0, 0, 9, 9]]), NAMES).shape == (*size, 3)
    assert (draw_detections(grey(), detections([]), NAMES) == 100).all()


def test_text():
    assert plain_text("café Ünit 中") == "cafe Unit ?"
    patch = text_patch("disc", 20, (255, 255, 255), (0, 0, 0))
    assert patch.shape[0] == 20 and patch.max() > 200 and tuple(patch[0, 0]) == (0, 0, 0)


def test_mosaic_holds_every_picture_and_stays_within_its_size():
    images = [np.full((60 + 10 * n, 80, 3), 20 * n, np.uint8) for n in range(5)]
    before = [image.copy() for image in images]
    picture = batch_mosaic(images, captions=[f"{n}.jpg" for n in range(5)])
    assert picture.shape == (4 + 2 * 104, 4 + 3 * 84, 3)
    assert picture[4 + 59, 4 + 79].tolist() == [0, 0, 0] and picture[4 + 60 + 30, 4].tolist() == [255, 255, 255]
    assert picture[4 + 104 + 50, 4 + 84 + 40].tolist() == [80, 80, 80]
    assert all((image == old).all() for image, old in zip(images, before))
    assert max(batch_mosaic([grey(1000, 900)] * 20, max_images=16, max_size=640).shape) <= 640

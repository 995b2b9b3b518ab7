"""A picture of an assignment: points where they belong, in their level's colour; the unanswered in red."""

import numpy as np

from utils.draw_assignment import ALONE, LEVELS, draw_assignment

BOXES = np.array([[10.0, 10, 50, 50], [60, 20, 90, 80]])


def draw(points=((20.5, 30.5),), levels=(1,), objects=(0,), ignored=None, negatives=()):
    image = np.full((100, 100, 3), 128, np.uint8)
    kept = image.copy()
    drawn = draw_assignment(
        image,
        BOXES,
        np.array(points, float).reshape(-1, 2),
        np.array(levels, int),
        np.array(objects, int),
        np.full(len(points), 2.0),
        np.zeros((100, 100)) if ignored is None else ignored,
        np.array(negatives, float).reshape(-1, 2),
        side=400,
    )
    assert np.array_equal(image, kept) and drawn.shape == (400, 400, 3) and drawn.dtype == np.uint8
    return drawn


def has(picture, colour) -> np.ndarray:
    return (picture == colour).all(-1)


def test_point_is_at_its_place_in_its_levels_colour():
    found = np.argwhere(has(draw(), LEVELS[1]))
    assert np.abs((found.min(0) + found.max(0)) / 2 - [122, 82]).max() <= 1  # row, column
    assert 14 <= np.ptp(found, axis=0).max() <= 17  # radius 2 of the picture, times 4


def test_object_without_points_is_red_and_others_are_not():
    picture = draw()
    right, left = has(picture, ALONE)[:, 220:], has(picture, ALONE)[:, :200]
    assert right.any() and not left.any()
    assert has(draw(points=[], levels=[], objects=[]), ALONE)[:, :200].any()


def test_ignored_part_is_hatched():
    ignored = np.zeros((100, 100))
    ignored[50:] = 1
    changed = (draw() != draw(ignored=ignored)).any(-1)
    assert changed[330:].mean() > 0.95 and not changed[:198].any()


def test_negatives_are_crosses():
    changed = (draw() != draw(negatives=[(70, 90)])).any(-1)
    assert changed.any() and np.abs(np.argwhere(changed) - [360, 280]).max() <= 5


def test_points_and_boxes_outside_the_picture_are_no_error():
    draw(points=[(-20, 400), (1e9, 5)], levels=[0, 9], objects=[0, 0])

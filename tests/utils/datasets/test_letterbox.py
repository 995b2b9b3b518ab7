"""The gate into network pixels: there and back, and boxes stay on their pixels."""

import cv2
import numpy as np
import pytest

from utils.datasets.letterbox import FILL, fit, letterbox, resize


@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize("upscale", [False, True])
def test_undo_after_apply_is_identity(stretch, upscale):
    rng = np.random.default_rng(0)
    for _ in range(300):
        image_size, size = rng.integers(1, 8193, 2), rng.integers(1, 41, 2) * 32
        (height, width), placed = fit(image_size, size, upscale=upscale, stretch=stretch)
        boxes = rng.uniform(0, 1, (20, 4)) * np.tile(image_size[::-1], 2)
        np.testing.assert_allclose(placed.undo(placed.apply(boxes)), boxes, rtol=0, atol=1e-8)
        whole = placed.apply(np.array([[0.0, 0.0, image_size[1], image_size[0]]]))[0]
        assert 1 <= height <= size[0] and 1 <= width <= size[1]
        np.testing.assert_allclose(whole[2:] - whole[:2], [width, height], atol=1e-6)
        assert (whole[:2] >= 0).all() and (whole[2:] <= size[::-1] + 1e-6).all()


def test_round_trip_in_float32():
    _, placed = fit((3333, 4999), (416, 416))
    boxes = np.random.default_rng(1).uniform(0, 3333, (100, 4)).astype(np.float32)
    back = placed.undo(placed.apply(boxes))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, boxes, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [(480, 640), (640, 480), (33, 1000), (50, 31), (1700, 2300)])
@pytest.mark.parametrize("stretch", [False, True])
def test_boxes_stay_on_their_pixels(image_size, channels, stretch):
    height, width = image_size
    box = np.array([[width // 5, height // 3, width * 3 // 4, height * 5 // 6]], dtype=np.float32)
    x1, y1, x2, y2 = box[0].astype(int)
    image = np.zeros((height, width, channels), np.uint8)
    image[y1:y2, x1:x2] = 255
    canvas, placed = letterbox(image, (320, 416), fill=0, stretch=stretch)
    assert canvas.shape == (320, 416, channels) and canvas.dtype == np.uint8
    rows, columns = np.nonzero(canvas[..., 0] > 127)
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(placed.apply(box)[0], seen, atol=max(1.0, *placed.scale))


def test_canvas_is_the_resized_picture_and_grey():
    image = np.random.default_rng(2).integers(0, 256, (300, 400, 3), np.uint8)
    canvas, placed = letterbox(image, (256, 320))
    top = int(placed.pad[1])
    np.testing.assert_array_equal(
        canvas[top : top + 240], cv2.resize(image, (320, 240), interpolation=cv2.INTER_LINEAR)
    )
    assert (canvas[:top] == FILL).all() and (canvas[top + 240 :] == FILL).all()


def test_a_picture_of_the_right_size_is_untouched():
    image = np.random.default_rng(3).integers(0, 256, (64, 96, 3), np.uint8)
    canvas, placed = letterbox(image, (64, 96))
    np.testing.assert_array_equal(canvas, image)
    assert placed.scale == (1.0, 1.0) and placed.pad == (0.0, 0.0)


def test_small_pictures_are_enlarged_only_if_wanted():
    image = np.full((20, 10, 3), 7, np.uint8)
    assert (letterbox(image, (64, 64))[0] == 7).all(axis=2).sum() == 64 * 32
    assert (letterbox(image, (64, 64), upscale=False)[0] == 7).all(axis=2).sum() == 200


@pytest.mark.parametrize("image_size", [(1, 1), (1, 10000), (10000, 1), (9, 9)])
def test_extreme_pictures(image_size):
    canvas, placed = letterbox(np.zeros((*image_size, 3), np.uint8), (96, 160))
    assert canvas.shape == (96, 160, 3) and (canvas == 0).any()
    assert min(placed.scale) > 0


def test_fine_texture_does_not_alias():
    checker = (np.indices((1000, 1000)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    canvas, _ = letterbox(checker, (96, 96))
    assert canvas.std() < 8


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("new_size", [(240, 320), (97, 400), (60, 33), (20, 27), (1, 1)])
def test_small_pictures_show_all_pixels_as_by_area(new_size, channels):
    rng = np.random.default_rng(4)
    image = np.repeat(np.repeat(rng.integers(0, 256, (120, 161, channels), np.uint8), 4, axis=0), 4, axis=1)[:, :641]
    small = np.zeros((*new_size, channels), np.uint8)
    resize(image, small)
    exact = cv2.resize(image, new_size[::-1], interpolation=cv2.INTER_AREA).reshape(small.shape)
    linear = cv2.resize(image, new_size[::-1], interpolation=cv2.INTER_LINEAR).reshape(small.shape)
    ours, theirs = (abs(picture.astype(float) - exact).mean() for picture in (small, linear))
    assert ours < 16 and (ours < theirs / 1.5 or min(new_size) > 90)
    assert abs(small.mean() - image.mean()) < 2

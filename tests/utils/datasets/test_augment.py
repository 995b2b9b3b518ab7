"""Image and boxes move together: paint an object, change the picture, find the paint."""

import dataclasses

import cv2
import numpy as np
import pytest

from utils.datasets import augment as module
from utils.datasets.augment import Augment, flip, hsv, mixup, mosaic, random_perspective
from utils.datasets.letterbox import letterbox
from utils.structures import ImageInfo, Sample

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
COLOURS = np.array([RED, GREEN, BLUE, WHITE])


def painted(size, box, label=0, channels=3, ignore=False):
    """A black picture with one object in the colour of its label."""
    height, width = size
    image = np.zeros((height, width, channels), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = COLOURS[label] if channels == 3 else 255
    info = ImageInfo(id=label, path=f"{label}.png", size=size)
    boxes = np.array([box], np.float32)
    return Sample(image=image, boxes=boxes, labels=np.array([label]), ignore=np.array([ignore]), info=info)


def find(image, label):
    """Box of the paint of a label, where at least half of a pixel is covered."""
    others = [channel for channel in range(3) if COLOURS[label][channel] == 0]
    own = [channel for channel in range(3) if COLOURS[label][channel]]
    strength = image[..., own].min(2).astype(int) - (image[..., others].max(2) if others else 0)
    rows, columns = np.nonzero(strength > 127)
    if not len(rows):
        return None
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)


def four(rng):
    """Pictures of several sizes, each with one object of its own colour."""
    for label in range(4):
        height, width = rng.integers(60, 900, 2)
        x1, y1 = rng.integers(0, (width * 3 // 4, height * 3 // 4))
        yield painted((height, width), (x1, y1, x1 + width // 4, y1 + height // 4), label)


UPRIGHT = Augment(scale=0.5, translate=0.2)
TURNED = Augment(degrees=25, shear=8, scale=0.3, translate=0.1)
TILTED = Augment(perspective=0.0004, degrees=10, scale=0.2, translate=0.1)


@pytest.mark.parametrize("size", [(256, 256), (224, 352)])
@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize(("augment", "within"), [(Augment(), 0.75), (UPRIGHT, 0.75), (TURNED, 1.5), (TILTED, 1.5)])
def test_boxes_follow_pixels_in_single_pictures(augment, within, size, stretch):
    found = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        sample = random_perspective(next(four(rng)), size, augment, rng, stretch=stretch)
        assert sample.image.shape == (*size, 3)
        found += check(sample, within, corners_cut=within > 1)
    assert found >= 10


@pytest.mark.parametrize("size", [(256, 256), (224, 352)])
@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize(("augment", "within"), [(Augment(), 0.75), (UPRIGHT, 0.75), (TURNED, 1.5), (TILTED, 1.5)])
def test_boxes_follow_pixels_in_mosaics(augment, within, size, stretch):
    found = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        sample = mosaic(list(four(rng)), size, augment, rng, stretch=stretch)
        assert sample.image.shape == (*size, 3)
        found += check(sample, within, corners_cut=within > 1)
    assert found >= 25


@pytest.mark.parametrize("augment", [UPRIGHT, TURNED, TILTED])
def test_boxes_are_not_shifted_by_a_part_of_a_pixel(augment):
    """OpenCV counts from the middle of the first pixel and boxes from its edge: half a pixel, were it forgotten."""
    middles = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        sample = random_perspective(next(four(rng)), (256, 256), augment, rng)
        for box in sample.boxes:
            if (box > 1).all() and (box < 255).all():
                difference = box - find(sample.image, 0)
                middles.append((difference[:2] + difference[2:]) / 2)
    assert len(middles) > 50 and np.abs(np.mean(middles, axis=0)).max() < 0.1


def check(sample, within, corners_cut):
    """Every box hugs its paint, every paint that is clearly there has its box. Counts the boxes looked at.

    Cut at the border, the hull of a turned object may be larger than what is left of it: then only containment holds.
    """
    height, width = sample.image.shape[:2]
    looked = 0
    for box, label in zip(sample.boxes, sample.labels):
        seen = find(sample.image, label)
        touches = (box[:2] <= 0).any() or box[2] >= width or box[3] >= height
        if corners_cut and touches:
            assert seen is None or ((seen[:2] >= box[:2] - within).all() and (seen[2:] <= box[2:] + within).all())
            continue
        np.testing.assert_allclose(box, seen, atol=within)
        looked += 1
    for label in set(range(4)) - set(sample.labels.tolist()):
        seen = find(sample.image, label)
        inside = seen is not None and (seen[:2] > 1).all() and seen[2] < width - 1 and seen[3] < height - 1
        assert not (inside and (seen[2:] - seen[:2]).min() > 4), "an object in full view lost its box"
    return looked


def test_nothing_asked_for_is_a_plain_letterbox():
    image = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    sample = painted((300, 200), (10, 20, 100, 280)).replace(image=image)
    changed = random_perspective(sample, (192, 256), Augment(), np.random.default_rng(0))
    canvas, placed = letterbox(image, (192, 256))
    np.testing.assert_array_equal(changed.image, canvas)
    np.testing.assert_allclose(changed.boxes, placed.apply(sample.boxes), atol=1e-4)
    same = flip(hsv(sample, Augment(), np.random.default_rng(0)), Augment(), np.random.default_rng(0))
    np.testing.assert_array_equal(same.image, image)
    np.testing.assert_array_equal(same.boxes, sample.boxes)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("key", ["fliplr", "flipud"])
def test_flips_move_boxes_and_are_involutions(key, channels):
    sample = painted((40, 60), (5, 8, 20, 30), channels=channels)
    augment, rng = Augment(**{key: 1}), np.random.default_rng(0)
    once = flip(sample, augment, rng)
    rows, columns = np.nonzero(once.image[..., 0])
    np.testing.assert_array_equal(once.boxes[0], [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert not np.array_equal(once.image, sample.image)
    twice = flip(once, augment, rng)
    np.testing.assert_array_equal(twice.image, sample.image)
    np.testing.assert_array_equal(twice.boxes, sample.boxes)


def test_mixup_shows_both():
    first, second = painted((64, 64), (4, 4, 20, 30), 0), painted((64, 64), (30, 20, 60, 50), 1)
    both = mixup(first, second, np.random.default_rng(0))
    assert both.labels.tolist() == [0, 1]
    strength = both.image.astype(int).max((0, 1))
    assert 250 <= strength[0] + strength[1] <= 256 and min(strength[:2]) > 60
    for row, channel in enumerate((0, 1)):
        rows, columns = np.nonzero(both.image[..., channel])
        np.testing.assert_array_equal(both.boxes[row], [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_ignore_regions_move_along_and_outlive_cropping():
    kept = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        samples = [dataclasses.replace(sample, ignore=np.array([True])) for sample in four(rng)]
        result = mosaic(samples, (256, 256), UPRIGHT, rng)
        assert result.ignore.all() and len(result.ignore) == len(result.boxes) == len(result.labels)
        check(result, 1, corners_cut=False)
        missing = set(range(4)) - set(result.labels.tolist())
        assert all(find(result.image, label) is None for label in missing), "an ignore region in view was dropped"
        kept += len(result.labels)
    assert kept > 40


def test_what_is_hardly_visible_goes_and_ignore_regions_stay():
    boxes = np.array([[-95, 0, 5, 50], [-85, 0, 15, 50], [10, 10, 11.5, 90], [10, 10, 40, 40]], np.float32)
    clipped, kept = module._move_boxes(boxes, np.zeros(4, bool), np.eye(3), (100, 100))
    assert kept.tolist() == [False, True, False, True]  # a 20th visible, a 7th, too thin, whole
    np.testing.assert_array_equal(clipped[1], [0, 0, 15, 50])
    assert module._move_boxes(boxes, np.ones(4, bool), np.eye(3), (100, 100))[1].all()


@pytest.mark.parametrize("perspective", [0.0, 0.001])
def test_any_boxes_stay_inside_and_finite(perspective):
    augment = Augment(degrees=180, shear=40, scale=0.9, translate=0.5, perspective=perspective)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        height, width = rng.integers(1, 700, 2)
        corners = np.sort(rng.uniform(0, 1, (8, 2, 2)), axis=1) * (width, height)
        sample = Sample(
            image=np.zeros((height, width, 3), np.uint8),
            boxes=corners.reshape(8, 4).astype(np.float32),
            labels=np.arange(8),
            ignore=rng.random(8) < 0.3,
            info=ImageInfo(id=0, path="x", size=(height, width)),
        )
        result = mosaic([sample] * 4, (320, 320), augment, rng)
        sides = result.boxes[:, 2:] - result.boxes[:, :2]
        assert np.isfinite(result.boxes).all() and (sides > 0).all()
        assert (result.boxes >= 0).all() and (result.boxes <= 320).all() and result.boxes.dtype == np.float32


@pytest.mark.parametrize("augment", [Augment(hsv_v=0.4, scale=0.5), Augment(hsv_v=0.4, degrees=20)])
def test_grey_pictures(augment):
    rng = np.random.default_rng(0)
    samples = [painted((80, 120), (10, 10, 60, 60), channels=1) for _ in range(4)]
    result = mosaic(samples, (96, 96), augment, rng)
    assert flip(hsv(result, augment, rng), augment, rng).image.shape == (96, 96, 1)
    assert mixup(result, result, rng).image.shape == (96, 96, 1)


def test_empty_pictures():
    empty = painted((50, 50), (0, 0, 0, 0))
    empty = empty.replace(boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int64), ignore=np.zeros(0, bool))
    for augment in (UPRIGHT, TURNED):
        rng = np.random.default_rng(0)
        result = flip(mosaic([empty] * 4, (64, 64), augment, rng), Augment(fliplr=1), rng)
        assert result.boxes.shape == (0, 4) and result.boxes.dtype == np.float32


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [UPRIGHT, TURNED, dataclasses.replace(UPRIGHT, hsv_h=0.02, hsv_s=0.5, hsv_v=0.4)])
def test_pixels_go_where_they_are_wanted_and_are_the_same(augment, channels):
    augment, size = dataclasses.replace(augment, fliplr=0.5, flipud=0.5), (96, 128)
    for seed in range(12):
        samples = [painted((80, 120), (10, 10, 60, 60), label, channels) for label in range(4)]

        def whole(rng, paint, colour, mirror, samples=samples):
            sample = mosaic(samples, size, augment, rng, out=paint)
            other = random_perspective(samples[1], size, augment, rng)
            sample = mixup(sample, other, rng, out=paint)
            return flip(hsv(sample, augment, rng, colour), augment, rng, mirror)

        rng = np.random.default_rng
        paint, out = np.empty((2, *size, channels), np.uint8)
        expected = whole(rng(seed), None, None, None)
        for memory in ((paint, out, out), (out, out, out)):
            sample = whole(rng(seed), *memory)
            assert np.shares_memory(sample.image, out) and sample.image.shape == out.shape
            np.testing.assert_array_equal(out, expected.image)
            np.testing.assert_array_equal(sample.boxes, expected.boxes)


HSV = Augment(hsv_h=0.05, hsv_s=0.4, hsv_v=0.3)


def test_hsv_changes_each_of_the_three_by_its_own_range():
    """Hue turns evenly, saturation and brightness are multiplied: read back from a colour where nothing clips."""
    sample = painted((4, 4), (0, 0, 2, 2)).replace(image=np.tile(np.uint8([[[150, 75, 60]]]), (4, 4, 1)))
    rng = np.random.default_rng(0)
    seen = np.array([sample.image[0, 0], *(hsv(sample, HSV, rng).image[0, 0] for _ in range(400))], np.float64)
    brightness = seen.mean(1)
    # the plane of colours of one brightness: red lies along x, green at 120 degrees
    plane = (seen - brightness[:, None]) @ [1, np.exp(2j * np.pi / 3), np.exp(-2j * np.pi / 3)]
    hue = np.degrees(np.angle(plane[1:] / plane[0]))
    saturation = abs(plane[1:] / plane[0]) / (brightness[1:] / brightness[0]) - 1
    for change, limit, slack in (
        (hue, 18, 1),
        (saturation, 0.4, 0.02),
        (brightness[1:] / brightness[0] - 1, 0.3, 0.01),
    ):
        assert limit * 0.9 < change.max() < limit + slack and -limit - slack < change.min() < -limit * 0.9
        assert abs(change.mean()) < limit * 0.12
        assert abs(change.std() - limit / 3**0.5) < limit * 0.1  # uniform
    assert abs(np.corrcoef([hue, saturation, brightness[1:]]) - np.eye(3)).max() < 0.15


def test_hsv_changes_pictures_as_much_as_a_round_trip_through_hsv_does():
    """Distributions over pictures of mean saturation, mean value and contrast, against the way of YOLOv5."""
    augment = Augment(hsv_h=0.015, hsv_s=0.7, hsv_v=0.4)

    def round_trip(image, rng):
        turn, *gains = rng.uniform(-1, 1, 3) * (augment.hsv_h, augment.hsv_s, augment.hsv_v)
        values = np.arange(256.0)
        tables = [(values + turn * 180).round() % 180, *(np.clip(values * (1 + gain), 0, 255) for gain in gains)]
        table = np.stack(tables, axis=1).round().astype(np.uint8)[None]
        return cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table), cv2.COLOR_HSV2RGB)

    def statistics(image):
        colours = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1:].astype(np.float64)
        return [*colours.mean((0, 1)), colours[..., 1].std()]

    changes = []
    for number in range(300):
        rng = np.random.default_rng(number)
        # as in photographs: grey light and shadow, and a weaker colour of its own in each region
        light = cv2.resize(rng.uniform(40, 210, (6, 6, 1)), (32, 32))[..., None]
        image = np.clip(light + cv2.resize(rng.normal(0, 20, (4, 4, 3)), (32, 32)), 0, 255).astype(np.uint8)
        fast = hsv(painted((32, 32), (0, 0, 2, 2)).replace(image=image), augment, np.random.default_rng((1, number)))
        slow = round_trip(image, np.random.default_rng((1, number)))
        before = statistics(image)
        changes.append([np.divide(statistics(after), before) for after in (fast.image, slow)])
    fast, slow = np.array(changes).transpose(1, 2, 0)
    for ours, theirs, within in zip(fast, slow, (0.18, 0.05, 0.15)):
        ours_spread, theirs_spread = (np.quantile(change, (0.05, 0.25, 0.5, 0.75, 0.95)) for change in (ours, theirs))
        assert abs(ours_spread - theirs_spread).max() < within
        assert np.corrcoef(ours, theirs)[0, 1] > 0.8


@pytest.mark.parametrize("size", [(256, 256), (224, 352)])
def test_crop_and_resize_show_what_a_warp_shows(size, monkeypatch):
    """The short way of an upright mosaic against the warp of every tile: the same objects, at the same places."""
    for seed in range(20):
        samples = list(four(np.random.default_rng(seed)))
        samples = [sample.replace(image=cv2.blur(sample.image, (9, 9))) for sample in samples]
        short = mosaic(samples, size, UPRIGHT, np.random.default_rng(seed))
        with monkeypatch.context() as patch:
            patch.setattr(module, "_is_upright", lambda matrix: False)
            long = mosaic(samples, size, UPRIGHT, np.random.default_rng(seed))
        assert abs(short.image.astype(int) - long.image).mean() < 1.5
        shared = sorted(set(short.labels) & set(long.labels))
        assert len(short.labels) + len(long.labels) - 2 * len(shared) <= 1  # one may be at the edge of being dropped
        for label in shared:
            np.testing.assert_allclose(short.boxes[short.labels == label], long.boxes[long.labels == label], atol=1.0)


def test_recipe_values_out_of_range_are_named_together():
    with pytest.raises(ValueError, match=r"fliplr.*1\.5.*") as error:
        Augment(fliplr=1.5, mosaic=-1, multi_scale=(1.5, 0.5))
    assert "mosaic" in str(error.value) and "multi_scale" in str(error.value)

"""Who shows the same picture: found through size, compression and brightness; equal to comparing all with all."""

import cv2
import numpy as np
import pytest

from tests.utils.datasets.scenes import save, scene
from tests.utils.datasets.sets import write
from utils.datasets.limits import LIMITS
from utils.datasets.lookalikes import MAX_DISTANCE, MIN_LIKENESS, groups, look_at, look_at_all, same_pictures
from utils.errors import UserError

CHANGES = {
    "half": lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "larger": lambda image: cv2.resize(image, None, fx=1.7, fy=1.7),
    "brighter": lambda image: cv2.convertScaleAbs(image, alpha=1.1, beta=12),
    "jpeg": lambda image: cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_and_strangers_are_not(tmp_path, change):
    paths = [save(tmp_path / f"{number}.png", scene(number)) for number in range(30)]
    paths += [save(tmp_path / f"{change}{number}.png", CHANGES[change](scene(number))) for number in range(30)]
    found = same_pictures([look_at(path, LIMITS) for path in paths])
    assert found == [(number, 30 + number) for number in range(30)]


def test_as_comparing_all_with_all(tmp_path):
    images = [np.roll(scene(number % 8), number // 8, axis=1) for number in range(64)]
    looks = [look_at(save(tmp_path / f"{n}.png", image), LIMITS) for n, image in enumerate(images)]
    expected = []
    for i, first in enumerate(looks):
        for k in range(i + 1, len(looks)):
            bits = np.unpackbits(first.hash ^ looks[k].hash).sum()
            alike = bits <= MAX_DISTANCE and first.details @ looks[k].details > MIN_LIKENESS
            expected += [(i, k)] * bool(alike or first.digest == looks[k].digest)
    assert same_pictures(looks) == expected and len(expected) > 20


def test_plain_pictures_are_alike_only_byte_by_byte(tmp_path):
    grey = [
        save(tmp_path / f"{name}.png", np.full((40, 40), shade, np.uint8)) for name, shade in zip("abc", (9, 200, 9))
    ]
    assert same_pictures([look_at(path, LIMITS) for path in grey]) == [(0, 2)]


def test_groups():
    assert groups([(0, 4), (2, 3), (4, 7), (3, 9), (5, 6)]) == [[0, 4, 7], [2, 3, 9], [5, 6]]
    assert groups([(1, 2), (3, 4), (2, 4)]) == [[1, 2, 3, 4]] and groups([]) == []


def test_what_does_not_decode_is_an_error_beside_the_others(tmp_path):
    good = save(tmp_path / "good.png", scene(0))
    data = bytearray((tmp_path / "good.png").read_bytes())
    data[60:-40] = bytes(len(data) - 100)
    bad = str(write(tmp_path / "bad.png", bytes(data)))
    looks = look_at_all([good, bad], LIMITS)
    assert looks[good].header.format == "PNG" and isinstance(looks[bad], UserError)
    assert same_pictures([]) == [] == same_pictures([looks[good]])


def test_one_backdrop_is_not_one_picture(tmp_path):
    """The generated data set: smooth backgrounds, each with other shapes."""
    ramp = np.linspace(60, 200, 160)[None].repeat(120, 0)
    paths = []
    for number in range(12):
        image = ramp.astype(np.uint8)
        for x, y, side in np.random.default_rng(number).integers((5, 5, 10), (120, 80, 40), (3, 3)).tolist():
            cv2.rectangle(image, (x, y), (x + side, y + side), 255 - side, -1)
        paths.append(save(tmp_path / f"{number}.png", image))
    assert same_pictures([look_at(path, LIMITS) for path in paths]) == []

"""Decoded pictures, kept: the same pixels, sized before they are read."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from painted import paint_records

from utils.datasets import cache as module
from utils.datasets.augment import Augment
from utils.datasets.cache import CACHES, build_cache
from utils.datasets.dataset import DetectionDataset
from utils.datasets.images import read_image
from utils.datasets.loader import Draw
from utils.errors import ResourceError, UserError


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return paint_records(folder, 6)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("channels", [1, 3])
def test_small_pictures_are_kept_pixel_by_pixel(records, tmp_path, kind, channels):
    cache = build_cache(kind, records, max_side=64, channels=channels, folder=tmp_path / "cache")
    assert len(cache) == 6
    for index, record in enumerate(records):
        np.testing.assert_array_equal(cache[index], read_image(record.path, channels))
        with pytest.raises(ValueError, match="read-only"):
            cache[index][0, 0] = 0
    for augment in (None, Augment(mosaic=1, degrees=5, fliplr=0.5, hsv_v=0.3)):
        plain = DetectionDataset(records, augment=augment, channels=channels)
        cached = DetectionDataset(records, augment=augment, channels=channels, cache=cache)
        for position in range(6):
            draw = Draw(0, position, position, (64, 96))
            np.testing.assert_array_equal(plain[draw].image, cached[draw].image)
            np.testing.assert_array_equal(plain[draw].boxes, cached[draw].boxes)


@pytest.mark.parametrize("kind", CACHES)
def test_large_pictures_are_reduced_and_their_boxes_with_them(tmp_path, kind):
    folder = tmp_path / "pictures"
    folder.mkdir()
    records = paint_records(folder, 3, sizes=((301, 400), (400, 207)))
    cache = build_cache(kind, records, max_side=100, folder=tmp_path / "cache")
    assert [cache[index].shape for index in range(3)] == [(75, 100, 3), (100, 52, 3), (75, 100, 3)]
    dataset, original = DetectionDataset(records, cache=cache), DetectionDataset(records)
    for index, record in enumerate(records):
        draw = Draw(0, 0, index, (96, 96))
        sample = dataset[draw]
        np.testing.assert_allclose(sample.boxes, original[draw].boxes, atol=0.5)
        np.testing.assert_allclose(sample.info.letterbox.undo(sample.boxes), record.boxes, atol=1e-3)
        assert sample.info.size == record.size


def test_a_cache_changes_no_training_sample(tmp_path):
    """Also of pictures that are larger than the training size: without a cache they are reduced alike."""
    records = paint_records(tmp_path, 5, sizes=((300, 200), (150, 260), (40, 50)))
    augment = Augment(mosaic=0.5, mixup=0.3, scale=0.5, degrees=3, fliplr=0.5, hsv_s=0.3)
    plain = DetectionDataset(records, augment=augment)
    cached = DetectionDataset(records, augment=augment, cache=build_cache("ram", records, max_side=128))
    for position in range(15):
        draw = Draw(0, position, position % 5, (96, 128), (0, 1, 2, 3, 4))
        one, other = plain[draw], cached[draw]
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.boxes, other.boxes)


@pytest.mark.parametrize("kind", CACHES)
def test_what_does_not_fit_is_refused_before_a_picture_is_read(records, tmp_path, monkeypatch, kind):
    bytes_needed = sum(height * width * 3 for height, width in (record.size for record in records))
    usage = type("Usage", (), {"free": bytes_needed})
    monkeypatch.setattr(module, "free_memory", lambda: bytes_needed)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(module, "read_image", lambda *_: pytest.fail("read before it was sized"))
    with pytest.raises(ResourceError, match=f"--cache {kind}: 6 pictures need .* GB, .* GB of .* are free.*no cache"):
        build_cache(kind, records, max_side=64, folder=tmp_path / "cache")


def test_disk_cache_is_found_again_until_a_picture_changes(records, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    build_cache("disk", records, max_side=64, folder=folder)
    before = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_image", lambda *_: pytest.fail("read again"))
        build_cache("disk", records, max_side=64, folder=folder)
    os.utime(records[0].path, ns=(0, 1))
    build_cache("disk", records, max_side=64, folder=folder)
    build_cache("disk", records, max_side=32, folder=folder)
    assert len(list(folder.glob("*/images.npy"))) == 3
    assert before == sorted(path.name for path in (tmp_path / "pictures").iterdir()), "the data set is read-only"


def test_an_interrupted_disk_cache_leaves_nothing_behind(records, tmp_path):
    folder = tmp_path / "cache"
    last = Path(records[5].path)
    good = last.read_bytes()
    last.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"005\.png"):
        build_cache("disk", records, max_side=64, folder=folder)
    assert not [path for path in folder.rglob("*") if path.is_file()]
    last.write_bytes(good)
    assert len(build_cache("disk", records, max_side=64, folder=folder)) == 6


def test_a_picture_of_another_size_than_its_record_is_named(records):
    wrong = [dataclasses.replace(records[0], size=(64, 48))]
    with pytest.raises(UserError, match=r"000\.png: the picture is 64x48, it was 48x64"):
        build_cache("ram", wrong, max_side=64)


def test_free_memory_is_plausible():
    assert 10**7 < module.free_memory() < 10**14

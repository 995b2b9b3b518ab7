"""A sample is a function of (seed, draw)."""

import dataclasses

import numpy as np
import pytest
from painted import paint_records

from utils.datasets.augment import Augment
from utils.datasets.dataset import DetectionDataset
from utils.datasets.images import read_image
from utils.datasets.letterbox import letterbox
from utils.datasets.loader import Draw
from utils.errors import UserError

EVERYTHING = Augment(
    hsv_h=0.01, hsv_s=0.5, hsv_v=0.4, degrees=10, translate=0.1, scale=0.5, shear=3, fliplr=0.5, mosaic=0.7, mixup=0.4
)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return paint_records(tmp_path_factory.mktemp("pictures"), 8)


def assert_equal(one, other):
    for name in ("image", "boxes", "labels", "ignore"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("stretch", [False, True])
def test_without_augmentation_the_way_back_leads_to_the_record(records, stretch):
    dataset = DetectionDataset(records, stretch=stretch)
    assert len(dataset) == 8
    for index, record in enumerate(records):
        sample = dataset[Draw(0, 0, index, (96, 128))]
        canvas, _ = letterbox(read_image(record.path), (96, 128), stretch=stretch)
        np.testing.assert_array_equal(sample.image, canvas)
        np.testing.assert_allclose(sample.info.letterbox.undo(sample.boxes), record.boxes, atol=1e-4)
        np.testing.assert_array_equal(sample.labels, record.labels)
        np.testing.assert_array_equal(sample.ignore, record.ignore)
        assert (sample.info.id, sample.info.path, sample.info.size) == (index, record.path, record.size)


def test_one_channel(records):
    assert DetectionDataset(records, channels=1, augment=EVERYTHING)[Draw(0, 0, 1, (64, 64))].image.shape == (64, 64, 1)


def test_a_sample_depends_on_seed_epoch_and_position_only(records):
    dataset, draw = DetectionDataset(records, augment=EVERYTHING, seed=5), Draw(2, 7, 3, (96, 96))
    first = dataset[draw]
    for other in range(8):
        dataset[Draw(0, other, other, (64, 64))]
    np.random.seed(0)
    assert_equal(first, dataset[draw])
    assert_equal(first, DetectionDataset(records, augment=EVERYTHING, seed=5)[draw])
    changed = [
        dataset[draw._replace(epoch=3)],
        dataset[draw._replace(position=8)],
        DetectionDataset(records, augment=EVERYTHING, seed=6)[draw],
    ]
    assert not any(np.array_equal(first.image, sample.image) for sample in changed)


def test_the_last_epochs_go_without_mosaic_and_mixup(records):
    augment = Augment(mosaic=1, mixup=1, close_mosaic=2)
    dataset = DetectionDataset(records, augment=augment, epochs=10)
    plain = DetectionDataset(records)
    draw = Draw(8, 0, 1, (64, 64))
    assert_equal(dataset[draw], plain[draw])
    assert not np.array_equal(dataset[draw._replace(epoch=7)].image, plain[draw].image)
    for epochs in (None, 10):  # nothing is closed where nothing was asked for
        always = DetectionDataset(records, augment=Augment(mosaic=1), epochs=epochs)
        assert not np.array_equal(always[draw._replace(epoch=9)].image, plain[draw].image)


def test_records_are_held_as_arrays(records):
    """Lists of objects grow in every worker: each look at one writes its reference count (pytorch issue 13246)."""
    held = vars(DetectionDataset(records * 50, augment=EVERYTHING))
    assert not [name for name, value in held.items() if isinstance(value, (list, tuple, dict))]
    assert all(value.dtype != object for value in held.values() if isinstance(value, np.ndarray))


def test_non_ascii_paths(tmp_path):
    folder = tmp_path / "bilder-ü-图"
    folder.mkdir()
    records = paint_records(tmp_path, 1)
    target = folder / "é.png"
    target.write_bytes((tmp_path / "000.png").read_bytes())
    record = dataclasses.replace(records[0], path=str(target))
    assert DetectionDataset([record])[Draw(0, 0, 0, (64, 64))].info.path == str(target)


@pytest.mark.parametrize("augment", [None, EVERYTHING])
def test_a_file_that_cannot_be_read_is_named(tmp_path, augment):
    records = paint_records(tmp_path, 1)
    (tmp_path / "000.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"000\.png"):
        DetectionDataset(records, augment=augment)[Draw(0, 0, 0, (64, 64))]

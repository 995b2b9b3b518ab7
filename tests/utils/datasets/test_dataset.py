"""A sample is a function of (seed, draw)."""

import dataclasses

import numpy as np
import pytest
from painted import paint_records

from utils.datasets import dataset as dataset_module
from utils.datasets.augment import Augment, mosaic
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


@pytest.mark.parametrize("augment", [None, EVERYTHING, Augment(), Augment(fliplr=1)])
def test_a_sample_is_made_in_its_place_of_a_batch(records, augment):
    dataset, images = DetectionDataset(records, augment=augment), np.zeros((6, 64, 96, 3), np.uint8)
    for row in range(6):
        draw = Draw(0, row, row, (64, 96), tuple(range(8)))
        sample = dataset.make(draw, images[row])
        assert np.shares_memory(sample.image, images[row])
        assert_equal(sample, dataset[draw])
    for row in range(6):  # and nothing is painted there later
        np.testing.assert_array_equal(images[row], dataset[Draw(0, row, row, (64, 96), tuple(range(8)))].image)


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


def test_neighbours_are_shown_and_read_once(records, monkeypatch):
    """Mosaics and mixups of a batch show its neighbours only, each decoded once, and none twice in a mosaic."""
    read, shown = [], []
    monkeypatch.setattr(dataset_module, "read_image", lambda path, *_, **__: read.append(path) or read_image(path))
    monkeypatch.setattr(
        dataset_module,
        "mosaic",
        lambda samples, *rest, **options: shown.append(samples) or mosaic(samples, *rest, **options),
    )
    dataset = DetectionDataset(records, augment=dataclasses.replace(EVERYTHING, mosaic=1, mixup=1))
    neighbours = (1, 2, 5, 6, 7)
    for row, index in enumerate(neighbours):
        dataset[Draw(0, row, index, (64, 64), neighbours)]
    assert sorted(read) == [records[index].path for index in neighbours]
    for samples in shown:
        assert len({sample.info.id for sample in samples}) == 4 and {sample.info.id for sample in samples} <= {
            *neighbours
        }
    assert len(shown) == 10 and len({sample.info.id for samples in shown[::2] for sample in samples[1:]}) == 5


def test_what_is_remembered_changes_no_sample(records):
    """Pixels held for the neighbours are never painted on, whatever is done to a sample."""
    neighbours = tuple(range(8))
    used = DetectionDataset(records, augment=EVERYTHING)
    for row in range(40):
        draw = Draw(row // 8, row, row % 8, (64, 64 + row % 2 * 32), neighbours)
        assert_equal(used[draw], DetectionDataset(records, augment=EVERYTHING)[draw])


def test_large_pictures_are_held_at_the_training_size(tmp_path):
    (record,) = paint_records(tmp_path, 1, sizes=((600, 800),))
    dataset = DetectionDataset([record], augment=Augment(scale=0.5))
    sample = dataset.load(0, 192)
    assert sample.image.shape == (144, 192, 3)
    np.testing.assert_allclose(sample.boxes, record.boxes * 0.24, rtol=1e-5)
    assert dataset.load(0).image.shape == (600, 800, 3)


def test_records_are_held_as_arrays(records):
    """Lists of objects grow in every worker: each look at one writes its reference count (pytorch issue 13246)."""
    held = vars(DetectionDataset(records * 50, augment=EVERYTHING))
    assert not [name for name, value in held.items() if type(value) in (list, tuple, dict)]
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

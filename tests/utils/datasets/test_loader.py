"""Which sample when; batches; workers change nothing."""

import collections
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from painted import paint_records

from utils.datasets.augment import Augment
from utils.datasets.dataset import DetectionDataset
from utils.datasets.loader import NEIGHBOURS, Draw, EvalSampler, TrainSampler, balance_weights, build_loader, collate
from utils.errors import ResourceError, UserError

AUGMENT = Augment(hsv_v=0.4, degrees=5, translate=0.1, scale=0.5, fliplr=0.5, mosaic=0.8, mixup=0.2)
SIZE = (64, 96)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return paint_records(tmp_path_factory.mktemp("pictures"), 11)


def draws(sampler):
    return [draw for batch in sampler for draw in batch]


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("num", [1, 3, 8, 13, 29])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("epoch", [0, 4])
def test_every_picture_once_and_equal_steps_on_all_ranks(num, world, rect, epoch):
    sizes = np.random.default_rng(0).integers(100, 900, (num, 2)) if rect else None
    ranks = [
        TrainSampler(num, 4, size=SIZE, seed=3, rank=rank, world=world, image_sizes=sizes) for rank in range(world)
    ]
    for sampler in ranks:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in ranks]
    assert {len(part) for part in batches} == {len(ranks[0])}
    for parts in zip(*batches):
        assert len({len(batch) for batch in parts}) == 1 and 1 <= len(parts[0]) <= 4
        assert len({draw.size for batch in parts for draw in batch}) == 1
    counts = collections.Counter(draw.index for part in batches for batch in part for draw in batch)
    assert set(counts) == set(range(num))
    extra = -num % world  # wrapped to make the ranks equal
    assert sum(counts.values()) == num + extra
    assert max(counts.values()) <= -(-(num + extra) // num)
    positions = [draw.position for part in batches for batch in part for draw in batch]
    assert sorted(positions) == list(range(num + extra)), "two samples would share their chance"
    assert all(draw.epoch == epoch for part in batches for batch in part for draw in batch)


def test_two_ranks_see_what_one_of_doubled_batch_sees():
    def options(**changes):
        return TrainSampler(24, size=SIZE, seed=1, multi_scale=(0.5, 2), **changes)

    one = [set(batch) for batch in options(batch_size=8)]
    two = zip(options(batch_size=4, world=2, rank=0), options(batch_size=4, world=2, rank=1))
    assert one == [set(first + second) for first, second in two]


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = TrainSampler(50, 8, size=SIZE, seed=seed)
        sampler.set_epoch(epoch)
        return [draw.index for draw in draws(sampler)]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("start", [0, 1, 5, 7])
def test_resume_inside_an_epoch_leaves_the_remaining_draws(start, rect):
    sizes = np.random.default_rng(0).integers(100, 900, (27, 2)) if rect else None
    whole = TrainSampler(27, 4, size=SIZE, multi_scale=(0.5, 1.5), image_sizes=sizes)
    rest = TrainSampler(27, 4, size=SIZE, multi_scale=(0.5, 1.5), image_sizes=sizes)
    whole.set_epoch(6)
    rest.set_epoch(6, start=start)
    assert list(rest) == list(whole)[start:]
    assert len(rest) == len(whole) == 7


@pytest.mark.parametrize("rect", [False, True])
def test_neighbours_depend_on_the_place_alone(rect):
    """Not on batch size, ranks, or where an epoch is entered; a batch of NEIGHBOURS needs no picture beside its own."""
    sizes = np.random.default_rng(0).integers(50, 90, (45, 2)) if rect else None
    one = TrainSampler(45, NEIGHBOURS, size=SIZE, seed=3, image_sizes=sizes)
    reference = {draw.position: draw for draw in draws(one)}
    for batch in one:
        if len(batch) == NEIGHBOURS:
            assert {draw.index for draw in batch} == set(batch[0].neighbours)
    for draw in reference.values():
        assert draw.index in draw.neighbours and len(set(draw.neighbours)) == NEIGHBOURS
    for batch_size in (3, 5, 15):  # divisors of 45: no place is shown twice
        for rank in range(3):
            other = TrainSampler(45, batch_size, size=SIZE, seed=3, image_sizes=sizes, rank=rank, world=3)
            assert all(draw.neighbours == reference[draw.position].neighbours for draw in draws(other))
    assert all(len(draw.neighbours) == 5 for draw in draws(TrainSampler(5, 16, size=SIZE)))


def test_multi_scale_sizes():
    sampler = TrainSampler(3000, 1, size=(320, 416), multi_scale=(0.67, 1.5), stride=32)
    heights, widths = zip(*{draw.size for draw in draws(sampler)})
    assert all(side % 32 == 0 for side in heights + widths)
    assert (min(heights), max(heights)) == (224, 480) and (min(widths), max(widths)) == (288, 608)
    assert {draw.size for draw in draws(TrainSampler(9, 2, size=(300, 410)))} == {(300, 410)}


def test_weights_give_each_picture_its_share():
    weights = np.array([1, 1, 1, 1, 6.0])
    counts = collections.Counter()
    for epoch in range(200):
        sampler = TrainSampler(5, 2, size=SIZE, weights=weights)
        sampler.set_epoch(epoch)
        once = collections.Counter(draw.index for draw in draws(sampler))
        assert sum(once.values()) == 5 and once[4] == 3 and max(once[index] for index in range(4)) == 1
        counts += once
    np.testing.assert_allclose([counts[index] / 200 for index in range(5)], weights / 2, atol=0.15)


def test_balance_weights_favour_rare_classes(records):
    weights = balance_weights(records, num_classes=3)
    frequency = np.zeros(3)
    for record in records:
        for label in set(record.labels[~record.ignore].tolist()):
            frequency[label] += 1
    rare = int(frequency[:2].argmin())
    for record, weight in zip(records, weights):
        labels = record.labels[~record.ignore]
        expected = np.sqrt(frequency.max() / frequency[labels].min()) if len(labels) else 1.0
        assert weight == pytest.approx(expected)
    assert frequency[rare] < frequency.max() and weights.max() > 1


def test_rectangular_training_shuffles_and_trims():
    sizes = np.array([(100, 200)] * 16 + [(200, 100)] * 16)
    sampler = TrainSampler(32, 4, size=(128, 128), image_sizes=sizes, stride=32)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert {batch[0].size for batch in batches} == {(64, 128), (128, 64)}
        for batch in batches:
            assert all((draw.index < 16) == (draw.size == (64, 128)) for draw in batch)
        orders.append(tuple(draw.index for batch in batches for draw in batch))
        assert [batch[0].size for batch in batches] != sorted(batch[0].size for batch in batches)
    assert len(set(orders)) == 4


# ---------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_shows_every_picture_once(rect, world):
    sizes = np.random.default_rng(1).integers(50, 2000, (37, 2))
    ranks = [EvalSampler(sizes, 8, (416, 416), rect=rect, rank=rank, world=world) for rank in range(world)]
    assert sorted(draw.index for sampler in ranks for draw in draws(sampler)) == list(range(37))
    assert draws(ranks[0]) == draws(ranks[0])
    assert [len(sampler) for sampler in ranks] == [len(list(sampler)) for sampler in ranks]


def test_rectangular_batches_fit_their_pictures():
    sizes = np.random.default_rng(2).integers(50, 2000, (64, 2))
    for batch in EvalSampler(sizes, 8, (320, 416), stride=32):
        ((height, width),) = {draw.size for draw in batch}
        fitted = np.array(
            [sizes[draw.index] * min(320 / sizes[draw.index][0], 416 / sizes[draw.index][1]) for draw in batch]
        )
        assert height % 32 == 0 and width % 32 == 0 and height <= 320 and width <= 416
        needed_height, needed_width = fitted.max(axis=0)
        assert 0 <= height - needed_height + 1e-3 < 32 + 1e-2 and 0 <= width - needed_width + 1e-3 < 32 + 1e-2
    ((only,),) = [[draw.size for draw in batch] for batch in EvalSampler([(480, 640)], 8, (416, 416))]
    assert only == (320, 416)
    assert EvalSampler([(480, 640)], 8, (416, 416), rect=False).batches[0][0].size == (416, 416)


# ---------------------------------------------------------------------------------------------- batches


def test_collate(records):
    dataset = DetectionDataset(records)
    samples = [dataset[Draw(0, row, index, SIZE)] for row, index in enumerate((8, 0, 3, 2))]
    batch = collate(samples)
    assert batch.images.shape == (4, 3, *SIZE) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for row, sample in enumerate(samples):
        np.testing.assert_array_equal(batch.images[row].permute(1, 2, 0), sample.image)
        mine = batch.targets.image == row
        np.testing.assert_array_equal(batch.targets.boxes[mine], sample.boxes[~sample.ignore])
        np.testing.assert_array_equal(batch.targets.labels[mine], sample.labels[~sample.ignore])
        regions = batch.targets.ignore_image == row
        np.testing.assert_array_equal(batch.targets.ignore_boxes[regions], sample.boxes[sample.ignore])
    assert batch.targets.image.tolist() == [0, 0, 3, 3]  # pictures 8 and 2 have two objects, 0 and 3 none
    assert batch.targets.ignore_image.tolist() == [0, 1]  # pictures 8 and 0
    assert batch.targets.image.dtype == batch.targets.labels.dtype == torch.int64
    assert batch.targets.boxes.dtype == torch.float32
    assert [info.id for info in batch.infos] == [8, 0, 3, 2]


def everything(records, workers, epochs=(0, 1)):
    dataset = DetectionDataset(records, augment=AUGMENT, seed=9)
    sampler = TrainSampler(len(records), 4, size=SIZE, seed=9, multi_scale=(0.5, 1.5))
    loader = build_loader(dataset, sampler, workers=workers)
    seen = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        assert len(loader) == 3
        seen += list(loader)
    return seen


def test_workers_change_nothing(records):
    reference = everything(records, 0)
    assert len(reference) == 6 and not torch.equal(reference[0].images, reference[3].images)
    for workers in (1, 2):
        for one, other in zip(reference, everything(records, workers), strict=True):
            assert torch.equal(one.images, other.images) and one.infos == other.infos
            assert other.images.is_contiguous(memory_format=torch.channels_last)
            assert one.targets.masks is None and other.targets.masks is None
            names = vars(one.targets).keys() - {"masks"}
            pairs = [(getattr(one.targets, name), getattr(other.targets, name)) for name in names]
            assert all(torch.equal(torch.as_tensor(mine), torch.as_tensor(its)) for mine, its in pairs)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc to ask about memory")
def test_memory_stays_flat_over_many_epochs(records):
    """In the program and in a process that loads: resident memory and open files after 60 epochs and after 260."""
    dataset = DetectionDataset(records, augment=AUGMENT)
    sampler = TrainSampler(len(records), 4, size=(32, 32), multi_scale=(1.0, 2.0))
    loader = build_loader(dataset, sampler, workers=1)
    seen = []
    for epoch in range(260):
        sampler.set_epoch(epoch)
        assert sum(len(batch) for batch in loader) == len(records)
        if epoch in (59, 259):
            folders = [Path(f"/proc/{pid}") for pid in ("self", loader.pids[0])]
            pages = [int((folder / "statm").read_text().split()[1]) for folder in folders]
            seen.append(
                (np.array(pages) * resource.getpagesize(), [len(list(folder.glob("fd/*"))) for folder in folders])
            )
    (before, files_before), (after, files_after) = seen
    assert (after - before < 4e6).all(), after - before  # a batch per epoch would be three times that
    assert max(np.subtract(files_after, files_before)) <= 20  # the last batch's may not be closed yet


def test_the_loader_leaves_the_global_generator_alone(records):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    everything(records, 0, epochs=(0,))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_surfaces_as_itself(tmp_path, workers):
    records = paint_records(tmp_path, 4)
    (tmp_path / "002.png").write_bytes(b"")
    loader = build_loader(DetectionDataset(records), EvalSampler([(48, 64)] * 4, 2, SIZE), workers=workers)
    batches, said = iter(loader), ""
    assert len(next(batches)) == 2
    try:  # not pytest.raises: its record and the loader would be one cycle, and torch ends workers of one slowly
        next(batches)
    except UserError as error:
        said = str(error)
    assert "002.png: " in said and "Traceback" not in said


def test_user_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(ResourceError("here", "found", "cure")))
    assert type(error) is ResourceError and error.exit_code == 5
    assert (error.where, error.message, error.hint, str(error)) == ("here", "found", "cure", "here: found (cure)")

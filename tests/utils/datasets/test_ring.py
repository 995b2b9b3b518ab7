"""Memory of batches on their way: used again when it is free, never before."""

import gc

import numpy as np
import pytest
import torch
from painted import paint_records

from utils.datasets import ring as module
from utils.datasets import workers
from utils.datasets.dataset import DetectionDataset
from utils.datasets.loader import Draw, EvalSampler, TrainSampler, build_loader, make_batch
from utils.datasets.ring import Ring
from utils.errors import UserError

SIZE = (32, 64)
forks = pytest.mark.skipif(not hasattr(workers.os, "fork"), reason="processes share no memory here")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return paint_records(tmp_path_factory.mktemp("pictures"), 12)


def in_memory_of(ring, batch) -> bool:
    start = ring.memory.ctypes.data
    return start <= batch.images.data_ptr() < start + ring.memory.size


@forks
@pytest.mark.parametrize("held", [False, True])
def test_batches_arrive_as_they_were_made(records, held):
    """Whether the program looks at them one by one or keeps them all: more than there are slots."""
    dataset = DetectionDataset(records)
    sampler = EvalSampler(dataset.sizes, 1, SIZE, rect=False)
    expected = [make_batch(dataset, draws) for draws in sampler]
    loader, arrived, by_ring = build_loader(dataset, sampler, workers=1), [], []
    for batch in loader:
        by_ring.append(in_memory_of(loader.ring, batch))
        arrived.append(batch if held else batch.images.clone())
    assert by_ring[0] and all(by_ring) != held
    for batch, other in zip(arrived, expected, strict=True):
        assert torch.equal(batch.images if held else batch, other.images)
    if held:
        assert all(torch.equal(batch.targets.boxes, other.targets.boxes) for batch, other in zip(arrived, expected))
        assert [batch.infos for batch in arrived] == [other.infos for other in expected]
    ring = loader.ring
    del arrived, batch
    gc.collect()
    assert not ring.taken.any()


@forks
def test_a_view_holds_its_slot(records):
    dataset = DetectionDataset(records)
    loader = build_loader(dataset, EvalSampler(dataset.sizes, 4, SIZE, rect=False), workers=1)
    rows = [batch.images[2, 0] for batch in loader]
    expected = [make_batch(dataset, draws).images[2, 0] for draws in loader.batch_sampler]
    assert loader.ring.taken.sum() == 3 and all(torch.equal(row, other) for row, other in zip(rows, expected))


def test_nothing_stays_taken_where_no_batch_came_of_it(records, monkeypatch):
    ring = Ring(2, 3, 1000)

    def fails(allocate):
        assert ring.taken[3] == 0
        allocate((10, 10), np.uint8)
        assert ring.taken.tolist() == [0, 0, 0, 1, 0, 0]
        raise UserError("a.png", "damaged")

    with pytest.raises(UserError):
        ring.make(1, fails)
    assert ring.make(0, lambda allocate: allocate((5,), np.uint8) is None) is False
    assert not ring.taken.any()
    too_large = ring.make(0, lambda allocate: allocate((1001,), np.uint8))
    assert too_large.shape == (1001,) and not ring.taken.any()


def test_a_forked_process_frees_nothing(monkeypatch):
    ring = Ring(1, 1, 64)
    ring.taken[0] = 1
    pictures = ring.receive(0, (8, 8))
    monkeypatch.setattr(module.os, "getpid", lambda: -1)
    del pictures
    assert ring.taken[0] == 1


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 1.5)])
@pytest.mark.parametrize("rect", [False, True])
def test_no_batch_is_larger_than_announced(scale, rect):
    sizes = np.random.default_rng(0).integers(20, 900, (60, 2)) if rect else None
    for size in ((32, 96), (100, 75)):
        sampler = TrainSampler(60, 4, size=size, multi_scale=scale, image_sizes=sizes)
        seen = max(len(draws) * draws[0].size[0] * draws[0].size[1] for draws in sampler)
        assert seen <= sampler.largest_batch
    assert EvalSampler([(10, 20)] * 5, 4, (64, 64)).largest_batch == 4 * 32 * 64
    assert EvalSampler([], 4, (64, 64)).largest_batch == 0


def test_pictures_that_cannot_be_read_leave_no_gap(tmp_path):
    records = paint_records(tmp_path, 12)
    dataset = DetectionDataset(records)
    whole = make_batch(dataset, [Draw(0, row, row, SIZE) for row in (0, 2)])
    (tmp_path / "001.png").write_bytes(b"")
    dataset.quarantine.max_bad = 0.5
    rest = make_batch(dataset, [Draw(0, row, row, SIZE) for row in range(3)])
    assert torch.equal(rest.images, whole.images) and [info.id for info in rest.infos] == [0, 2]
    assert make_batch(dataset, [Draw(0, 0, 1, SIZE)]) is None

"""Outlines, run lengths and masks against pycocotools, pixel by pixel, and against themselves."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from utils.mask_frames import Patch, paste, reframe
from utils.outlines import fill, fill_boxes, patches
from utils.run_lengths import decode, encode, ring_of
from utils.structures import Detections, ImageInfo, Letterbox, Outlines, Targets

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools and numpy 2


def coco_pixels(rings, height: int, width: int) -> np.ndarray:
    """What the COCO API makes of polygons."""
    lists = [np.asarray(ring, np.float64).ravel().tolist() for ring in rings]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(lists, height, width))).astype(bool)


def random_objects(rng, height: int, width: int) -> list:
    """Objects of several rings that cross themselves, each other and the border; decimals as files have them."""
    objects = []
    for _ in range(3):
        corners = [
            rng.uniform(-0.3, 1.3, (rng.integers(3, 12), 2)) * (width, height) for _ in range(rng.integers(1, 4))
        ]
        rings = [np.round(ring, rng.integers(0, 3)) for ring in corners]
        objects.append([np.clip(ring, 0, (width, height)) if rng.random() < 0.5 else ring for ring in rings])
    return objects


def on_picture(patch: Patch, height: int, width: int) -> np.ndarray:
    plane = np.zeros((height, width), bool)
    rows, columns = patch.pixels.shape
    plane[patch.top : patch.top + rows, patch.left : patch.left + columns] = patch.pixels
    return plane


@pytest.mark.parametrize("seed", range(4))
def test_outlines_fill_the_pixels_that_coco_fills(seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        height, width = map(int, rng.integers(5, 90, 2))
        objects = random_objects(rng, height, width)
        outlines = Outlines.of(objects)
        filled, parts = fill(outlines, (height, width)), patches(outlines, (height, width))
        for rings, pixels, patch in zip(objects, filled, parts, strict=True):
            expected = coco_pixels(rings, height, width)
            np.testing.assert_array_equal(pixels, expected)
            np.testing.assert_array_equal(on_picture(patch, height, width), expected)
            assert patch.area == expected.sum()


def test_outlines_are_cut_and_joined_like_lists():
    rng = np.random.default_rng(0)
    objects = [*random_objects(rng, 40, 50), [], *random_objects(rng, 40, 50)]
    whole = Outlines.of(objects)
    kept = np.array([True, False, True, True, False, True, False])
    for outlines, expected in (
        (whole[kept], [rings for rings, keep in zip(objects, kept) if keep]),
        (whole.between(2, 5), objects[2:5]),
        (whole.between(3, 4), [[]]),
        (
            Outlines.cat([whole.between(5, 7), whole.between(0, 0), whole[~kept]]),
            [*objects[5:], objects[1], objects[4], objects[6]],
        ),
        (Outlines.cat([]), []),
    ):  # fmt: skip
        same = Outlines.of(expected)
        assert len(outlines) == len(expected)
        for name in ("corners", "starts", "owner"):
            np.testing.assert_array_equal(getattr(outlines, name), getattr(same, name), err_msg=name)
    assert not fill(whole, (40, 50))[3].any()  # an object without a ring covers nothing


def random_masks(rng, num: int):
    for _ in range(num):
        height, width = map(int, rng.integers(1, 60, 2))
        yield rng.random((height, width)) < rng.random()
    solid = np.zeros((2500, 3000), bool)  # counts of five letters
    solid[100:200, 2000:2500], solid[130:150, 2100:2200] = True, False
    yield from (solid, np.zeros((7, 9), bool), np.ones((7, 9), bool))


def test_run_lengths_are_those_of_coco():
    for mask in random_masks(np.random.default_rng(1), 200):
        expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        written = encode(Patch(0, 0, mask), mask.shape)
        assert written == {"size": list(mask.shape), "counts": expected["counts"].decode()}
        np.testing.assert_array_equal(decode(written["counts"], mask.shape), mask)
        runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=False)), prepend=0, append=mask.size).tolist()
        np.testing.assert_array_equal(decode(runs, mask.shape), mask)


def test_a_patch_is_written_where_it_lies():
    pixels = np.array([[True, False], [True, True], [False, True]])
    plane = np.zeros((9, 8), bool)
    plane[4:7, 5:7] = pixels
    assert encode(Patch(4, 5, pixels), (9, 8)) == encode(Patch(0, 0, plane), (9, 8))


def test_run_lengths_are_outlines_to_the_pixel():
    """Holes, islands, noise: the ring around all columns' runs fills exactly them."""
    for mask in random_masks(np.random.default_rng(2), 100):
        if mask.any() and mask.size < 1e6:
            np.testing.assert_array_equal(fill(Outlines.of([[ring_of(mask)]]), mask.shape)[0], mask)


@pytest.mark.parametrize(
    "counts", ["", "0", "~~~", "PPPP", "oooooooooo0", "\x01", [3, 3], [-1, 10], [4.0, 5.0], [[9]], [True, True]]
)
def test_bad_run_lengths_are_refused(counts):
    with pytest.raises((ValueError, OverflowError)):
        decode(counts, (3, 3))


def test_a_mask_of_its_box():
    """A triangle fills half its box, whatever the box's place, size and aspect; the two halves share no cell."""
    boxes = np.array([[3.5, 7.25, 90, 30], [200, 100, 203, 180], [0, 0, 1, 1]], np.float32)
    lower = Outlines.of([[np.array([[x1, y1], [x2, y2], [x1, y2]])] for x1, y1, x2, y2 in boxes])
    upper = Outlines.of([[np.array([[x1, y1], [x2, y1], [x2, y2]])] for x1, y1, x2, y2 in boxes])
    first, second = fill_boxes(lower, boxes), fill_boxes(upper, boxes)
    assert first.dtype == np.uint8 and first.shape == (3, 56, 56)
    assert (first + second == 1).all()
    np.testing.assert_allclose(first.mean((1, 2)), 0.5, atol=0.02)
    assert (first[:, -4:, :40] == 1).all() and (second[:, :4, -40:] == 1).all()


def test_a_clipped_box_shows_its_part():
    """The outline may reach beyond the box that was cut at a border."""
    outline = Outlines.of([[np.array([[-50, 0], [50, 0], [50, 20], [-50, 20]])]])
    assert fill_boxes(outline, np.array([[0, 0, 50, 20]], np.float32)).all()
    assert fill_boxes(outline, np.array([[0, 10, 100, 30]], np.float32))[0, :28, :28].all()
    assert fill_boxes(outline, np.array([[0, 10, 100, 30]], np.float32)).mean() == 0.25


def test_a_box_of_no_width_costs_no_walk_of_billions():
    outline = Outlines.of([[np.array([[0, 0], [600, 0], [600, 400]])]])
    for box in ([1e-30, 5, 2e-30, 6], [3, 3, 3, 3], [0, 0, 600, 400]):
        assert fill_boxes(outline, np.array([box], np.float32)).shape == (1, 56, 56)


def grid_sample_paste(masks, boxes, size):
    """Detectron2's definition, with torch's own bilinear reader: bool [n, H, W]."""
    y, x = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    x, y = (x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], dim=3)
    return torch.nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def test_paste_is_bilinear_reading():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(20, 28, 28, generator=generator)
    corner = torch.rand(20, 2, generator=generator) * 70 - 10
    boxes = torch.cat([corner, corner + 1 + torch.rand(20, 2, generator=generator) * 60], dim=1)
    expected = grid_sample_paste(masks, boxes, (60, 80))
    sure = ((expected - 0.5).abs() > 1e-4).numpy()
    assert sure.mean() > 0.999
    for patch, values, certain in zip(paste(masks, boxes, (60, 80)), expected, sure):
        assert (on_picture(patch, 60, 80) == (values >= 0.5).numpy())[certain].all()


def test_paste_of_odd_boxes_is_empty():
    boxes = torch.tensor(
        [[5, 5, 5, 9], [float("nan")] * 4, [90, 90, 95, 95], [-9, -9, -3, -3], [9, 9, 2, 2], [0, 0, float("inf"), 4]]
    )
    for patch in paste(torch.ones(6, 28, 28), boxes, (20, 30)):
        assert patch.area == 0 or patch.pixels.shape[1] <= 30


def test_reframe_to_the_same_box_changes_nothing_and_to_a_half_shows_the_half():
    masks = torch.rand(5, 28, 28, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[10.0, 20.0, 50.0, 90.0]]).repeat(5, 1)
    torch.testing.assert_close(reframe(masks, boxes, boxes), masks, rtol=0, atol=2e-5)
    ramp = ((torch.arange(28.0) + 0.5) / 28).expand(1, 28, 28)
    half = reframe(ramp, boxes[:1], torch.tensor([[30.0, 20.0, 50.0, 90.0]]))
    torch.testing.assert_close(half[0, :, :27], (0.5 + ramp[0] / 2)[:, :27], rtol=0, atol=1e-5)


def test_detections_keep_their_pixels_on_the_way_to_the_original():
    """The box is cut at the picture's border; what its mask covers inside stays where it was."""
    ramp = torch.linspace(-1, 1, 28)
    disc = (ramp[:, None] ** 2 + ramp**2 < 0.8).float()[None]
    boxes = torch.tensor([[-20.0, 30.0, 100.0, 110.0]])
    found = Detections(boxes=boxes, scores=torch.ones(1), labels=torch.zeros(1, dtype=torch.int64), masks=disc)
    info = ImageInfo(id=0, path="", size=(50, 45), letterbox=Letterbox(scale=(2.0, 2.0), pad=(0.0, 10.0)))
    moved = found.to_original(info)
    assert moved.boxes.tolist() == [[0.0, 10.0, 45.0, 50.0]] and moved.masks.shape == (1, 28, 28)
    before = on_picture(paste(disc, info.letterbox.undo(boxes), (50, 45))[0], 50, 45)
    after = on_picture(paste(moved.masks, moved.boxes, (50, 45))[0], 50, 45)
    assert (before != after).sum() <= 0.03 * before.sum()
    assert (before & after).any()


def test_nouns_carry_masks():
    targets = Targets.of(
        image=torch.zeros(2, dtype=torch.int64), labels=torch.zeros(2, dtype=torch.int64), boxes=torch.zeros(2, 4),
        masks=torch.ones(2, 56, 56, dtype=torch.uint8),
    )  # fmt: skip
    assert targets.to(dtype=torch.float64).masks.dtype == torch.uint8 and targets.to("cpu").masks.shape == (2, 56, 56)
    found = Detections(boxes=torch.zeros(3, 4), scores=torch.arange(3.0), labels=torch.zeros(3, dtype=torch.int64))
    assert found[torch.tensor([1])].masks is None and found.cpu().masks is None
    masks = torch.arange(3.0)[:, None, None].expand(3, 28, 28)
    found = Detections(boxes=found.boxes, scores=found.scores, labels=found.labels, masks=masks)
    assert found[torch.tensor([2, 0])].masks[:, 0, 0].tolist() == [2, 0]

"""The same picture in every form that a program may hold it in is the same pixels, or one line that says what it is."""

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from utils.datasets.images import read_image
from utils.datasets.in_memory import as_image, is_several, place
from utils.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY = PIXELS[:, :, 0]
ALPHA = np.dstack([PIXELS, PIXELS[:, :, :1]])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "x.png"
    assert cv2.imwrite(str(path), PIXELS[:, :, ::-1])
    return path


def forms(file) -> dict:
    floats = torch.from_numpy(PIXELS).permute(2, 0, 1) / 255
    return {
        "path": file,
        "text": str(file),
        "bytes": file.read_bytes(),
        "array": PIXELS,
        "array with alpha": ALPHA,
        "array not contiguous": PIXELS[:, :, ::-1].copy()[:, :, ::-1],
        "read-only array": np.frombuffer(PIXELS.tobytes(), np.uint8).reshape(PIXELS.shape),
        "tensor": torch.from_numpy(PIXELS).permute(2, 0, 1),
        "float tensor": floats,
        "double tensor that learns": floats.double().requires_grad_(),
        "PIL": Image.fromarray(PIXELS),
        "PIL with alpha": Image.fromarray(ALPHA),
    }


def test_every_form_is_the_same_pixels(file):
    for name, picture in forms(file).items():
        for channels in (3, 1):
            found = as_image(picture, channels)
            assert found.dtype == np.uint8 and found.flags.c_contiguous, name
            np.testing.assert_allclose(found.astype(int), read_image(file, channels), atol=channels == 1, err_msg=name)
        assert not is_several(picture), name


def test_grey_pictures():
    expected = np.dstack([GREY] * 3)
    for picture in (GREY, GREY[:, :, None], torch.from_numpy(GREY.copy()), Image.fromarray(GREY)):
        np.testing.assert_array_equal(as_image(picture), expected)
        np.testing.assert_array_equal(as_image(picture, 1), expected[:, :, :1])
    deep = Image.fromarray(GREY.astype(np.uint16) << 8)
    np.testing.assert_array_equal(as_image(deep, 1)[:, :, 0], GREY)


def test_a_pil_image_is_turned_upright_as_its_file_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", exif=exif)
    expected = as_image(file.getvalue())
    assert expected.shape == (20, 12, 3)
    np.testing.assert_array_equal(as_image(Image.open(file)), expected)


def test_one_or_several(file):
    picture = torch.zeros(3, 4, 4)
    for several in ([], [file], (PIXELS,), iter([file]), PIXELS[None], picture[None], {file}):
        assert is_several(several)
    for one in (None, 3, PIXELS, picture, file, str(file), b""):
        assert not is_several(one)


WRONG = {
    "nothing": (None, r"^<image>: found NoneType \(expected a path, bytes, array, tensor or PIL image\)$"),
    "a file that is not there": ("none.jpg", r"^none\.jpg: No such file"),
    "no picture": (b"hello", r"^<image>: not a picture"),
    "float array": (PIXELS / 255, r"pixels of type float64, expected uint8"),
    "deep array": (PIXELS.astype(np.uint16), r"pixels of type uint16"),
    "array of a tensor's shape": (
        PIXELS.transpose(2, 0, 1),
        r"an array of shape \(3, 12, 20\) \(arrays are \[H, W, C\]",
    ),
    "tensor of an array's shape": (
        torch.from_numpy(PIXELS),
        r"a tensor of shape \(12, 20, 3\) \(tensors are \[C, H, W\]",
    ),
    "a batch of arrays": (PIXELS[None], r"an array of shape \(1, 12, 20, 3\)"),
    "float tensor of 255": (torch.full((3, 4, 4), 255.0), r"from 255 to 255, expected 0\.\.1 \(divide by 255"),
    "no number": (torch.full((3, 4, 4), torch.nan), r"from nan to nan, expected 0\.\.1"),
    "empty array": (PIXELS[:0], r"an array of shape \(0, 20, 3\)"),
    "empty tensor": (torch.zeros(3, 0, 4), r"an array of shape"),
    "bool tensor": (torch.zeros(3, 4, 4, dtype=torch.bool), r"pixels of type bool"),
    "undefined range": (Image.new("F", (4, 4)), r"PIL image of mode F, whose range is not defined"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_line(mistake):
    picture, pattern = WRONG[mistake]
    with pytest.raises(UserError, match=pattern) as caught:
        as_image(picture)
    assert "\n" not in str(caught.value)


def test_pictures_are_placed_where_the_letterbox_says():
    images = [np.full((10, 20, 3), 200, np.uint8), np.full((20, 20, 3), 50, np.uint8)]
    infos, batch = place(images, (32, 32), stretch=False, paths=["a", "b"])
    assert batch.shape == (2, 3, 32, 32) and batch.dtype == torch.uint8
    assert [(info.id, info.path, info.size) for info in infos] == [(0, "a", (10, 20)), (1, "b", (20, 20))]
    assert infos[0].letterbox.pad == (0, 8) and batch[0, 0, :8].unique().tolist() == [114]
    assert batch[0, 0, 8:24].unique().tolist() == [200] and batch[1].unique().tolist() == [50]

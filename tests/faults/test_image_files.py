"""Rows I1 to I16: picture files. What cannot be used is set aside before it costs memory or teaches anything wrong."""

import errno
import io
import json
import multiprocessing
import os
import random
import resource
import struct
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from harness import refused
from PIL import Image

import detect
from tests.utils.datasets.painted import paint_records
from tests.utils.datasets.sets import GOOD, H, W, tree_hash, write, yolo_set
from tests.utils.tiny import CFG, tiny_step, write_pictures
from utils.checkpoint import write_checkpoint
from utils.datasets import images
from utils.datasets.augment import Augment
from utils.datasets.dataset import DetectionDataset
from utils.datasets.images import ImageError, decode_image, probe, read_image
from utils.datasets.limits import Limits
from utils.datasets.loader import Draw, EvalSampler, TrainSampler, build_loader
from utils.datasets.records import read_dataset
from utils.datasets.sources import open_source
from utils.datasets.splits import read_splits
from utils.errors import QuarantineError


def encode(image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


Y, X = np.mgrid[0:H, 0:W]
RAMP = np.stack([X * 3, Y * 5, X + Y], axis=2).astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
JPEG, PNG = encode(NOISE, "JPEG", quality=90), encode(RAMP, "PNG")


def png_of(width: int, height: int, *, pixels: bytes = b"") -> bytes:
    """A PNG whose header claims a size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    """A picture of zeros that is small on the disk."""
    packer = zlib.compressobj(9)
    rows = [packer.compress(bytes((side + 1) * 100)) for _ in range(side // 100)]
    return png_of(side, side, pixels=b"".join(rows) + packer.flush())


UNUSABLE = {  # id -> (bytes, what is told)
    "I1-empty": (b"", "an empty file"),
    "I1-html": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "I1-svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "I1-garbage": (random.Random(0).randbytes(3000), "not a picture"),
    "I2-half": (JPEG[: len(JPEG) // 2], "cut off"),
    "I2-last-2-bytes": (JPEG[:-2], "cut off"),
    "I2-png": (PNG[:-20], "cut off"),
    "I7-float-tiff": (cv2.imencode(".tiff", np.ones((H, W), np.float32))[1].tobytes(), "float"),
    "I11-30000": (png_of(30000, 30000), "too large: 30000 x 30000"),
    "I11-2-to-31": (png_of(2**31 - 1, 2**31 - 1), "too large"),
    "I11-no-width": (png_of(0, 10), ""),
    "I13-heic": (b"\0\0\0\x18ftypheic" + bytes(200), "HEIC and AVIF are not supported: convert"),
    "I13-avif": (b"\0\0\0\x18ftypavif" + bytes(200), "HEIC and AVIF are not supported: convert"),
}


@pytest.mark.parametrize("data, says", [pytest.param(*values, id=row) for row, values in UNUSABLE.items()])
def test_a_picture_that_cannot_be_used_is_set_aside(tmp_path, seen, data, says):
    path = yolo_set(tmp_path, {"a": GOOD, "b": GOOD})
    picture = write(tmp_path / "images" / "train" / "a.jpg", data)
    read = read_dataset(path)
    assert [Path(record.path).name for record in read.records] == ["b.jpg"]
    (problem,) = read.problems
    assert problem.path == str(picture) and problem.action == "picture quarantined" and says in problem.found
    refused(lambda: read_image(picture), where=str(picture))
    seen(problem.found)


def test_i10_a_bomb_is_known_by_its_header(tmp_path, seen):
    data = bomb(16000)
    assert len(data) < 1_000_000
    picture = write(tmp_path / "bomb.png", data)
    seen(refused(lambda: probe(picture), says="too large: 16000 x 16000 pixels").replace(str(tmp_path), ""))
    refused(lambda: read_image(picture), says="--max-pixels")
    assert probe(picture, Limits(max_pixels=16000**2))[1] == (16000, 16000)


def _read_all(folder: Path, answers) -> None:
    """With 300 MB more than there are already; what does not fit ends the process."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 300_000_000, -1))
    for file in sorted(folder.iterdir()):
        for look in (probe, read_image):
            with pytest.raises(ImageError):
                look(file)
    answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its size from /proc")
def test_i10_i11_no_memory_is_taken(tmp_path):
    for row, (data, _) in UNUSABLE.items():
        write(tmp_path / row, data)
    write(tmp_path / "bomb", bomb(16000))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_read_all, args=(tmp_path, answers))
    child.start()
    child.join(30)
    assert child.exitcode == 0 and answers.get(timeout=5)


def test_i2_allow_truncated(tmp_path):
    """On request a cut JPEG is taken; its first rows are those of the whole one. A cut PNG never is."""
    path = yolo_set(tmp_path, {"a": GOOD, "b": GOOD})
    picture = write(tmp_path / "images" / "train" / "a.jpg", JPEG[: len(JPEG) // 2])
    write(tmp_path / "images" / "train" / "b.jpg", PNG[:-20])
    limits = Limits(allow_truncated=True)
    assert [Path(record.path).name for record in read_dataset(path, limits=limits).records] == ["a.jpg"]
    image = read_image(picture, limits=limits)
    assert image.shape == NOISE.shape and np.array_equal(image[:80], decode_image(JPEG)[:80])


def test_i3_flipped_bytes_are_a_picture_or_an_error(tmp_path, seen):
    rng, decoded = random.Random(0), 0
    for _ in range(30):
        data = bytearray(JPEG)
        for at in rng.choices(range(700, len(JPEG) - 2), k=64):
            data[at] = rng.randrange(256)
        try:
            decoded += decode_image(bytes(data)).shape == NOISE.shape
        except ImageError:
            pass
    seen(f"decoders say nothing: {decoded} of 30 damaged JPEGs are decoded to their size")


def test_i4_bytes_behind_the_end_stay(tmp_path):
    path = yolo_set(tmp_path, {"a": GOOD, "b": GOOD})
    write(tmp_path / "images" / "train" / "a.jpg", JPEG + b"garbage" * 100)
    write(tmp_path / "images" / "train" / "b.jpg", PNG + b"garbage" * 100)
    before = tree_hash(tmp_path)
    data = read_dataset(path)
    dataset = DetectionDataset(data.records)
    assert data.problems == [] and all(dataset[Draw(0, 0, index, (64, 64))] for index in range(2))
    assert np.array_equal(read_image(data.records[0].path), decode_image(JPEG))
    assert tree_hash(tmp_path) == before


@pytest.mark.parametrize(
    "format", [pytest.param(format, id=f"I5-{format}") for format in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
)
def test_the_bytes_say_what_a_file_is(tmp_path, format):
    path = yolo_set(tmp_path, {"a": GOOD})
    picture = write(tmp_path / "images" / "train" / "a.jpg", encode(RAMP, format))
    assert read_dataset(path).problems == [] and probe(picture) == (format, (H, W))
    assert np.abs(read_image(picture).astype(int) - RAMP).max() <= (40 if format in ("WEBP", "GIF") else 0)


@pytest.mark.parametrize("mode", [pytest.param(mode, id=f"I6-{mode}") for mode in ("L", "1", "P", "RGBA", "LA")])
def test_pixel_types_have_one_meaning(mode):
    image = Image.fromarray(RAMP).convert(mode)
    assert np.array_equal(decode_image(encode(image, "PNG")), np.asarray(image.convert("RGB")))


def test_i6_cmyk():
    image = decode_image(encode(Image.fromarray(RAMP).convert("CMYK"), "JPEG", quality=95))
    assert image.shape == (H, W, 3) and np.abs(image.astype(int) - RAMP).mean() < 5


@pytest.mark.parametrize("channels", [pytest.param(1, id="I7-grey-16-bit"), pytest.param(3, id="I7-rgb-16-bit")])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_lose_the_low_byte(suffix, channels):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (H, W, channels), dtype=np.uint16)
    decoded = decode_image(cv2.imencode(suffix, deep)[1].tobytes())
    assert np.array_equal(decoded, np.broadcast_to(deep[..., ::-1] >> 8, (H, W, 3)))


@pytest.mark.parametrize("turn", [pytest.param(turn, id=f"I8-{turn}") for turn in (1, 3, 6, 8, 0, 99)])
def test_boxes_are_those_of_the_upright_picture(tmp_path, seen, turn):
    """A bright box, stored turned: where training, evaluation and detection find it."""
    upright = np.zeros((H, W, 3), np.uint8)
    upright[6:18, 8:40] = 250
    stored = np.rot90(upright, {3: 2, 6: 1, 8: 3}.get(turn, 0))
    exif = Image.Exif()
    exif[0x0112] = turn
    row = f"0 {24 / W} {12 / H} {32 / W} {12 / H}\n"
    path = yolo_set(tmp_path, {"a": row})
    picture = write(tmp_path / "images" / "train" / "a.jpg", encode(stored, "PNG", exif=exif))
    data = read_dataset(path)
    (record,) = data.records
    assert record.size == (H, W)
    np.testing.assert_allclose(record.boxes, [[8, 6, 40, 18]], atol=1e-4)
    sample = DetectionDataset(data.records)[Draw(0, 0, 0, (H, W))]
    frame = next(iter(open_source(str(picture))))
    for image in (read_image(picture), sample.image, frame.image):
        assert np.array_equal(image, upright)
    counted = [problem.found for problem in data.problems if "EXIF" in problem.reason]
    assert len(counted) == (turn in (3, 6, 8))
    seen(f"EXIF {turn}: {'counted' if counted else 'as it is'}")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [pytest.param(b"Exif\0\0II*\0\xff\xff\xff\xff", id="I8-broken")])
def test_a_broken_exif_means_upright(exif):
    assert decode_image(encode(RAMP, "JPEG", exif=exif)).shape == (H, W, 3)


@pytest.mark.parametrize(
    "size", [pytest.param(size, id=f"I9-{size[1]}x{size[0]}") for size in ((1, 1), (9, 9), (1, 10000), (10000, 1))]
)
def test_extreme_shapes(tmp_path, size):
    path = yolo_set(tmp_path, {"a": "0 .5 .5 1 1\n"})
    write(tmp_path / "images" / "train" / "a.jpg", encode(np.full((*size, 3), 9, np.uint8), "PNG"))
    records = read_dataset(path).records
    strong = Augment(degrees=30, scale=0.9, translate=0.5, mosaic=0.5)
    for options in ({}, {"stretch": True}, {"augment": strong}):
        dataset = DetectionDataset(records, **options)
        for position in range(4):
            sample = dataset[Draw(0, position, 0, (64, 96))]
            assert sample.image.shape == (64, 96, 3) and np.isfinite(sample.boxes).all()


def animation(format: str) -> bytes:
    frames = [Image.fromarray(np.full((H, W, 3), shade, np.uint8)) for shade in (50, 100, 200)]
    return encode(frames[0], format, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("format", [pytest.param(name, id=f"I12-{name}") for name in ("GIF", "TIFF", "WEBP", "PNG")])
def test_the_first_picture_counts(tmp_path, seen, format):
    path = yolo_set(tmp_path, {"a": GOOD})
    picture = write(tmp_path / "images" / "train" / "a.jpg", animation(format))
    data = read_dataset(path)
    (problem,) = data.problems
    assert problem.action == "kept" and problem.found.startswith("1, such as ")
    assert np.abs(read_image(picture).astype(int) - 50).max() <= 2
    seen(problem.reason)


# --------------------------------------------------------------------------------------------- while a run is under way


class Unwilling(io.BytesIO):
    """A file whose first reads fail."""

    left = 0

    def read(self, *args):
        if Unwilling.left:
            Unwilling.left -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(*args)


@pytest.mark.parametrize(
    "failures, good", [pytest.param(3, True, id="I15-thrice"), pytest.param(4, False, id="I15-four")]
)
@pytest.mark.parametrize("look", [probe, read_image])
def test_a_read_error_that_may_pass_is_tried_again(tmp_path, monkeypatch, seen, look, failures, good):
    picture = write(tmp_path / "a.png", PNG)
    monkeypatch.setattr(images, "_open", lambda path, limits: Unwilling(PNG))
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    Unwilling.left = failures
    if good:
        look(picture)
    else:
        seen(refused(lambda: look(picture), where=str(picture), says="Input/output error").replace(str(tmp_path), ""))
    assert waits == [0.1, 0.4, 1.6]


def test_i15_what_does_not_pass_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    refused(lambda: read_image(tmp_path / "gone.png"), says="No such file")


EVERYTHING = Augment(degrees=10, scale=0.5, fliplr=0.5, mosaic=0.5, mixup=0.5)


def vanish(path: str) -> None:
    Path(path).unlink()


def change(path: str) -> None:
    Path(path).write_bytes(encode(NOISE, "PNG"))


def spoil(path: str) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:-30])


@pytest.mark.parametrize("harm", [pytest.param(harm, id=f"I14-{harm.__name__}") for harm in (vanish, change, spoil)])
def test_another_picture_takes_its_place(tmp_path, capsys, harm):
    """The same one in every process and at any time: a run that continues sees what it would have seen."""
    records = paint_records(tmp_path, 20)
    for index in (3, 7):
        harm(records[index].path)

    def batches(workers: int, start: int = 0) -> list:
        dataset = DetectionDataset(records, augment=EVERYTHING, seed=5, limits=Limits(max_bad=0.5))
        sampler = TrainSampler(20, 4, size=(64, 64), seed=5)
        sampler.set_epoch(1, start)
        loader = build_loader(dataset, sampler, workers=workers)
        made = list(loader)
        assert dataset.quarantine.bad.nonzero()[0].tolist() == [3, 7] or start
        return made

    whole = batches(0)
    for other in (batches(2), [*whole[:2], *batches(1, start=2)]):
        for one, two in zip(whole, other, strict=True):
            assert np.array_equal(one.images, two.images) and np.array_equal(one.targets.boxes, two.targets.boxes)
    shown = {info.id for batch in whole for info in batch.infos}
    assert not shown & {3, 7}
    assert capsys.readouterr().err.count("003.png: picture cannot be used any more") >= 1


def test_i14_an_evaluation_goes_without_it(tmp_path):
    records = paint_records(tmp_path, 6)
    vanish(records[0].path)
    vanish(records[5].path)
    dataset = DetectionDataset(records, limits=Limits(max_bad=0.5))
    dataset.quarantine.folder = tmp_path
    for workers in (0, 1):
        loader = build_loader(dataset, EvalSampler(dataset.sizes, 1, (64, 64)), workers=workers)
        assert sorted(info.id for batch in loader for info in batch.infos) == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["000.png", "005.png"]
    assert set(lines[0]) == {"path", "line", "reason", "found", "action"}


def test_i14_a_disk_that_is_gone_stops_the_run(tmp_path):
    records = paint_records(tmp_path, 8)
    for record in records:
        vanish(record.path)
    dataset = DetectionDataset(records, augment=EVERYTHING, limits=Limits(max_bad=0.5))
    with pytest.raises(QuarantineError, match="5 of 8 pictures became unreadable") as caught:
        for position in range(8):
            dataset[Draw(0, position, position, (64, 64))]
    assert caught.value.exit_code == 3


# ------------------------------------------------------------------------------------------------------- whole commands


def small_run(folder: Path, num: int, *flags: object) -> list:
    """Arguments of train.py for ``num`` pictures and a network of three layers."""
    data = write_pictures(folder / "data", num)
    cfg = write(folder / "tiny.cfg", CFG)
    return ["--data", data, "--cfg", cfg, "--project", folder / "runs", "--workers", 0, "--device", "cpu", *flags]


def test_i16_too_many_bad_pictures_stop_before_the_first_step(tmp_path, server, seen):
    flags = small_run(tmp_path, 10, "--epochs", 1)
    for number in range(3):
        spoil(str(tmp_path / "data" / "images" / "train" / f"{number}.png"))
    done = server.run("train.py", *flags)
    assert done.code == 3 and not (tmp_path / "runs").exists()
    assert "3 of 10 pictures are bad (30.00%, allowed 1.00%)" in done.error_line()
    seen(f"exit 3: {done.error_line()}".replace(str(tmp_path), ""))
    done = server.run("train.py", *flags, "--max-bad", 0.3)
    assert done.code == 0, done.err
    lines = (tmp_path / "runs" / "exp" / "quarantine.jsonl").read_text().splitlines()
    assert [Path(json.loads(line)["path"]).name for line in lines] == ["0.png", "1.png", "2.png"]


def test_i16_strict_allows_none(tmp_path):
    write_pictures(tmp_path, 200)
    spoil(str(tmp_path / "images" / "train" / "7.png"))
    assert len(read_splits(tmp_path).train) == 199
    with pytest.raises(QuarantineError, match="1 of 200 pictures are bad"):
        read_splits(tmp_path, limits=Limits(max_bad=0.0))


def test_i14_a_run_goes_on(tmp_path, server, seen):
    """A picture of either split vanishes while the run is under way."""
    flags = small_run(tmp_path, 24, "--epochs", 15, "--batch-size", 8, "--max-bad", 0.1)
    running = server.start("train.py", *flags)
    run = tmp_path / "runs" / "exp"
    end = time.monotonic() + 30
    while not (run / "results.csv").exists() and time.monotonic() < end:
        time.sleep(0.01)
    for split in ("train", "val"):
        vanish(str(tmp_path / "data" / "images" / split / "3.png"))
    done = running.wait(60)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(Path(line["path"]).parent.name for line in lines) == ["train", "val"]
    assert done.err.count("3.png: picture cannot be used any more: No such file or directory") == 2
    seen("exit 0, 2 lines in quarantine.jsonl")


def test_i1_detect_goes_on_and_tells(tmp_path, capsys, seen):
    flags = ["--weights", tiny_checkpoint(tmp_path), "--project", tmp_path / "found", "--device", "cpu"]
    folder = tmp_path / "pictures"
    for name, data in {"good.png": PNG, "html.jpg": b"<html>", "cut.jpg": JPEG[:-100]}.items():
        write(folder / name, data)

    def look(*more: object) -> str:
        detect.main(detect.parse_args([*map(str, flags), "--source", str(folder), *more]))
        return capsys.readouterr().out

    out = look()
    assert "1 frames" in out and out.count("warning: ") == 2
    seen(refused(lambda: look("--strict"), says="not everything could be read", exit_code=3).replace(str(tmp_path), ""))
    capsys.readouterr()
    assert "2 frames" in look("--allow-truncated")
    assert "1 frames" in look("--allow-truncated", "--max-pixels", str(H * W))  # the cut one is larger


def tiny_checkpoint(folder: Path) -> Path:
    """A network of two classes in a file."""
    model, path = tiny_step().model, folder / "tiny.safetensors"
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    meta = {"cfg": CFG, "names": ["square", "bar"], "recipe": {}, "args": {}, "epoch": 1, "step": 1}
    write_checkpoint(path, tensors, meta)
    return path

"""Where detections go: names that cannot leave the folder, whole files, numbers that read back."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils.datasets.images import read_image
from utils.datasets.sources import Frame
from utils.errors import ResourceError, UserError
from utils.results import (
    Predictions,
    ResultWriter,
    Stems,
    VideoFile,
    check_codec,
    safe_name,
    write_image,
    write_labels,
)
from utils.structures import Batch, Detections, ImageInfo, Letterbox, Record, Targets


def some(*boxes, labels=None) -> Detections:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return Detections(boxes=boxes, scores=torch.linspace(0.9, 0.5, len(boxes)), labels=labels)


def frame(path="a/x.jpg", size=(20, 40), **more) -> Frame:
    return Frame(image=np.full((*size, 3), 60, np.uint8), path=path, **more)


@pytest.mark.parametrize(
    "text", ["../x", "..", ".", "", "/etc/passwd", "a\\b", "a\nb", "x\0y", "C:\\x", "a" * 400, "..."]
)
def test_any_text_is_one_harmless_component(tmp_path, text):
    name = safe_name(text)
    assert 0 < len(name) <= 100 and not set(name) & set('/\\\n\0:*?"<>|') and not name.startswith(".")
    (tmp_path / name).mkdir()
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()


def test_ordinary_names_stay():
    for name in ("traffic light", "Straße", "猫", "a-b_c.d (2)"):
        assert safe_name(name) == name


def test_every_path_has_a_stem_of_its_own():
    stems = Stems()
    paths = ["a/x.jpg", "b/x.jpg", "x.png", "x_2.jpg", "c/x.jpg", "camera 0", "rtsp://***@host/yard"]
    assert [Stems()(path) for path in ("http://host/cam.cgi?x=1/2", "http://host:80", "a?b.png")] == [
        "cam",
        "host_80",
        "a_b",
    ]
    found = [stems(path) for path in paths]
    assert len(set(found)) == len(paths) and found[0] == "x" and found[-1] == "yard"
    assert [stems(path) for path in paths] == found


def test_label_files_read_back(tmp_path):
    write_labels(tmp_path, "x", some([0, 0, 10, 10], [4, 5, 40, 20], labels=[1, 0]), (20, 40), with_score=True)
    np.testing.assert_allclose(
        np.loadtxt(tmp_path / "labels" / "x.txt"),
        [[1, 0.125, 0.25, 0.25, 0.5, 0.9], [0, 0.55, 0.625, 0.9, 0.75, 0.5]],
        atol=1e-6,
    )
    write_labels(tmp_path, "y", some(), (20, 40), with_score=False)
    assert (tmp_path / "labels" / "y.txt").read_bytes() == b"", "looked at, nothing found"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
def test_pictures_read_back(tmp_path, suffix, channels):
    image = np.random.default_rng(0).integers(0, 256, (9, 13, channels), dtype=np.uint8)
    write_image(tmp_path / f"ü{suffix}", image)
    np.testing.assert_array_equal(read_image(tmp_path / f"ü{suffix}", channels), image)


def test_crops_at_the_border(tmp_path):
    writer = ResultWriter(folder=tmp_path, names=["cat", "../dog"], save_crop=True)
    writer.write(frame(), some([0, 0, 40, 20], [30.5, 10.2, 39.9, 19.9], labels=[0, 1]))
    writer.close()
    crops = {file.relative_to(tmp_path).as_posix(): read_image(file).shape[:2] for file in tmp_path.rglob("*.jpg")}
    assert crops == {"crops/cat/x_0.jpg": (20, 40), "crops/_dog/x_1.jpg": (10, 10)}


def test_json(tmp_path):
    writer = ResultWriter(folder=tmp_path, names=["cat", "dog"], save_json=True)
    writer.write(frame(), some([1, 2, 30, 19], labels=[1]))
    writer.write(frame("v.mp4", number=7, fps=25.0), some())
    writer.close()
    one, two = json.loads((tmp_path / "detections.json").read_text())
    found = {"label": 1, "name": "dog", "score": 0.9, "box": [1, 2, 30, 19]}
    assert one == {"path": "a/x.jpg", "frame": 0, "width": 40, "height": 20, "detections": [found]}
    assert two["frame"] == 7 and two["detections"] == []


@pytest.mark.parametrize("suffix, side", [(".jpg", 65501), (".jpeg", 65501), (".webp", 16384)])
def test_a_picture_too_long_for_its_format_becomes_a_png(tmp_path, suffix, side):
    writer = ResultWriter(folder=tmp_path, names=["cat"], save_crop=True)
    shown = frame(f"long{suffix}", size=(1, side))
    writer.write(shown, some([0, 0, side, 1]), shown.image)
    np.testing.assert_array_equal(read_image(tmp_path / "long.png"), shown.image)
    crop = "long_0.png" if side > 65500 else "long_0.jpg"
    assert read_image(tmp_path / "crops" / "cat" / crop).shape[:2] == (1, side)
    assert {file.name for file in tmp_path.iterdir()} == {"long.png", "crops"}


def test_a_picture_that_no_encoder_takes_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"x\.jpg: a picture of 65501 x 1 pixels cannot be written as \.jpg"):
        write_image(tmp_path / "x.jpg", np.zeros((1, 65501, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num", [0, 1, 3])
def test_json_is_written_as_it_comes(tmp_path, num):
    """An endless stream fills no memory: entries lie in the part file; at the end it is what json.dumps writes."""
    writer = ResultWriter(folder=tmp_path, names=["a\nb"], save_json=True)
    assert [file.suffix for file in tmp_path.iterdir()] == [".part"], "under way"
    for number in range(num):
        writer.write(frame(f"{number}.jpg"), some(*[[1, 2, 30, 19]] * number))
    writer.close()
    text = (tmp_path / "detections.json").read_text()
    entries = json.loads(text)
    assert [len(entry["detections"]) for entry in entries] == list(range(num))
    assert text == json.dumps(entries, indent=1) and len(list(tmp_path.iterdir())) == 1


def test_json_does_not_stay_in_memory(tmp_path):
    writer, many = ResultWriter(folder=tmp_path, names=["cat"], save_json=True), some(*[[1, 2, 30, 19]] * 300)
    for _ in range(20):
        writer.write(frame(), many)
    (part,) = tmp_path.iterdir()
    assert part.stat().st_size > 100_000
    writer.close()


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    writer, many = ResultWriter(folder=tmp_path, names=["cat"], save_json=True), some(*[[1, 2, 30, 19]] * 300)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ResourceError, match=r"detections\.json: cannot write: File too large"):
            for _ in range(20):
                writer.write(frame(), many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_two_videos_one_after_the_other(tmp_path):
    writer = ResultWriter(folder=tmp_path, names=["cat"])
    for path, num in (("a/v.avi", 3), ("b/v.avi", 2)):
        for number in range(num):
            shown = frame(path, size=(32, 48), number=number, fps=10.0)
            writer.write(shown, some(), shown.image)
    assert {file.name for file in tmp_path.iterdir()} == {"v.mp4", "v_2.part.mp4"}, "under way"
    writer.close()
    for name, num in (("v.mp4", 3), ("v_2.mp4", 2)):
        assert cv2.VideoCapture(str(tmp_path / name)).get(cv2.CAP_PROP_FRAME_COUNT) == num
    assert len(list(tmp_path.iterdir())) == 2


def test_frames_that_change_their_size(tmp_path):
    video = VideoFile(tmp_path / "v.mp4", 10.0, (48, 32), "mp4v")
    video.append(np.zeros((32, 48, 3), np.uint8))
    video.append(np.zeros((64, 64, 1), np.uint8))
    video.close()
    capture = cv2.VideoCapture(str(tmp_path / "v.mp4"))
    assert [capture.read()[1].shape for _ in range(2)] == [(32, 48, 3)] * 2


def test_codecs():
    check_codec("mp4v")
    with pytest.raises(UserError, match=r"--fourcc XXXX: this OpenCV cannot write"):
        check_codec("XXXX")


def test_predictions_of_an_evaluation(tmp_path):
    """In the order of the records, whatever the order of the batches; ids as the data set has them."""
    empty = np.zeros(0)
    record = {"size": (20, 40), "boxes": empty.reshape(0, 4), "labels": empty, "ignore": empty, "crowd": empty}
    records = [
        Record(path=f"{n}.jpg", image_id=image_id, area=empty, **record) for n, image_id in enumerate((77, None))
    ]
    predictions = Predictions(tmp_path, records, save_txt=True, save_conf=False)
    nothing = torch.zeros(0, dtype=torch.int64)
    for index in (1, 0):
        info = ImageInfo(id=index, path=records[index].path, size=(20, 40), letterbox=Letterbox())
        targets = Targets.of(nothing, nothing, torch.zeros(0, 4))
        batch = Batch(images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8), targets=targets, infos=(info,))
        predictions.observe(batch, [some([2, 4, 12, 9], labels=[index])])
    entries = json.loads(predictions.write_json([18, 44]).read_text())
    assert [(entry["image_id"], entry["category_id"]) for entry in entries] == [(77, 18), (1, 44)]
    assert all(entry["bbox"] == [2, 4, 10, 5] for entry in entries)
    assert {file.name for file in (tmp_path / "labels").iterdir()} == {"0.txt", "1.txt"}


def test_pictures_keep_their_numbers_where_one_before_could_not_be_read(tmp_path):
    empty = np.zeros(0)
    record = {"size": (20, 40), "boxes": empty.reshape(0, 4), "labels": empty, "ignore": empty, "crowd": empty}
    records = [Record(path=f"{n}.jpg", area=empty, **record) for n in range(3)]
    predictions = Predictions(tmp_path, records, save_txt=False, save_conf=False)
    nothing = torch.zeros(0, dtype=torch.int64)
    infos = tuple(ImageInfo(id=n, path=records[n].path, size=(20, 40)) for n in (0, 2))
    targets = Targets.of(nothing, nothing, torch.zeros(0, 4))
    batch = Batch(images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8), targets=targets, infos=infos)
    predictions.observe(batch, [some([2, 4, 12, 9])] * 2)
    assert [entry["image_id"] for entry in json.loads(predictions.write_json([1]).read_text())] == [0, 2]


def test_no_file_is_half_there(tmp_path, monkeypatch):
    """Encoding fails in the middle: neither the picture nor its part is left."""
    monkeypatch.setattr(cv2, "imencode", lambda *_: (True, None))
    with pytest.raises(AttributeError):
        write_image(tmp_path / "x.jpg", np.zeros((4, 4, 3), np.uint8))
    assert list(Path(tmp_path).iterdir()) == []

"""models.show: the numbers of a hand-made case, whose loss it is, the page, and what is refused."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from models import show
from models.anchors import grid_priors
from models.assignment_page import page
from models.assignment_pictures import level_order, panels, sheets
from models.cfg import read_cfg
from models.compare_assigners import Comparison, about, build_criteria, compare, loss_shares, only, size_of
from models.darknet import Darknet
from models.structures import Assignment, Priors
from tests.models.yolov3_case import make_targets
from utils.errors import UserError
from utils.structures import Batch, ImageInfo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Darknet(read_cfg(ROOT / "cfg/matchbox.cfg")).eval()


def make_batch(targets, num_images=2, size=96) -> Batch:
    images = torch.randint(0, 256, (num_images, 3, size, size), generator=torch.Generator().manual_seed(0))
    infos = tuple(ImageInfo(id=k, path=f"{k}.png", size=(size, size)) for k in range(num_images))
    return Batch(images=images.to(torch.uint8), targets=targets, infos=infos)


TARGETS = make_targets([(0, 0, 4, 4, 24, 24), (0, 1, 30, 30, 80, 80), (1, 2, 0, 0, 96, 96)], ignore=[(1, 0, 0, 40, 40)])

# ------------------------------------------------------------------------------------------------------- the numbers


def rows(*triples, weight=None, ignored=0) -> Assignment:
    image, prior, target = (torch.tensor(column) for column in zip(*triples))
    ignore = torch.zeros(2, 180, dtype=torch.bool)
    ignore.view(-1)[:ignored] = True
    return Assignment(image=image, prior=prior, target=target, weight=torch.ones(len(image)), ignore=ignore)


def by_hand() -> Comparison:
    """A coarse head of 6x6 slots before a fine one of 12x12."""
    grids = {16: (6, 6), 8: (12, 12)}
    cpu = torch.device("cpu")
    parts = [grid_priors(((s, s),), 0.5, grid, (96, 96), cpu, torch.float32) for s, grid in grids.items()]
    return Comparison(
        assignments={"a": rows((0, 0, 0), (0, 40, 0), (1, 7, 2)), "b": rows((0, 0, 0), (0, 41, 1), ignored=90)},
        targets=TARGETS,
        priors=Priors.cat(parts),
    )


def test_numbers_of_a_hand_made_case():
    comparison = by_hand()
    assert comparison.per_object("a").tolist() == [2, 0, 1] and comparison.per_object("b").tolist() == [1, 1, 0]
    assert comparison.per_level("a").tolist() == [2, 1] and level_order(comparison.priors).tolist() == [1, 0]
    assert size_of(TARGETS.boxes).tolist() == [0, 1, 2]
    assert comparison.per_size("a") == {"small": 2, "medium": 0, "large": 1}
    assert comparison.alone("a") == pytest.approx(1 / 3)
    assert comparison.ignored("a") == 0 and comparison.ignored("b") == 0.25
    assert comparison.agreement().tolist() == [[1, 0.25], [0.25, 1]]
    table = comparison.table().splitlines()
    assert len(table) == 3 and table[1].split() == ["a", "3", "1.0", "2.0", "0.0", "1.0", "33%", "0%"]


def test_no_object_gives_no_number_and_no_error():
    empty = make_targets([])
    none = torch.zeros(0, dtype=torch.int64)
    assignment = Assignment(
        image=none, prior=none, target=none, weight=torch.zeros(0), ignore=torch.zeros(2, 180, dtype=torch.bool)
    )
    comparison = Comparison(assignments={"a": assignment}, targets=empty, priors=by_hand().priors)
    assert np.isnan(comparison.alone("a")) and comparison.agreement().tolist() == [[1]]
    assert comparison.table().splitlines()[1].split() == ["a", "0", "-", "-", "-", "-", "-", "0%"]


def test_every_assigner_has_a_sentence_and_refusals_a_reason(model):
    criteria, refused = build_criteria(model)
    assert not refused and all(len(about(criterion)) > 20 for criterion in criteria.values())
    _, refused = build_criteria(Darknet(read_cfg(ROOT / "cfg/yolox-nano.cfg")))
    assert "needs anchors" in refused["rpn"] and "yolox-nano.cfg:" in refused["rpn"]


def test_loss_shares_sum_to_one_and_follow_the_rows(model):
    images = make_batch(TARGETS).images.float() / 255
    targets = only(TARGETS, 0)
    criteria, _ = build_criteria(model)
    for name, criterion in criteria.items():
        preds = model.predict(images[:1])
        counts = compare(preds, targets, {name: criterion}).per_object(name)
        for term, values in loss_shares(model, images[:1], targets, criterion).items():
            assert len(values) == 3 and (values >= 0).all()
            assert not values.any() or values.sum() == pytest.approx(1)
            assert (values[:2][counts == 0] == 0).all(), f"{name} {term}: a share without a row"
    shares = loss_shares(model, images[:1], targets, criteria["wh_iou"])
    assert shares["box"][-1] == 0, "boxes are taught by answering slots only"
    assert 0 < shares["obj"][-1] < 1, "that nothing is there, by the others"
    empty = loss_shares(model, images[:1], make_targets([]), criteria["wh_iou"])
    assert empty["obj"].tolist() == [1] and empty["box"].tolist() == [0]


def test_only_keeps_one_picture():
    second = only(TARGETS, 1)
    assert second.image.tolist() == [0] and second.labels.tolist() == [2] and second.ignore_image.tolist() == [0]
    assert len(only(TARGETS, 0).ignore_boxes) == 0


# -------------------------------------------------------------------------------------------------- pictures and page


class Balanced(HTMLParser):
    """Every tag that needs it is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_needs_nothing_else(model):
    batch = make_batch(TARGETS)
    criteria, _ = build_criteria(model)
    with torch.no_grad():
        comparison = compare(model.predict(batch.images.float() / 255), TARGETS, criteria)
    drawn = [panels(comparison, batch, number) for number in (0, 1)]
    shares = {"wh_iou": {"box": np.array([0.25, 0.75, 0.0])}}
    sentences = {name: "a <sentence>" for name in comparison.names}
    text = page(comparison, drawn, shares, title="<b>&", notes=["n"], about=sentences, refused={"x": "why <not>"})
    assert "://" not in text and "@import" not in text
    parser = Balanced()
    parser.feed(text)
    assert parser.open == [] and "script" not in parser.tags and "link" not in parser.tags
    assert len(parser.sources) == 2 * len(criteria)
    assert all(source.startswith("data:image/jpeg;base64,/9j/") for source in parser.sources)
    assert "&lt;b&gt;&amp;" in text and "a &lt;sentence&gt;" in text and "why &lt;not&gt;" in text
    for name in criteria:
        assert f"<b>{name}</b>" in text
    assert "width:75.00%" in text


def test_sheets_for_training_are_pictures_of_the_first(model):
    drawn = sheets(model, make_batch(TARGETS, num_images=3), max_pictures=2)
    assert len(drawn) == 2 and all(max(sheet.shape) <= 1400 and sheet.dtype == np.uint8 for sheet in drawn)


# ------------------------------------------------------------------------------------------------- the command itself


@pytest.fixture
def data(tmp_path) -> Path:
    """Two pictures of which one has objects, and a split without any."""
    import cv2

    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number in (0, 1):
            picture = np.random.default_rng(number).integers(0, 256, (80, 60, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / "images" / split / f"{number}.png"), picture)
            (tmp_path / "labels" / split / f"{number}.txt").write_text("")
    (tmp_path / "labels" / "val" / "1.txt").write_text("0 0.5 0.5 0.4 0.4\n1 0.2 0.3 0.2 0.1\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n")
    return tmp_path / "data.yaml"


def call(data, tmp_path, *more) -> Path:
    show.main(show.parse_args(["--data", str(data), "--project", str(tmp_path / "runs"), "--device", "cpu", *more]))
    return tmp_path / "runs" / "exp"


def test_command_writes_pictures_and_page(data, tmp_path, capsys):
    folder = call(data, tmp_path, "--img-size", "96")
    assert {file.name for file in folder.iterdir()} == {"picture1.png", "index.html"}
    text = (folder / "index.html").read_text()
    assert "2 objects" in text and "the network is new" in text and "://" not in text
    out = capsys.readouterr().out
    assert re.search(r"^rpn +\d+", out, re.M) and "index.html" in out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--task", "train"], "no picture of split train has an object"),
        (["--batch-size", "0"], "expected 1 or more"),
        (["--cfg", "nowhere.cfg"], "no such cfg"),
        (["--weights", "nowhere.weights"], "no such weights file"),
        (["--img-size", "97"], "no multiple of the network's stride"),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as error:
        call(data, tmp_path, *more)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists(), "nothing is written"


def test_missing_data_is_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        call(tmp_path / "nowhere.yaml", tmp_path)
    assert "nowhere.yaml" in str(error.value) and "\n" not in str(error.value)

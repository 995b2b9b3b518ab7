"""Evaluation: numbers equal to pycocotools on whatever is valid, and what is not valid is counted, not measured."""

import json
import time

import cv2
import numpy as np
import pytest
import torch
from detection_sets import assert_equal_to_pycocotools, make_detections, make_record, measure, random_set
from grid_network import CFG as GRID
from grid_network import NAMES, grid_boxes, grid_network, write_grid_network
from run_state import differences, state
from tiny import CFG, write_pictures

import detect
import test as program
from models.cfg import parse_cfg
from models.darknet import Darknet
from models.postprocess import postprocess
from models.predictor import Predictor
from models.structures import Predictions
from tests.models.two_stage_case import make_images, make_network
from utils.boxes import box_iou
from utils.checkpoint import with_prefix, write_checkpoint
from utils.datasets.records import read_dataset
from utils.errors import DivergenceError, QuarantineError, UserError
from utils.fitness import Best
from utils.logger import Logger
from utils.metrics import RANK_RULES
from utils.resume import write_summary
from utils.structures import Detections

ONE = [[10, 10, 50, 50]]
TWO = [[10, 10, 50, 50], [100, 100, 150, 150]]
NAN, INF = float("nan"), float("inf")


def cases(**values):
    """``E2_nothing=x`` -> a parameter with the id ``E2-nothing``."""
    return [pytest.param(value, id=name.replace("_", "-")) for name, value in values.items()]


def predictions(boxes, obj, cls, quality=None) -> Predictions:
    """Of slots with these boxes [B, P, 4] and logits [B, P], [B, P, C]."""
    return Predictions(boxes=boxes, deltas=torch.zeros_like(boxes), obj=obj, cls=cls, priors=None, quality=quality)


def join(*parts: Detections) -> Detections:
    return Detections(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in ("boxes", "scores", "labels")}
    )


# ------------------------------------------------------------------------------------------- equal to the official code


@pytest.mark.parametrize("block", [pytest.param(number, id=f"E1-sets-from-{50 * number}") for number in range(20)])
def test_equal_to_pycocotools_on_random_sets(block):
    """A thousand sets: ties of score and overlap, crowds, empty pictures, a single class, other areas than boxes."""
    for seed in range(50 * block, 50 * block + 50):
        assert_equal_to_pycocotools(*random_set(seed))


def test_e1_one_of_two_found(seen):
    result = assert_equal_to_pycocotools([make_detections(ONE, [0.9], [0])], [make_record(TWO, [0, 0])], 1)
    assert result.map50 == pytest.approx(51 / 101, abs=1e-12)
    seen(f"1 of 2 found: AP50 {result.map50:.4f}; 1,000 random sets equal pycocotools within 1e-9")


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"E1-laws-{seed}") for seed in range(20)])
def test_more_truth_never_lowers_and_more_error_never_raises(seed):
    found, records, num_classes = random_set(seed)
    before = np.nan_to_num(measure(found, records, num_classes).ap)
    far = [[5000, 5000, 5050, 5050]]
    label, score = seed % num_classes, np.random.default_rng(seed).uniform(0.05, 0.95)
    wrong = [join(found[0], make_detections(far, [score], [label])), *found[1:]]
    assert (np.nan_to_num(measure(wrong, records, num_classes).ap) <= before + 1e-12).all()

    new = make_record([*records[0].boxes, *far], [*records[0].labels, label], crowd=[*records[0].crowd, False],
                      area=[*records[0].area, 2500], image_id=records[0].image_id)  # fmt: skip
    missed = measure(found, [new, *records[1:]], num_classes).ap
    right = measure(wrong, [new, *records[1:]], num_classes).ap
    assert (np.nan_to_num(right) >= np.nan_to_num(missed) - 1e-12).all() and right[0, label] > missed[0, label]


# --------------------------------------------------------------------------------------------------- nothing to measure


@pytest.mark.parametrize("protocol", cases(E2_coco="coco", **{f"E2_{name}": name for name in RANK_RULES}))
def test_no_detections_are_worth_nothing(protocol):
    result = measure(
        [make_detections()] * 2, [make_record(TWO, [0, 1], image_id=number) for number in (1, 2)], 2, protocol
    )
    assert result.map == result.map50 == result.coco["AR100"] == 0 and (result.ap == 0).all()
    assert result.ranked is None or result.ranked.mean == 0


def test_e2_a_network_that_finds_nothing(tmp_path, seen):
    """Through the whole program."""
    save(changed(grid_network(), "bias", -20.0), tmp_path / "net.safetensors")
    result = evaluated(tmp_path, tmp_path / "net.safetensors", write_pictures(tmp_path / "data"))
    assert result.map == 0 and result.num_invalid == 0
    assert json.loads((tmp_path / "runs/exp/predictions.json").read_text()) == []
    seen(f"mAP {result.map}")


NO_TRUTH = {
    "E3_no_picture": ([], []),
    "E3_nothing_to_find": ([make_detections(ONE, [0.9], [1])], [make_record()]),
    "E3_ignored_only": ([make_detections(ONE, [0.9], [1])], [make_record(ONE, [1], crowd=[True])]),
    "E3_nothing_at_all": ([make_detections()], [make_record()]),
}


@pytest.mark.parametrize("data", cases(**NO_TRUTH))
def test_without_truth_there_is_no_number(data, seen):
    result = measure(*data, 2)
    assert all(np.isnan(value) for value in result.coco.values())
    row = next(line for line in result.table().splitlines() if line.startswith("all"))
    assert row.split()[-4:] == ["n/a"] * 4
    seen("n/a in the table, an empty cell in results.csv, null in JSON")


def test_e3_a_class_without_truth_is_left_out_of_the_mean():
    found, record = make_detections(ONE + ONE, [0.9, 0.8], [0, 1]), make_record(ONE, [0])
    result = measure([found], [record], 3)
    assert result.map == pytest.approx(1.0), "over classes with truth"
    lines = result.table(verbose=True).splitlines()
    assert "detections of classes without truth here: class 1 1" in lines
    assert [line.split()[-2:] for line in lines if line.startswith(("class 1", "class 2"))] == [["n/a", "n/a"]] * 2


def test_e3_files_hold_no_nan(tmp_path):
    scalars = measure([make_detections()], [make_record()], 1).scalars()
    with_numbers = measure([make_detections(ONE, [0.9], [0])], [make_record(ONE, [0])], 1).scalars()
    logger = Logger(tmp_path)
    for epoch, values in enumerate((scalars, with_numbers)):
        logger.epoch({"epoch": epoch}, values)
    logger.close()
    write_summary(tmp_path, scalars)

    def refuse(constant):
        raise AssertionError(constant)

    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["metrics/mAP50"] is None and rows[1]["metrics/mAP50"] == pytest.approx(1)
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)["metrics/mAP50-95"] is None
    header, first, _ = (tmp_path / "results.csv").read_text().splitlines()
    assert dict(zip(header.split(","), first.split(",")))["metrics/mAP50"] == ""


# --------------------------------------------------------------------------------------------------------- COCO's files


def coco_file(folder, annotations, images=None):
    """Two pictures and a JSON of ``annotations``; two categories, 3 and 90."""
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(folder / name), np.zeros((200, 240, 3), np.uint8))
    images = [
        {"id": number, "file_name": name, "height": 200, "width": 240} for number, name in ((0, "a.png"), (7, "b.png"))
    ]
    categories = [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}]
    path = folder / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def annotation(key, image=0, box=(10, 10, 40, 40), category=3, **more):
    area = {"area": box[2] * box[3], "iscrowd": 0}
    return {"id": key, "image_id": image, "category_id": category, "bbox": list(box), **area, **more}


def perfect(path):
    """The evaluation of detections that equal the truths of a data set."""
    data = read_dataset(path)
    found = [make_detections(record.boxes, [0.9] * len(record.labels), record.labels) for record in data.records]
    return measure(found, data.records, len(data.names)), data


IDS = {"E4_from_0": (0, 1, 2), "E4_from_1": (1, 2, 3), "E4_only_0": (0, 5, 9), "E4_negative": (-1, 0, 1)}


@pytest.mark.parametrize("ids", cases(**IDS))
def test_annotation_ids_decide_nothing(tmp_path, ids, seen):
    one, two, three = ids
    rows = [annotation(one), annotation(two, box=(80, 80, 50, 50)), annotation(three, image=7, category=90)]
    result, _ = perfect(coco_file(tmp_path, rows))
    assert result.map == pytest.approx(1.0)
    seen(f"AP {result.map:.1f} for a perfect result")


def test_e4_no_ids_at_all(tmp_path):
    row = annotation(0)
    del row["id"]
    assert perfect(coco_file(tmp_path, [row]))[0].map == pytest.approx(1.0)


def test_e5_double_ids_are_set_aside_and_stop_the_run(tmp_path, seen):
    rows = [annotation(1), annotation(1, box=(80, 80, 50, 50)), annotation(2, image=7)]
    path = coco_file(tmp_path, rows)
    result, data = perfect(path)
    (problem,) = data.problems
    assert (problem.reason, problem.action) == ("annotation id given twice", "row dropped")
    assert result.map == pytest.approx(1.0)
    with pytest.raises(
        QuarantineError, match=r"1 of 3 rows are bad.*annotation id given twice: annotation 1 of image 0"
    ) as error:
        evaluated(tmp_path, write_grid_network(tmp_path / "n.safetensors", names=["cat", "dog"]), path)
    assert error.value.exit_code == 3 and not (tmp_path / "runs").exists()
    seen(f"exit 3: {error.value.message}".replace(str(tmp_path), ""))


def test_e5_double_picture_ids(tmp_path):
    path = coco_file(tmp_path, [annotation(1)])
    text = json.loads(path.read_text())
    text["images"][1]["id"] = 0
    path.write_text(json.dumps(text))
    data = read_dataset(path)
    assert [problem.reason for problem in data.problems] == ["image id given twice"] and len(data.records) == 1


BAD_ROWS = {
    "E7_negative_width": (annotation(2, box=(50, 50, -20, 20)), "box without width or height"),
    "E7_negative_height": (annotation(2, box=(50, 50, 20, -20)), "box without width or height"),
    "E7_unknown_image": (annotation(2, image=99), "annotation of an unknown image"),
}


@pytest.mark.parametrize(
    "row, reason", [pytest.param(*value, id=name.replace("_", "-")) for name, value in BAD_ROWS.items()]
)
def test_a_row_that_cannot_be_right_is_set_aside(tmp_path, row, reason, seen):
    path = coco_file(tmp_path, [annotation(1), row])
    result, data = perfect(path)
    assert [problem.reason for problem in data.problems] == [reason] and result.map == pytest.approx(1.0)
    with pytest.raises(QuarantineError) as error:
        evaluated(tmp_path, write_grid_network(tmp_path / "n.safetensors", names=["cat", "dog"]), path)
    seen(f"exit 3: {error.value.message}".replace(str(tmp_path), ""))


def test_e7_unknown_category(tmp_path, seen):
    with pytest.raises(
        UserError, match=r"truth.json: annotation 2: category 4 has no name \(known ids: \[3, 90\]\)"
    ) as error:
        read_dataset(coco_file(tmp_path, [annotation(1), annotation(2, category=4)]))
    seen(f"exit {error.value.exit_code}: {error.value.message}")


def test_e7_a_label_that_has_no_name_is_our_bug():
    with pytest.raises(AssertionError, match="label outside names"):
        measure([make_detections(ONE, [0.9], [2])], [make_record(ONE, [0])], 2)


@pytest.mark.parametrize("missing", cases(E8_area=["area"], E8_iscrowd=["iscrowd"], E8_both=["area", "iscrowd"]))
def test_area_and_crowd_are_derived(tmp_path, missing, seen):
    whole = [annotation(1), annotation(2, image=7, box=(20, 20, 100, 90), category=90)]
    bare = [{key: value for key, value in row.items() if key not in missing} for row in whole]
    (result, data), (expected, _) = perfect(coco_file(tmp_path, bare)), perfect(coco_file(tmp_path, whole))
    assert data.records[0].area.tolist() == [1600] and not data.records[0].crowd.any() and not data.problems
    np.testing.assert_equal(result.coco, expected.coco)
    seen("area = width * height, iscrowd = 0")


# -------------------------------------------------------------------------------------------------- what is no number

INVALID = {
    "E6_nan_box": ([NAN, 10, 50, 50], 0.9),
    "E6_infinite_box": ([10, 10, INF, 50], 0.9),
    "E6_nan_score": ([10, 10, 50, 50], NAN),
    "E6_infinite_score": ([10, 10, 50, 50], INF),
    "E6_swapped_corners": ([50, 50, 10, 10], 0.9),
}


@pytest.mark.parametrize(
    "box, score", [pytest.param(*value, id=name.replace("_", "-")) for name, value in INVALID.items()]
)
@pytest.mark.parametrize("protocol", ["coco", "voc12", "darknet0"])
def test_what_is_no_number_is_dropped_and_counted(box, score, protocol, seen):
    """pycocotools takes such a box for a match: AP 1.0."""
    result = measure([make_detections([box], [score], [0])], [make_record(ONE, [0])], 1, protocol)
    assert result.num_invalid == 1 and result.map == 0 and result.confusion.tolist() == [[0, 0], [1, 0]]
    assert "dropped 1 detections whose box or score is no number" in result.table()
    seen("AP 0.0, counted")


BROKEN = {  # of 3 slots and 2 classes, slot 1 is changed: field, value
    "E6_boxes_nan": ("boxes", NAN),
    "E6_boxes_inf": ("boxes", INF),
    "E6_obj_nan": ("obj", NAN),
    "E6_cls_nan": ("cls", NAN),
    "E6_quality_nan": ("quality", NAN),
}


@pytest.mark.parametrize(
    "field, value", [pytest.param(*value, id=name.replace("_", "-")) for name, value in BROKEN.items()]
)
def test_what_a_network_says_that_is_no_number_is_counted(field, value):
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]])
    preds = predictions(boxes, torch.full((1, 3), 4.0), torch.full((1, 3, 2), 4.0), torch.ones(1, 3))
    assert [(len(found), found.num_invalid) for found in postprocess(preds)] == [(6, 0)]
    getattr(preds, field)[0, 1] = value
    (found,) = postprocess(preds)
    assert (len(found), found.num_invalid) == (4, 1)
    assert found[:2].cpu().num_invalid == 1, "the count goes with it"
    preds.obj[...] = -20
    assert postprocess(preds)[0].num_invalid == (field == "obj") * 0, "below the threshold nobody would have seen it"


def changed(model, ending, value, layer=-1):
    """The same network with all of one of its parameters set to a value."""
    with torch.no_grad():
        parameters = [parameter for name, parameter in model.named_parameters() if name.endswith(ending)]
        parameters[layer].fill_(value)
    return model


def save(model, path, text=GRID):
    write_checkpoint(path, with_prefix("model", model.state_dict()), {"cfg": text, "names": NAMES})
    return path


def test_e6_a_first_stage_that_is_no_number_is_counted():
    """It has no proposals, so there is nothing that the second stage could say of it."""
    model = make_network().eval()
    with torch.no_grad():
        images = make_images()
        assert all(found.num_invalid == 0 for found in postprocess(model.predict(images), conf_thres=0.01))
        images[1] = torch.nan
        counts = [found.num_invalid for found in postprocess(model.predict(images), conf_thres=0.01)]
    assert counts[0] == counts[2] == 0 < counts[1]


@pytest.fixture
def overflowing(tmp_path):
    """Weights that are finite, but too large for sums of float32: all that it says is nan."""
    return save(changed(grid_network(), "weight", 3e38, layer=0), tmp_path / "net.safetensors")


def evaluated(folder, weights, data, *more):
    """test.py in this process."""
    flags = ["--weights", weights, "--data", data, "--project", folder / "runs", "--device", "cpu", "--save-json"]
    return program.main(program.parse_args(list(map(str, [*flags, "--workers", 0, *more]))))


def test_e6_test_ends_with_4(tmp_path, overflowing, capsys, seen):
    data = write_pictures(tmp_path / "data")
    with pytest.raises(
        DivergenceError, match=r"net.safetensors: 192 detections had a box or score that is no number"
    ) as error:
        evaluated(tmp_path, overflowing, data)
    assert error.value.exit_code == 4
    assert "dropped 192 detections" in capsys.readouterr().out, "after the numbers were said"
    assert json.loads((tmp_path / "runs/exp/predictions.json").read_text()) == []
    seen(f"exit 4: {error.value.message}")


def test_e6_detect_ends_with_4(tmp_path, overflowing):
    write_pictures(tmp_path / "data", num=1)
    flags = [
        "--weights",
        overflowing,
        "--source",
        tmp_path / "data/images/val",
        "--project",
        tmp_path / "runs",
        "--device",
        "cpu",
    ]
    with pytest.raises(DivergenceError, match="32 detections had a box or score that is no number") as error:
        detect.main(detect.parse_args(list(map(str, flags))))
    assert error.value.exit_code == 4 and (tmp_path / "runs/exp/0.png").exists()


# ------------------------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"E9-set-{seed}") for seed in range(25)])
def test_the_order_of_what_is_found_does_not_matter(seed):
    """Pictures in any order, however scores tie; those of one picture in any order, where their scores differ."""
    found, records, num_classes = random_set(seed)
    rng = np.random.default_rng(seed)
    pictures = rng.permutation(len(found))
    different = [make_detections(d.boxes, rng.permutation(len(d)) / 50, d.labels) for d in found]
    mixed = [d[torch.from_numpy(rng.permutation(len(d)))] for d in different]
    for before, after in ((found, found), (different, mixed)):
        before = measure(before, records, num_classes)
        after = measure([after[i] for i in pictures], [records[i] for i in pictures], num_classes)
        np.testing.assert_equal(after.coco, before.coco)
        np.testing.assert_equal(after.ap, before.ap)


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """Seven pictures of several shapes, and a network of random weights that sees something everywhere."""
    folder = tmp_path_factory.mktemp("seven")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    draw = np.random.default_rng(0)
    for number, size in enumerate([(64, 64), (48, 96), (128, 64), (64, 64), (50, 70), (33, 100), (64, 128)]):
        height, width = size
        cv2.imwrite(str(folder / f"images/{number}.png"), draw.integers(0, 255, (*size, 3), dtype=np.uint8))
        rows = [
            f"{row % 2} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} {(x2 - x1) / width} {(y2 - y1) / height}"
            for row, (x1, y1, x2, y2) in enumerate(grid_boxes(size, stretch=False)[::2].tolist())
        ]
        (folder / f"labels/{number}.txt").write_text("\n".join(rows))
    (folder / "data.yaml").write_text("train: images\nval: images\nnames: [square, bar]\n")
    torch.manual_seed(1)
    model = Darknet(parse_cfg(CFG))
    save(model, folder / "net.safetensors", CFG)
    result = evaluated(
        folder, folder / "net.safetensors", folder / "data.yaml", "--resize", "letterbox", "--batch-size", 1
    )
    assert 0 < result.coco["AP50"] < 1
    return folder, result


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("workers", cases(E10_no_worker=0, E10_one_worker=1, E10_two_workers=2))
def test_batches_and_workers_change_nothing(tmp_path, seven, size, workers, seen):
    folder, expected = seven
    flags = ["--resize", "letterbox", "--batch-size", size, "--workers", workers]
    result = evaluated(tmp_path, folder / "net.safetensors", folder / "data.yaml", *flags)
    np.testing.assert_equal(result.coco, expected.coco)
    np.testing.assert_equal(result.ap, expected.ap)
    seen(f"AP {result.map:.6f} at every batch size and number of workers")


def test_e10_narrow_batches_are_as_good(tmp_path, seven):
    """--rect leaves a letterbox's margin away: what touches it may be seen otherwise, nothing else."""
    folder, expected = seven
    result = evaluated(tmp_path, folder / "net.safetensors", folder / "data.yaml", "--resize", "letterbox", "--rect")
    assert result.num_images == 7 and abs(result.map50 - expected.map50) < 0.1


def test_e11_evaluating_changes_no_training(runs, seen):
    """The same weights, averages, optimiser and batch norms after three epochs, evaluated each or at the end only."""
    often, once = runs.new(), runs.new()
    for run, flags in ((often, []), (once, ["--noval"])):
        ended = runs.begin(run, *flags)
        assert ended.code == 0, ended.err
    parts = {name for name in state(often) if name.startswith(("model.", "ema.", "optim."))}
    assert len(parts) > 10 and not parts & set(differences(state(often), state(once)))
    seen(f"{len(parts)} tensors equal bit by bit with and without evaluation")


def test_e11_a_network_is_evaluated_at_the_training_size():
    """Training, evaluating at the same and another size, and training again."""
    torch.manual_seed(0)
    model = Darknet(parse_cfg(CFG.replace("filters=8\n", "filters=8\nbatch_normalize=1\n"))).train()
    predict = Predictor(model, conf_thres=0.001)
    for size in (64, 96, 64):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        predict(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        model.train()
        model(torch.rand(2, 3, size, size))[0].sum().backward()


SCORES = {  # fitness of each epoch -> the best, and how often it was written
    "E12_nan_first": ([NAN, 0.1], 1, 1),
    "E12_nan_later": ([0.1, NAN, 0.05], 0, 1),
    "E12_nan_only": ([NAN, NAN], -1, 0),
    "E12_tied": ([0.2, 0.2, 0.2], 0, 1),
    "E12_tied_later": ([0.1, 0.3, 0.3, 0.2], 1, 2),
    "E12_zero": ([0.0, 0.0], 0, 1),
}


@pytest.mark.parametrize(
    "scores, epoch, written", [pytest.param(*value, id=name.replace("_", "-")) for name, value in SCORES.items()]
)
def test_the_best_epoch(scores, epoch, written, seen):
    best = Best()
    updates = [best.update(score, number) for number, score in enumerate(scores)]
    assert best.epoch == epoch and sum(updates) == written
    again = Best()
    again.restore(json.loads(json.dumps(best.as_dict())))
    assert again == best, "as after a resume"
    seen("nan is never best; the first of equals stays")


# ------------------------------------------------------------------------------------------------------- suppression

CROWDS = {"E13_all_equal": 0.0, "E13_half_overlap": 300.0, "E13_apart": 30000.0}


@pytest.mark.parametrize("spread", cases(**CROWDS))
def test_a_hundred_thousand_candidates(spread, seen):
    """Two pictures: none is left out, the best are kept, and what is compared at once is bounded (test_postprocess)."""
    generator = torch.Generator().manual_seed(0)
    num, num_classes = 20_000, 5
    corner = (torch.rand(2, num, 2, generator=generator) * spread).round()
    boxes = torch.cat([corner, corner + 20], dim=2)
    cls = torch.randn(2, num, num_classes, generator=generator)
    preds = predictions(boxes, torch.full((2, num), 8.0), cls)
    start = time.process_time()
    found = postprocess(preds, conf_thres=0.0, iou_thres=0.6, max_det=300)
    seconds = time.process_time() - start
    assert len(found) == 2
    for picture, detections in enumerate(found):
        assert len(detections) == (num_classes if spread == 0 else 300)
        assert detections.scores[0] == (cls[picture].sigmoid() * torch.tensor(8.0).sigmoid()).max()
        assert (detections.scores[:-1] >= detections.scores[1:]).all()
    took = "less than 1 s" if seconds < 2 else f"{seconds / 2:.0f} s"
    seen(f"{num * num_classes} candidates of a picture in {took}, the best 300 kept")


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"E13-laws-{seed}") for seed in range(12)])
def test_laws_of_suppression(seed):
    """What is kept is part of what there was, no pair overlaps more than allowed, and a second time changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    num, num_classes = 300, 1 + seed % 4
    corner = torch.rand(1, num, 2, generator=generator) * (20 + 60 * (seed % 3))
    boxes = torch.cat([corner, corner + 5 + torch.rand(1, num, 2, generator=generator) * 30], dim=2)
    cls = torch.randn(1, num, num_classes, generator=generator)
    cls = (cls * 2).round() / 2 if seed % 2 else cls
    preds = predictions(boxes, torch.full((1, num), 100.0), cls)
    (found,) = postprocess(preds, conf_thres=0.2, iou_thres=0.5, max_det=1000)
    everything = {(*box, label, score) for box, scores in zip(boxes[0].tolist(), cls[0].sigmoid().tolist())
                  for label, score in enumerate(scores)}  # fmt: skip
    rows = list(zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist()))
    assert {(*box, label, score) for box, label, score in rows} <= everything
    rivals = (found.labels[:, None] == found.labels).triu(1)
    assert (box_iou(found.boxes, found.boxes) * rivals).max() <= 0.5
    again = predictions(
        found.boxes[None],
        torch.full((1, len(found)), 100.0),
        torch.full((1, len(found), num_classes), -100.0).scatter(
            2, found.labels[None, :, None], found.scores.logit()[None, :, None]
        ),
    )
    (second,) = postprocess(again, conf_thres=0.2 - 1e-6, iou_thres=0.5, max_det=1000)
    assert torch.equal(second.boxes, found.boxes) and torch.equal(second.labels, found.labels)

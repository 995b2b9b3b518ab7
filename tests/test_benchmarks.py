"""The benchmarks run, continue where they stopped, and compare what they say. No number of theirs is tested."""

from itertools import pairwise

import pytest
import torch

from benchmarks import (
    assign_cost,
    assigners,
    assignment,
    detect,
    gpu,
    journal,
    mean_ap,
    networks,
    postprocess,
    train_step,
    yolox_ladder,
)
from benchmarks.bare import BareNetwork
from benchmarks.short_training import parse_args
from models.assigners import ASSIGNERS, build_targets
from models.cfg import read_cfg
from models.darknet import Darknet
from utils.datasets.shapes import ensure_shapes
from utils.structures import Targets


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(ensure_shapes(tmp_path_factory.mktemp("data") / "shapes", num_pictures={"train": 16, "val": 4}))


def quick(data, path, name):
    return parse_args(["--quick", "--data", data, "--journal", str(path)], name=name, description="")


@pytest.mark.parametrize("module, name", [(assigners, "assigners"), (yolox_ladder, "yolox_ladder")])
def test_a_comparison_ends_in_a_table_and_is_not_done_twice(module, name, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assigners, "HEADS", ("yolox",))
    args = quick(data, tmp_path / "journal.jsonl", name)
    module.main(args)
    table = capsys.readouterr().out.split("\n")[-7:]
    assert any("0." in line for line in table)
    monkeypatch.setattr(module, "train", lambda *args, **keys: pytest.fail("trained again"))
    module.main(args)
    assert capsys.readouterr().out.split("\n")[-7:] == table


def test_all_assigners_are_compared():
    names = {head: set(assigners.criteria_of(head, 3)[1]) for head in assigners.HEADS}
    assert names["yolo"] == set(ASSIGNERS)
    assert names["yolox"] == {name for name, kind in ASSIGNERS.items() if "anchors" not in kind.needs}


def test_heads_differ_and_nothing_else():
    models = {name: networks.build_network(name, 3) for name in networks.NETWORKS}
    flops = [sum(spec.flops for spec in model.graph.layers) for model in models.values()]
    assert max(flops) < 1.02 * min(flops)
    trunk = [[layer.shape for layer in model.graph.layers[:20]] for model in models.values()]
    assert trunk[0] == trunk[1] == trunk[2]


def test_the_decoupled_anchor_head_says_objectness_where_it_is_read():
    """Its convolutions are joined anchor by anchor: changing one bias changes that part of that anchor alone."""
    model = networks.build_network("yolo-decoupled", 3).eval()
    images = torch.rand(1, 3, 64, 64)
    before = model.predict(images)
    assert before.obj.sigmoid().mean().item() == pytest.approx(0.011, abs=0.01)  # head biases went through the join
    joined = model.graph.layers[model.graph.layers[model.graph.heads[0]].inputs[0]]
    with torch.no_grad():
        model.layers[joined.inputs[4]].conv.bias += 5  # box, objectness, classes of anchor 0; box, objectness of 1
    after = model.predict(images)
    start, cells = before.priors.grids[0].start, before.priors.grids[0].rows * before.priors.grids[0].columns
    changed = (after.obj - before.obj)[0]
    expected = torch.zeros_like(changed)
    expected[start + cells : start + 2 * cells] = 5
    torch.testing.assert_close(changed, expected)
    assert torch.equal(after.cls, before.cls) and torch.equal(after.boxes, before.boxes)


def test_the_last_rung_is_yolox_and_each_changes_one_thing():
    ladder = yolox_ladder.LADDER
    assert (ladder[0].network, ladder[-1].network, ladder[-1].assigner["name"]) == ("yolo", "yolox", "simota")
    for before, after in pairwise(ladder):
        changes = [old != new for old, new in zip(before[1:4], after[1:4])]
        assert sum(changes) == 1 or after.name == "+ anchor-free"  # whose head cannot have the anchors' assigner


def test_a_sign_counts_only_where_all_seeds_agree():
    rung = yolox_ladder.LADDER[1]

    def scores(*values):
        return [{"mAP50-95": value} for value in values]

    assert yolox_ladder.gain(rung, scores(0.1, 0.2), scores(0.2, 0.3)) == ("+10.0", "2 of 2", "+1.1", "same")
    assert yolox_ladder.gain(rung, scores(0.1, 0.2), scores(0.0, 0.1))[-1] == "opposite"
    assert yolox_ladder.gain(rung, scores(0.1, 0.2), scores(0.2, 0.1))[-1] == "unclear"


def test_cost_is_measured_on_the_scene_that_is_promised(capsys):
    preds, targets = assign_cost.scene(2, 20, torch.device("cpu"))
    assert preds.cls.shape == (2, 8400, 80) and isinstance(targets, Targets) and len(targets) == 40
    assert targets.boxes.min() >= 0 and targets.boxes.max() <= 640
    assert set(assign_cost.criteria()) == set(ASSIGNERS)


def test_simota_by_picture_is_the_assignment_that_it_stands_for():
    torch.manual_seed(0)
    preds, targets = assign_cost.scene(3, assignment.OBJECTS, torch.device("cpu"))
    ours = build_targets(preds, targets, assignment.OURS["SimOTA"]).compact()
    rows = [
        (image, slot, assignment.OBJECTS * image + target)
        for image, found in enumerate(assignment.simota_by_picture(preds, targets))
        for slot, target in zip(*(column.tolist() for column in found))
    ]
    assert rows == list(zip(ours.image.tolist(), ours.prior.tolist(), ours.target.tolist()))


@pytest.mark.parametrize("name", train_step.GOALS)
def test_the_bare_network_is_the_same_network(name):
    cfg = read_cfg(assign_cost.ROOT / f"cfg/{name}.cfg")
    with torch.device("meta"):
        bare, model = BareNetwork(cfg), Darknet(cfg)
    images = torch.empty(1, 3, 96, 64, device="meta")
    assert [output.shape for output in bare(images)] == [output.shape for output in model(images)]
    assert sum(map(torch.numel, bare.parameters())) == sum(map(torch.numel, model.parameters()))


def test_the_gpu_benchmark_runs_without_one_or_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(gpu.parse_args([]))
    assert capsys.readouterr().out == "no CUDA device\n"
    gpu.main(gpu.parse_args(["--device", "cpu", "--quick"]))
    text = capsys.readouterr().out
    assert all(word in text for word in ("images/s", "MFU", "largest items", "RAM cache")) and "left out" not in text
    assert gpu.flops("yolov3", 416) == pytest.approx(65.9e9, rel=0.01)  # two per multiplication, as Darknet counts


def test_journal_survives_and_tables_align(tmp_path, monkeypatch):
    path = tmp_path / "runs" / "a.jsonl"
    journal.Journal(path).add({"b": 1, "a": 2}, {"mAP50": 0.5})
    assert journal.Journal(path).get({"a": 2, "b": 1}) == {"mAP50": 0.5}
    assert journal.Journal(path).get({"a": 2, "b": 2}) is None
    assert journal.table(("name", "n"), [("a", "1"), ("long", "10")]) == "name   n\na      1\nlong  10"
    assert journal.spread([0.3, 0.1, 0.2]) == "0.200 (0.100-0.300)"
    monkeypatch.setattr(journal, "README", tmp_path / "README.md")
    journal.record("Title", "command", "text", torch.device("cpu"))
    written = journal.README.read_text()
    assert "### Title, 20" in written and "`command`; commit " in written and written.endswith("```\ntext\n```\n")


@pytest.mark.parametrize(
    "module, flags", [(postprocess, []), (mean_ap, []), (detect, ["--parts", "network", "picture"])]
)
def test_fast_paths_equal_the_plain_ones_before_they_are_timed(module, flags, monkeypatch, capsys):
    """Beside no peer but pycocotools, which the tests have; what is compared raises if it is not equal."""
    installed = module.peer
    monkeypatch.setattr(module, "peer", lambda name, package: installed(name, package) if "pyco" in package else None)
    threads = torch.get_num_threads()
    try:
        module.main(module.parse_args(["--quick", *flags]))
    finally:
        torch.set_num_threads(threads)
    assert "matchbox" in capsys.readouterr().out

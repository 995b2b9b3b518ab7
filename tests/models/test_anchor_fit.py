"""Anchors fitted to boxes: found where they are known, no worse than before, written so that a network reads them."""

import numpy as np
import pytest
import torch

from models.anchor_fit import anchor_heads, fit_anchors, input_sizes, mean_overlap, refit, with_anchors
from models.cfg import parse_cfg, read_cfg
from models.darknet import Darknet
from models.graph import build_graph
from models.lint import main
from tests.utils.datasets.sets import H, W, yolo_set
from utils.boxes import wh_iou
from utils.datasets.records import read_dataset
from utils.errors import UserError

ROOT = __file__.rsplit("/", 3)[0]
KNOWN = torch.tensor([[10.0, 12.0], [40.0, 20.0], [30.0, 60.0], [120.0, 90.0]])


def two_heads(net="", width=64) -> str:
    """A network whose first head is the coarse one."""
    return (
        f"[net]\nwidth={width}\nheight=64\nchannels=3\n{net}\n"
        "[convolutional]\nfilters=8\nsize=3\nstride=8\npad=1\nactivation=linear\n"
        "[convolutional]\nfilters=21\nsize=3\nstride=2\npad=1\nactivation=linear\n"
        "[yolo]\nmask=3,4,5\nanchors=4,4, 8,8, 16,16, 32,32, 40,40, 48,48 # ours\nclasses=2\nnum=6\n"
        "[route]\nlayers=0\n"
        "[convolutional]\nfilters=21\nsize=1\nactivation=linear\n"
        "[yolo]\nmask=0,1,2\nanchors=4,4, 8,8, 16,16, 32,32, 40,40, 48,48\nclasses=2\nnum=6\n"
    )


def around(centres, num=300, spread=0.05, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (centres[:, None] * (1 + spread * torch.randn(len(centres), num, 2, generator=rng))).flatten(0, 1)


def test_anchors_are_found_where_they_are_known():
    found = fit_anchors(around(KNOWN), len(KNOWN))
    order = KNOWN.prod(dim=1).argsort()
    torch.testing.assert_close(found, KNOWN[order], rtol=0.03, atol=0.2)
    assert torch.equal(found, fit_anchors(around(KNOWN), len(KNOWN)))


def test_no_small_step_makes_them_much_better():
    """Against gradient ascent on the same measure, from where k-means ended."""
    sizes = torch.rand(800, 2, generator=torch.Generator().manual_seed(1)).mul(5).exp() * 2
    found = fit_anchors(sizes, 6)
    moved = found.log().requires_grad_()
    ascent = torch.optim.Adam([moved], lr=0.01)
    for _ in range(200):
        ascent.zero_grad()
        (-wh_iou(sizes, moved.exp()).amax(1).mean()).backward()
        ascent.step()
    assert mean_overlap(sizes, moved.exp().detach()) < mean_overlap(sizes, found) + 0.01


def test_mean_overlap_against_a_loop():
    sizes, anchors = around(KNOWN, 5), KNOWN[:2]
    loop = []
    for w, h in sizes.tolist():
        overlaps = [min(w, a) * min(h, b) / (w * h + a * b - min(w, a) * min(h, b)) for a, b in anchors.tolist()]
        loop.append(max(overlaps))
    assert mean_overlap(sizes, anchors) == pytest.approx(np.mean(loop), abs=1e-6)


@pytest.mark.parametrize(("net", "scale"), [("", (1, 1)), ("letter_box=1", (1, 1)), ("letter_box=0", (2, 64 / 48))])
def test_boxes_are_measured_as_training_places_them(tmp_path, net, scale):
    """64 x 48 pictures on 64 x 64 keep their size in a letterbox; stretched to 128 x 64 they do not."""
    yolo_set(tmp_path, {"a": "0 0.5 0.5 0.25 0.5\n1 0.5 0.5 0.5 0.25\n"})
    cfg = parse_cfg(two_heads(net, 128 if net == "letter_box=0" else 64))
    sizes = input_sizes(read_dataset(tmp_path, "train"), cfg)
    expected = torch.tensor([[W / 4, H / 2], [W / 2, H / 4]]) * torch.tensor(scale)
    torch.testing.assert_close(sizes, expected.to(sizes.dtype))


def test_the_finest_head_gets_the_smallest_and_the_network_reads_them():
    anchors = torch.tensor([[3.5, 4], [5, 6], [7, 8], [20, 10], [30, 30], [110, 99]])
    cfg = with_anchors(parse_cfg(two_heads()), anchors)
    fine, coarse = anchor_heads(cfg)
    assert fine.stride[0] < coarse.stride[0] and "# ours" in cfg.text
    torch.testing.assert_close(torch.cat([fine.anchors, coarse.anchors]), anchors)
    heads = Darknet(cfg).heads  # in the order of the cfg: coarse first
    assert heads[0].anchors.tolist() == anchors[3:].tolist() and heads[1].anchors.tolist() == anchors[:3].tolist()


def test_region_anchors_are_written_in_cells():
    cfg = read_cfg(f"{ROOT}/cfg/yolov2-tiny.cfg")
    anchors = torch.tensor([[16.0, 32], [32, 32], [64, 48], [96, 96], [160, 320]])
    changed = with_anchors(cfg, anchors)
    (head,) = anchor_heads(changed)
    torch.testing.assert_close(head.anchors, anchors)
    assert head.section.floats("anchors")[:2] == (0.5, 1.0) and "mask" not in head.section


@pytest.mark.parametrize("name", ["yolov3-tiny.cfg", "yolov4-csp.cfg", "yolov4-tiny.cfg", "yolov7-tiny.cfg"])
def test_every_kind_of_cfg_takes_them(name):
    cfg = read_cfg(f"{ROOT}/cfg/{name}")
    num = sum(len(head.anchors) for head in anchor_heads(cfg))
    anchors = torch.arange(1, num + 1)[:, None] * torch.tensor([[3.0, 5.0]])
    changed = with_anchors(cfg, anchors)
    torch.testing.assert_close(torch.cat([head.anchors for head in anchor_heads(changed)]), anchors)
    assert not [problem for problem in build_graph(changed, strict=False).problems if problem.severity == "error"]


def test_command_writes_anchors_and_classes_of_the_data(data_dir, tmp_path, capsys):
    out = tmp_path / "bccd.cfg"
    main([f"{ROOT}/cfg/yolov3-tiny.cfg", "--anchors", str(data_dir / "bccd"), "-o", str(out), "-q"])
    said = capsys.readouterr().out
    assert "2804 boxes" in said and "best possible recall" in said and "filters 255 -> 24" in said
    cfg = read_cfg(out)
    assert {section.int("classes") for section in cfg.layers if section.type == "yolo"} == {3}
    data = read_dataset(data_dir / "bccd", "train")
    sizes = input_sizes(data, cfg)
    before, after = (
        mean_overlap(sizes, torch.cat([head.anchors for head in anchor_heads(each)]))
        for each in (read_cfg(f"{ROOT}/cfg/yolov3-tiny.cfg"), cfg)
    )
    assert after > 0.85 > before
    again, _ = refit(cfg, str(data_dir / "bccd"))
    assert again.text == cfg.text and "the anchors stay" in capsys.readouterr().out


def test_without_output_nothing_is_written(data_dir, tmp_path, capsys):
    cfg = tmp_path / "my.cfg"
    cfg.write_text(two_heads())
    main([str(cfg), "--anchors", str(data_dir / "bccd"), "-q"])
    assert [file.name for file in tmp_path.iterdir()] == ["my.cfg"] and "classes" not in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path):
    yolo_set(tmp_path, {"a": "0 0.5 0.5 0.25 0.5\n"})
    cfg = tmp_path / "my.cfg"
    cfg.write_text(two_heads())
    with pytest.raises(UserError, match="1 boxes of 1 sizes, expected 6"):
        main([str(cfg), "--anchors", str(tmp_path)])
    with pytest.raises(UserError, match="no such data set"):
        main([str(cfg), "--anchors", str(tmp_path / "none")])
    with pytest.raises(UserError, match="no head with anchors"):
        main([f"{ROOT}/cfg/yolox-tiny.cfg", "--anchors", str(tmp_path)])

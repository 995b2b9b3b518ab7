"""The command: what it prints, what it writes, how it ends."""

import pytest

from models.cfg import head_anchors, parse_cfg, read_cfg
from models.graph import build_graph
from models.lint import fix, main, problems_of, table

DIRTY = """[net]
width=32
height=32
channels=3
batch=1
batch=8
[convolutonal]
filtres=16 # wide
size=3
size=3
foo=bar
activation=leaky
[convolutional]
filters=255
size=1
activation=linear
[yolo]
mask=0,1,2
anchors=4,4, 8 8, 16,16, 32,32
classes=2
num=3
"""


def test_fix_corrects_everything_that_is_beyond_doubt():
    cfg, corrected = fix(parse_cfg(DIRTY, "my.cfg", strict=False))
    left = problems_of(cfg)
    assert [(p.severity, p.message.split("=")[0]) for p in left] == [("warning", "width"), ("warning", "height")]
    graph = build_graph(cfg)
    assert [spec.shape for spec in graph.layers] == [(16, 30, 30), (21, 30, 30), (21, 30, 30)]
    assert cfg.net.int("batch") == 1 and len(head_anchors(cfg.layers[2])) == cfg.layers[2].int("num") == 4
    assert "# wide" in cfg.text and "# foo=bar" in cfg.text
    assert {"[convolutonal]", "'filtres'"} <= {w for p in corrected for w in p.message.split()}
    assert fix(cfg)[1] == []


def test_fixing_a_reference_file_keeps_its_network(data_dir):
    for name in ("cspx-p7-mish.cfg", "efficientnet-lite3.cfg", "yolov3-openimages.cfg", "yolov3.cfg"):
        cfg = read_cfg(data_dir / "cfg" / name)
        fixed, _ = fix(cfg)
        assert [p for p in problems_of(fixed) if p.fix] == []
        facts = [[(s.inputs, s.shape, s.params) for s in build_graph(c).layers] for c in (cfg, fixed)]
        assert facts[0] == facts[1]
    assert fixed.text == cfg.text  # yolov3.cfg has nothing to correct


def test_command_lists_all_problems_and_writes_the_corrected_file(tmp_path, capsys):
    file = tmp_path / "my.cfg"
    file.write_text(DIRTY)
    with pytest.raises(SystemExit) as end:
        main([str(file)])
    assert end.value.code == 2
    out = capsys.readouterr().out
    for line in (6, 7, 8, 10, 19):
        assert f"my.cfg:{line}: " in out
    main([str(file), "--fix"])
    assert file.read_text() == DIRTY, "the original stays"
    assert not [p for p in problems_of(read_cfg(tmp_path / "my.fixed.cfg")) if p.severity == "error"]
    with pytest.raises(ValueError, match="exists already"):
        main([str(file), "--fix"])


def test_command_adapts_classes(tmp_path, capsys):
    file = tmp_path / "my.cfg"
    file.write_text(fix(parse_cfg(DIRTY, strict=False))[0].text)
    main([str(file), "--classes", "5", "-o", str(tmp_path / "new.cfg"), "-q"])
    assert "filters 21 -> 30" in capsys.readouterr().out
    assert build_graph(read_cfg(tmp_path / "new.cfg")).layers[-1].shape[0] == 30
    with pytest.raises(ValueError, match="one output for 2 cfgs"):
        main([str(file), str(file), "-o", str(tmp_path / "x.cfg")])


def test_table(data_dir):
    graph = build_graph(read_cfg(data_dir / "cfg" / "yolov3-tiny.cfg"))
    lines = table(graph).split("\n")
    assert len(lines) == 1 + 24 + 1
    assert lines[1].split() == ["0", "convolutional", "3x3/1", "3x416x416", "16x416x416", "464", "0.150"]
    assert lines[-1] == (
        "416x416: 8,852,366 parameters, 5.565 BFLOPs, 35,434,956 bytes of weights, heads at strides 32, 16"
    )


def test_every_reference_file_is_linted(data_dir, capsys):
    """No file makes the linter itself fail; a refused section is a line with a question mark."""
    for file in sorted((data_dir / "cfg").rglob("*.cfg")):
        found = build_graph(read_cfg(file, strict=False), strict=False)
        assert table(found).count("\n") == len(found.layers) + 1

"""The text side: Darknet's reading rules, what is said about dirt, and editing in place."""

import os
import pickle

import pytest

from models.cfg import adapt_classes, head_anchors, head_filters, head_mask, parse_cfg, read_cfg, write_cfg
from models.graph import build_graph
from models.section import CfgError
from utils.errors import UserError

CLEAN = """[net]
batch=1
width=32
height=32
channels=3

[convolutional]
batch_normalize=1
filters=16
size=3
stride=2
pad=1
activation=leaky

[convolutional]
filters=21
size=1
activation=linear

[yolo]
mask=0,1,2
anchors=4,4, 8,8, 16,16
classes=2
num=3
"""


def options(cfg):
    return [(s.type, {key: option.text for key, option in s.options.items()}) for s in (cfg.net, *cfg.layers)]


def head_tables(cfg):
    return [head_anchors(section) for section in cfg.layers if {"anchors", "num"} <= section.options.keys()]


def test_every_reference_file_is_read_and_survives_a_round_trip(data_dir):
    files = sorted((data_dir / "cfg").rglob("*.cfg"))
    assert len(files) == 95
    for file in files:
        cfg = read_cfg(file)
        again = parse_cfg(write_cfg(cfg))
        assert options(again) == options(cfg), file.name
        assert head_tables(again) == head_tables(cfg), file.name
        assert all("a missing comma?" in problem.hint for problem in again.problems), file.name


def test_dirt_is_counted(data_dir):
    """The list of irregularities in data/README.md, and nothing else."""
    warnings = {file.name: read_cfg(file).warnings for file in sorted((data_dir / "cfg").rglob("*.cfg"))}
    messages = {name: [w.message for w in found] for name, found in warnings.items() if found}
    assert set(messages) == {
        *("cspx-p7-mish.cfg", "cspx-p7-mish_hp.cfg", "efficientnet-lite3.cfg"),
        *("efficientnet_b0.cfg", "yolo9000.cfg", "yolov3-openimages.cfg"),
    }
    flat = [message for found in messages.values() for message in found]
    assert sum("text after the value" in message for message in flat) == 128
    assert sum("twice in [net]" in message for message in flat) == 8
    assert sum("is read as '4561'" in message for message in messages["cspx-p7-mish_hp.cfg"]) == 5


@pytest.mark.parametrize(
    "old, new",
    [
        ("filters=16", "; x\nfilters=16"),
        ("filters=16", "   # x\nfilters=16"),
        ("filters=16", "filters=16 # wide"),
        ("filters=16", "filters=16 ; wide"),
        ("filters=16", "   \n\t\nfilters=16"),
        ("filters=16", "\tfilters\t=  16 "),
        ("filters=16", "filters=16 wide"),
        ("activation=leaky", "activation=leaky # not mish"),
        ("[yolo]", "[yolo] # head"),
        ("[yolo]", " [ yolo ] "),
        ("[net]", "[network]"),
        ("[convolutional]", "[conv]"),
        ("filters=16", "filters=16\nfilters=16"),
        ("batch=1", "batch=1\nbatch=64"),
        ("4,4, 8,8, 16,16", "4 ,4,8,8,   16,16,"),
        ("4,4, 8,8, 16,16", "4.0,.4e1, 8,8, 1.6e1,16."),
        ("num=3\n", "num=3"),
    ],
)
def test_harmless_variants_are_the_same_network(old, new):
    text = CLEAN.replace(old, new, 1)
    assert text != CLEAN
    graphs = [build_graph(parse_cfg(t)) for t in (CLEAN, text)]
    facts = [[(s.section.type, s.inputs, s.shape, s.params, s.flops) for s in g.layers] for g in graphs]
    assert facts[0] == facts[1]
    assert head_anchors(graphs[0].cfg.layers[2]) == head_anchors(graphs[1].cfg.layers[2])
    assert graphs[1].layers[0].section.str("activation") == "leaky"


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.encode("utf-8-sig"),
        lambda text: ("# caf\u00e9\n" + text).encode("latin-1"),
        lambda text: ("# caf\u00e9\n" + text).encode(),
        lambda text: text.replace("=", "\t=\t").encode(),
    ],
    ids=["crlf", "bom", "latin-1", "utf-8", "tabs"],
)
def test_encodings(tmp_path, encode):
    file = tmp_path / "a.cfg"
    file.write_bytes(encode(CLEAN))
    assert options(read_cfg(file)) == options(parse_cfg(CLEAN))


def test_editing_keeps_line_endings_and_comments():
    text = CLEAN.replace("filters=21", "  filters = 21  # before the head").replace("\n", "\r\n")
    cfg, _ = adapt_classes(parse_cfg(text), 5)
    assert cfg.text == text.replace("= 21", "= 30").replace("classes=2", "classes=5")
    cfg = cfg.with_options([(cfg.layers[0], "groups", 1), (cfg.net, "width", 64), (cfg.layers[0], "filters", 32)])
    assert cfg.layers[0].int("groups") == 1 and cfg.layers[0].int("filters") == 32 and cfg.width == 64
    assert cfg.text.count("\r\n") == cfg.text.count("\n")


def bad(old, new, text=CLEAN):
    changed = text.replace(old, new, 1)
    assert changed != text
    return changed


def test_all_text_problems_at_once():
    with pytest.raises(CfgError) as caught:
        parse_cfg(bad("filters=21", "filters 21", bad("filters=16", "filters=1=6")), "my.cfg")
    assert [problem.line for problem in caught.value.problems] == [9, 16]
    assert str(caught.value).count("my.cfg:") == 2
    again = pickle.loads(pickle.dumps(caught.value))  # it may come from a worker process
    assert str(again) == str(caught.value) and again.problems == caught.value.problems


@pytest.mark.parametrize(
    "key, text", [("size", "x" * 1_000_000), ("size", "9" * 1_000_000), ("size", "3.5"), ("size", "1e1")]
)
def test_values_are_clipped_in_messages(key, text):
    section = parse_cfg(bad("size=3", f"size={text}")).layers[0]
    with pytest.raises(CfgError, match="<text>:10: size=") as caught:
        section.int(key)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "0x10", "1,2", "", "1..2", "__import__('os')"])
def test_floats_are_finite_numbers(text):
    section = parse_cfg(f"[net]\n[dropout]\nprobability={text or ','}\n").layers[0]
    with pytest.raises(CfgError, match="not a finite number"):
        section.float("probability")


def test_getters():
    section = parse_cfg("[net]\n[x]\na=-3\nb=.5\nc=1,2,3,\nd=word\ne=0\n").layers[0]
    assert section.int("a") == -3 and section.float("b") == 0.5 and section.ints("c") == (1, 2, 3)
    assert section.flag("a") and not section.flag("e") and not section.flag("absent") and section.flag("absent", True)
    assert section.int("absent", 7) == 7 and section.str("d", choices=("word",)) == "word"
    assert "a" in section and "z" not in section
    with pytest.raises(CfgError, match=r"<text>:2: \[x\] lacks 'z'"):
        section.int("z")
    with pytest.raises(CfgError, match=r"<text>:6: d=word \(known: a, b\)"):
        section.str("d", choices=("a", "b"))


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_cfg(tmp_path / "no.cfg")
    with pytest.raises(UserError, match="a folder"):
        read_cfg(tmp_path)
    os.mkfifo(tmp_path / "pipe.cfg")
    with pytest.raises(UserError, match="not an ordinary file"):
        read_cfg(tmp_path / "pipe.cfg")
    (tmp_path / "wide.cfg").write_bytes(CLEAN.encode("utf-16"))
    with pytest.raises(UserError, match=r"wide.cfg:1: a NUL byte.*UTF-8"):
        read_cfg(tmp_path / "wide.cfg")
    (tmp_path / "big.cfg").write_bytes(b"#" * (2 << 20))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        read_cfg(tmp_path / "big.cfg")


# ---- heads


def test_anchor_table_of_a_missing_comma(data_dir):
    """As Darknet reads it: the numbers join, everything after moves up, the last entry keeps its default of 0.5."""
    cfg = read_cfg(data_dir / "cfg" / "cspx-p7-mish_hp.cfg")
    head = next(section for section in cfg.layers if section.type == "yolo")
    anchors = head_anchors(head)
    assert len(anchors) == 16 and anchors[3:5] == ((61, 4561), (45, 48)) and anchors[-1] == (800, 0.5)


def test_head_filters():
    head = parse_cfg(CLEAN).layers[2]
    assert head_mask(head) == (0, 1, 2) and head_filters(head) == (21,) and head_filters(head, 80) == (255,)
    region = parse_cfg("[net]\n[region]\nanchors=1,1, 2,2\nnum=2\nclasses=3\ncoords=4\n").layers[0]
    assert head_filters(region) == (16,)
    gaussian = parse_cfg(CLEAN.replace("[yolo]", "[Gaussian_yolo]")).layers[2]
    assert head_filters(gaussian) == (33,)


def test_adapt_classes_on_every_network_with_a_head(data_dir):
    adapted = 0
    for file in sorted((data_dir / "cfg").glob("*.cfg")):
        cfg = read_cfg(file)
        heads = [s for s in cfg.layers if s.type in ("yolo", "Gaussian_yolo", "region")]
        if not heads:
            continue
        new, lines = adapt_classes(cfg, 7)
        graph = build_graph(new)
        assert all(graph.cfg.layers[i].int("classes") == 7 for i in graph.heads)
        assert [line.rsplit(" ", 2)[-1] for line in lines].count("7") == len(heads)
        changed = sum(a != b for a, b in zip(cfg.text.split("\n"), new.text.split("\n")))
        assert changed == len(lines) and len(new.text.split("\n")) == len(cfg.text.split("\n"))
        assert adapt_classes(new, 7) == (new, [])
        adapted += 1
    assert adapted == 42 + 12


def test_adapt_classes_says_what_changed():
    cfg, lines = adapt_classes(parse_cfg(CLEAN, "my.cfg"), 3)
    assert lines == ["my.cfg:16 filters 21 -> 24", "my.cfg:23 classes 2 -> 3"]
    with pytest.raises(CfgError, match="0 classes"):
        adapt_classes(cfg, 0)
    with pytest.raises(CfgError, match="no detection head"):
        adapt_classes(parse_cfg("[net]\n[convolutional]\nfilters=1\n"), 3)
    with pytest.raises(CfgError, match="no convolution feeds"):
        adapt_classes(parse_cfg(CLEAN.split("[conv")[0] + CLEAN[CLEAN.index("[yolo]") :]), 3)

"""C1-C33: what is wrong with a cfg is one complaint at its line, before torch is touched; what is harmless is not."""

import ast
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT, refused

from models.cfg import adapt_classes, decode_cfg, parse_cfg, read_cfg, write_cfg
from models.darknet import Darknet
from models.graph import build_graph
from models.heads import YoloHead
from models.lint import main as lint
from models.loading import find_file, load_network
from models.section import CfgError
from utils.errors import UserError

NET = "[net]\nbatch=2\nsubdivisions=1\nwidth=32\nheight=32\nchannels=3\n"
CONV = "[convolutional]\nfilters={}\nsize=3\nstride={}\npad=1\nactivation=leaky\n"
HEAD = "[convolutional]\nfilters=21\nsize=1\nactivation=linear\n"
YOLO = "[yolo]\nmask=0,1,2\nanchors=4,4, 8,8, 16,16\nclasses=2\nnum=3\n"
CLEAN = NET + CONV.format(16, 2) + CONV.format(8, 1) + HEAD + YOLO  # sections at lines 1, 7, 13, 19, 23
TWO_STAGES = (
    NET + CONV.format(4, 2) + HEAD.replace("21", "15") + "[rpn]\nsizes=8\nratios=.5,1,2\n[roi]\nfrom=0\nclasses=2\n"
)
CODE = "__import__('os').mkdir('was-here')"


def but(old: str, new: str, text: str = CLEAN) -> str:
    """The text with its first ``old`` changed."""
    assert old in text, old
    return text.replace(old, new, 1)


# stride 4 and back up to stride 2, joined with layer 0
ODD = but("[yolo]", "[upsample]\n[route]\nlayers=-1,0\n[convolutional]\nfilters=21\nactivation=linear\n[yolo]")
ODD = but("stride=1", "stride=2", ODD)

REFUSED = {  # (text, line, part of the message)
    "C1-empty": ("", 1, "no [net] section"),
    "C1-comment": ("# x\n", 1, "no [net] section"),
    "C2": (CLEAN.removeprefix(NET), 1, "the first section is [convolutional], expected [net]"),
    "C3": ("batch=1\n" + CLEAN, 1, "'batch=1' before the first section"),
    "C4": (but("[convolutional]", "[convolutonal]"), 7, "did you mean [convolutional]"),
    "C4-far": (but("[convolutional]", "[attention]"), 7, "unknown section [attention]"),
    "C4-later": (but("[convolutional]\nfilters=8", "[convolutonal]\nfilters=8"), 13, "did you mean [convolutional]"),
    "C5": (but("[convolutional]", "[convolutional"), 7, "no closing ']'"),
    "C5-empty": (but("[convolutional]", "[]"), 7, "no closing ']'"),
    "C6-case": (but("[convolutional]", "[Convolutional]"), 7, "did you mean [convolutional]"),
    "C6-text": (but("[yolo]", "[yolo] x"), 23, "text after [yolo]"),
    "C7-filters": (but("filters=16\n", ""), 7, "[convolutional] lacks 'filters'"),
    "C7-classes": (but("classes=2\n", ""), 23, "[yolo] lacks 'classes'"),
    "C7-anchors": (but("anchors=4,4, 8,8, 16,16\n", ""), 23, "[yolo] lacks 'anchors'"),
    "C7-num": (but("num=3\n", ""), 23, "[yolo] lacks 'num'"),
    "C7-width": (but("width=32\n", ""), 1, "[net] lacks 'width'"),
    "C8": (but("filters=16", "filtres=16"), 8, "did you mean 'filters'"),
    "C9-word": (but("filters=16", "filters=sixteen"), 8, "filters=sixteen: not an integer"),
    "C9-fraction": (but("filters=16", "filters=16.5"), 8, "filters=16.5: not an integer"),
    "C9-digits": (but("filters=16", "filters=" + "9" * 1_000_000), 8, f"filters={'9' * 40}...: does not fit in 32"),
    "C9-nul": (but("filters=16", "filters=1\0006"), 8, "a NUL byte"),
    "C10-filters": (but("filters=16", "filters=-16"), 8, "filters=-16, expected at least 1"),
    "C10-filters-0": (but("filters=16", "filters=0"), 8, "filters=0, expected at least 1"),
    "C10-size": (but("size=3", "size=-3"), 9, "size=-3, expected 1..1000"),
    "C10-size-0": (but("size=3", "size=0"), 9, "size=0, expected 1..1000"),
    "C10-stride": (but("stride=2", "stride=-2"), 10, "stride=-2, expected at least 1"),
    "C10-stride-0": (but("stride=2", "stride=0"), 10, "stride=0, expected at least 1"),
    "C11-filters": (but("filters=16", "filters=2000000000"), 7, "too large: 56,000,000,000 parameters, the limit is"),
    "C11-width": (but("width=32", "width=1000000000"), 4, "too large: 96,000,000,000 values per image"),
    "C11-upsample": (but("[yolo]", "[upsample]\nstride=4096\n[yolo]"), 23, "too large"),
    "C11-int": (but("filters=16", "filters=20000000000"), 8, "does not fit in 32 bits"),
    "C11-anchors": (but("4,4, 8,8, 16,16", "4 4,8,8,16,16", but("num=3", "num=2000000000")), 27, "expected 1..1000"),
    "C11-layers": (TWO_STAGES + "fc=2000000000\n", 23, "fc=2000000000, expected 1..1000"),
    "C12": (but("filters=8", "groups=3\nfilters=8"), 14, "groups=3 does not divide 16 input channels"),
    "C12-filters": (but("filters=8", "groups=16\nfilters=8"), 14, "groups=16 does not divide 8 filters"),
    "C13": (but("activation=leaky", "activation=leeky"), 12, "activation=leeky (known: linear, leaky, relu"),
    "C14": (but("filters=16", "filters=16\nfilters=32"), 9, "'filters' twice in [convolutional]: 16 at line 8, 32"),
    "C15-none": (but("filters=16", "filters 16"), 8, "'filters 16': expected key=value"),
    "C15-two": (but("filters=16", "filters=1=6"), 8, "two '='"),
    "C15-no-value": (but("filters=16", "filters="), 8, "no value"),
    "C15-no-key": (but("filters=16", "=16"), 8, "expected key=value"),
    "C18-before": (but("[yolo]", "[route]\nlayers=-99\n[yolo]"), 24, "route -99 from layer 3 points before layer 0"),
    "C18-after": (but("[yolo]", "[route]\nlayers=99\n[yolo]"), 24, "route 99 from layer 3 points forward"),
    "C19-self": (but("[yolo]", "[route]\nlayers=3\n[yolo]"), 24, "points to itself"),
    "C19-forward": (but("[yolo]", "[shortcut]\nfrom=4\n[yolo]"), 24, "points forward"),
    "C19-empty": (but("[yolo]", "[route]\n[yolo]"), 23, "lacks 'layers'"),
    "C19-no-value": (but("[yolo]", "[route]\nlayers=\n[yolo]"), 24, "'layers' has no value"),
    "C21-route": (
        but("[yolo]", "[upsample]\n[route]\nlayers=-1,0\n[yolo]"),
        25,
        "21x32x32 from [upsample] line 23, 16x16x16 from [convolutional] line 7",
    ),
    "C21-shortcut": (
        but("[yolo]", "[upsample]\n[shortcut]\nfrom=-2\n[yolo]"),
        25,
        "differ in height or width: 21x32x32 from [upsample] line 23, 21x16x16 from [convolutional] line 19",
    ),
    "C22": (but("filters=21", "filters=255"), 20, "filters=255, [yolo] line 23 needs 21"),
    "C22-42": (but("filters=21", "filters=42"), 20, "filters=42, [yolo] line 23 needs 21"),
    "C23-classes-0": (but("classes=2", "classes=0"), 26, "classes=0, expected at least 1"),
    "C23-classes-negative": (but("classes=2", "classes=-1"), 26, "classes=-1, expected at least 1"),
    "C23-mask-range": (but("mask=0,1,2", "mask=0,1,3"), 24, "mask names anchor 3, expected 0..2"),
    "C23-mask-negative": (but("mask=0,1,2", "mask=0,1,-1"), 24, "mask names anchor -1"),
    "C23-mask-twice": (but("mask=0,1,2", "mask=0,1,1"), 24, "mask names an anchor twice"),
    "C23-anchors-odd": (but("16,16", "16"), 25, "5 anchor values, expected pairs"),
    "C23-anchors-0": (but("16,16", "16,0"), 25, "anchor side 0, expected > 0"),
    "C23-anchors-negative": (but("16,16", "16,-16"), 25, "anchor side -16"),
    "C23-anchors-nan": (but("16,16", "16,nan"), 25, "not a finite number"),
    "C23-num": (but("num=3", "num=4"), 25, "3 anchors, but num=4 at line 27"),
    "C25-first": (NET + YOLO, 7, "[yolo] reads 3 channels, needs 21"),
    "C25-two-nets": (CLEAN + "[net]\nwidth=1\n", 28, "a second [net], the first is at line 1"),
    "C25-no-layer": (NET, 1, "no layer after [net]"),
    "C26-zero": (but("width=32", "width=0"), 4, "width=0, expected at least 1"),
    "C26-odd": (but("width=32", "width=65", ODD), 25, "make width and height of [net] multiples of the largest stride"),
    "C27-batch": (but("batch=2", "batch=0"), 2, "batch=0, expected at least 1"),
    "C27-subdivisions": (but("subdivisions=1", "subdivisions=0"), 3, "subdivisions=0, expected at least 1"),
    "C27-more": (but("subdivisions=1", "subdivisions=4"), 3, "subdivisions=4 is more than batch=2"),
    "C28-nan": (but("batch=2", "learning_rate=nan\nbatch=2"), 2, "learning_rate=nan: not a finite number"),
    "C28-steps": (but("batch=2", "policy=steps\nsteps=1,2\nscales=.1\nbatch=2"), 4, "2 steps but 1 scales"),
    "C32-code": (but("filters=16", f"filters={CODE}"), 8, "not an integer"),
    "C32-path": (but("activation=leaky", "activation=../../etc/passwd"), 12, "activation=../../etc/passwd (known:"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, seen):
    """One mistake is one complaint, one line long, at the line of the mistake; the text is all that was read."""
    text, line, message = REFUSED[name]
    error = refused(lambda: build_graph(parse_cfg(text, "my.cfg")), where=f"my.cfg:{line}: ", says=message)
    assert "\n" not in error and len(error) < 600
    seen(error)


@pytest.mark.parametrize("name", ["C9-nul", "C17-utf-16", "C17-nul"])
def test_text_that_is_none(name, seen):
    data = {"C17-utf-16": CLEAN.encode("utf-16"), "C17-nul": CLEAN.encode() + b"\0"}.get(name, b"[net]\nwidth=1\x006\n")
    seen(refused(lambda: decode_cfg(data, "my.cfg"), where="my.cfg:", says="a NUL byte"))


# ---- the same network


def facts(cfg) -> tuple:
    """All that makes a network: what is read, made, learned and decoded."""
    model = Darknet(cfg)
    layers = [(spec.inputs, spec.shape, spec.params, spec.flops) for spec in model.graph.layers]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    activations = [layer.activation.__name__ for layer in model.layers if hasattr(layer, "activation")]
    return layers, shapes, activations, [(head.anchor_table, head.num_classes) for head in model.heads]


HARMLESS = {
    "C6-comment": but("[yolo]", "[yolo] # head").encode(),
    "C6-comment-conv": but("[convolutional]", "[convolutional] # a").encode(),
    "C14-same": but("filters=16", "filters=16\nfilters=16").encode(),
    "C14-net": but("width=32", "width=32\nwidth=64").encode(),
    "C15-rest": but("filters=16", "filters=16 wide").encode(),
    "C16-semicolon": but("filters=16", "; x\nfilters=16").encode(),
    "C16-indented": but("filters=16", "   # x\nfilters=16").encode(),
    "C16-behind": but("filters=16", "filters=16 # wide").encode(),
    "C16-semicolon-behind": but("filters=16", "filters=16 ; wide").encode(),
    "C16-spaces": but("filters=16", "   \n\t \nfilters=16").encode(),
    "C17-crlf": CLEAN.replace("\n", "\r\n").encode(),
    "C17-tabs": CLEAN.replace("=", "\t=\t").encode(),
    "C17-bom": CLEAN.encode("utf-8-sig"),
    "C17-latin-1": ("# caf\u00e9\n" + CLEAN).encode("latin-1"),
    "C17-no-newline-at-the-end": CLEAN.rstrip().encode(),
    "C19-comma": but("[yolo]", "[route]\nlayers=-1,\n[yolo]").encode(),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless(name, seen):
    clean = CLEAN if name != "C19-comma" else but("[yolo]", "[route]\nlayers=-1\n[yolo]")
    cfg = decode_cfg(HARMLESS[name], "my.cfg")
    assert facts(cfg) == facts(parse_cfg(clean))
    seen(f"the same network; {'; '.join(map(str, cfg.problems)) or 'nothing said'}")


@pytest.mark.parametrize("seed", range(10))
def test_c16_order_comments_and_spaces_never_matter(seed):
    """Keys in another order, with random comments, spaces, blank lines and line ends, and the text dumped again."""
    rng, lines = random.Random(seed), []
    for section in CLEAN.rstrip().split("[")[1:]:
        head, *keys = section.strip().split("\n")
        for line in ("[" + head, *rng.sample(keys, len(keys))):
            lines += rng.choice(([], [""], ["# x=1 [y]"], [" \t; filters=99"]))
            space = rng.choice(("", " ", "\t"))
            lines.append(space + line.replace("=", f"{space}={space}") + rng.choice(("", " ", " # z", " ; z")))
    cfg = decode_cfg(rng.choice(("\n", "\r\n")).join(lines).encode(), "my.cfg")
    assert facts(cfg) == facts(parse_cfg(CLEAN)) == facts(parse_cfg(write_cfg(cfg)))


def test_c29_a_renamed_file_is_the_same_network(tmp_path, seen):
    for name in ("yolov3-tiny32.cfg", "mynet.cfg", "yolov4-csp.cfg"):
        (tmp_path / name).write_text(CLEAN)
    assert len({str(facts(read_cfg(path))) for path in tmp_path.iterdir()}) == 1
    seen("three names, one network")


def test_c20_layer_0_is_layer_0(seen):
    text = NET + CONV.format(5, 1) + CONV.format(7, 1) + "[route]\nlayers=0\n" + HEAD + YOLO
    graph = build_graph(parse_cfg(text))
    assert graph.layers[2].inputs == (0,) and graph.layers[3].in_shapes == ((5, 32, 32),)
    seen("a route to layer 0 hands on its 5 channels")


@pytest.mark.golden_case("darknet/parity/*.npz")
def test_c20_shapes_are_darknets(case, data_dir):
    import numpy as np

    golden = np.load(case)
    cfg = read_cfg(next(data_dir.rglob(str(golden["cfg"]))))
    graph = build_graph(cfg, int(golden["width"]), int(golden["height"]))
    assert [spec.shape for spec in graph.layers] == [tuple(shape) for shape in golden["layer_shape"].tolist()]


def test_c12_groups_are_built():
    model = Darknet(parse_cfg(but("filters=8", "groups=4\nfilters=8")))
    assert model.layers[1].conv.groups == 4 and model.layers[1].conv.weight.shape == (8, 4, 3, 3)


# ---- said, and gone on with


@pytest.mark.parametrize(
    "old, new, line, message",
    [
        pytest.param("activation=leaky\n", "", 7, "lacks 'activation': logistic, as in Darknet", id="C7-activation"),
        pytest.param("size=3\n", "", 7, "lacks 'size': 1, as in Darknet", id="C7-size"),
        pytest.param("mask=0,1,2\n", "", 23, "no mask: all 3 anchors", id="C7-mask"),
        pytest.param("filters=16", "foo=bar\nfilters=16", 8, "unknown key 'foo'", id="C8-far"),
        pytest.param("16,16", "16,16, 32,32", 27, "4 anchors, but num=3", id="C23-more-anchors"),
        pytest.param("width=32", "width=65", 4, "width=65 is not a multiple of the largest stride", id="C26-odd"),
    ],
)
def test_said(tmp_path, capsys, seen, old, new, line, message):
    """By the linter and by whatever loads the network; train.py: test_c7 below."""
    path = tmp_path / "my.cfg"
    path.write_text(but(old, new))
    lint(["--quiet", str(path)])
    report = " ".join(capsys.readouterr().out.split())
    assert report.startswith(f"{path}:{line}: warning ") and message in report
    torch.save(Darknet(read_cfg(path)).state_dict(), tmp_path / "my.pt")
    load_network(tmp_path / "my.pt", cfg=path)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {path}:{line}: ") and message in said
    seen(said.strip().replace(str(tmp_path), "."))


@pytest.mark.parametrize("size", [(64, 32), (32, 96)], ids=["C26-wide", "C26-high"])
def test_need_not_be_square(size, seen):
    model = Darknet(parse_cfg(but("width=32\nheight=32", f"width={size[0]}\nheight={size[1]}")))
    (raw,) = model(torch.zeros(1, 3, size[1], size[0]))
    assert raw.shape == (1, 21, size[1] // 2, size[0] // 2)
    seen(f"{size[0]}x{size[1]} runs")


# ---- classes


def test_c24_the_network_follows_the_data(seen):
    """train.py: every head, and the convolution before it; each changed line is said."""
    cfg, lines = adapt_classes(parse_cfg(CLEAN, "my.cfg"), 5)
    assert lines == ["my.cfg:20 filters 21 -> 30", "my.cfg:26 classes 2 -> 5"]
    assert Darknet(cfg).num_classes == 5
    seen(f"train: {'; '.join(lines)}")


def test_c24_weights_decide_elsewhere(tmp_path, seen):
    """test.py and detect.py: the names of the data, the cfg and the weights must agree."""
    (tmp_path / "my.cfg").write_text(CLEAN)
    torch.save(Darknet(parse_cfg(CLEAN)).state_dict(), tmp_path / "my.pt")
    path = tmp_path / "my.pt"
    call = lambda: load_network(path, cfg=tmp_path / "my.cfg", names=list("abcde"))  # noqa: E731
    seen(refused(call, where=str(path), says="not for the 5 classes that are named").replace(str(tmp_path), "."))
    two = YOLO.replace("classes=2", "classes=3")
    text = CLEAN + HEAD.replace("21", "24") + two
    seen(refused(lambda: build_graph(parse_cfg(text, "my.cfg")), where="my.cfg:35", says="classes=3, but 2 at line 26"))


# ---- files


def folder(path):
    path.mkdir()


def unreadable(path):
    path.symlink_to("/proc/self/mem")  # an ordinary file, whose first byte cannot be read, also not by root


@pytest.mark.parametrize(
    "make, message",
    [
        pytest.param(folder, "a folder", id="C31-folder"),
        pytest.param(lambda path: None, "no such", id="C31-missing"),
        pytest.param(unreadable, "cannot be read", id="C31-unreadable"),
        pytest.param(os.mkfifo, "not an ordinary file", id="C31-pipe"),
        pytest.param(lambda path: path.symlink_to(path), "", id="C31-loop"),
    ],
)
def test_what_is_no_file(tmp_path, make, message, seen):
    """Nothing waits for a writer that never comes."""
    make(path := tmp_path / "my.cfg")
    seen(refused(lambda: read_cfg(path), where=str(path), says=message).replace(str(tmp_path), "."))
    refused(lambda: read_cfg(find_file(path, "cfg")), where=str(path), says=message)


@pytest.mark.parametrize("text", ["x" * 5000, "~nobody-of-that-name/my.cfg"], ids=["C31-long", "C31-nobody"])
def test_names_that_no_file_has(text):
    refused(lambda: find_file(text, "cfg"), says="no such cfg")


# ---- size, code, initialisation


def test_c30_twenty_thousand_sections(seen):
    text = NET + "[convolutional]\nfilters=1\n" * 20_000
    seen(refused(lambda: parse_cfg(text, "my.cfg"), where="my.cfg:8007: ", says="more than 4000 sections"))


def test_c30_a_thousand_problems_end_the_search():
    text = NET + "[convolutional]\nfilters=1\nactivation=linear\n" + "".join(f"k{n}=1\n" for n in range(5000))
    with pytest.raises(CfgError) as caught:
        build_graph(parse_cfg(text, "my.cfg"), strict=False)
    assert len(caught.value.problems) == 1002 and str(caught.value).count("\n") == 20


def test_c11_nothing_is_allocated(tmp_path, seen):
    """Two gigabytes of memory are enough to refuse a network of any size."""
    names = ["C11-filters", "C11-width", "C11-upsample", "C11-anchors", "C11-layers"]
    for name in names:
        (tmp_path / f"{name}.cfg").write_text(REFUSED[name][0])
    done = subprocess.run(
        [sys.executable, "-m", "models.lint", "--quiet", *(f"{tmp_path}/{name}.cfg" for name in names)],
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.count(" error ") == len(names)
    seen("refused with 2 GB of memory, exit 2")


PARSERS = [Path("models") / name for name in ("section.py", "cfg.py", "rules.py", "shapes.py", "graph.py", "lint.py")]


@pytest.mark.parametrize("path", [pytest.param(path, id=f"C32-{path.stem}") for path in PARSERS])
def test_no_code_is_made_of_text(path):
    calls = [node.func for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call)]
    names = {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}
    assert not names & {"eval", "exec", "__import__", "import_module", "system", "popen", "literal_eval"}
    assert "compile" not in {call.id for call in calls if isinstance(call, ast.Name)}


def test_c32_a_path_in_a_cfg_is_not_opened(tmp_path, monkeypatch, seen):
    """Darknet's ``map`` and ``tree`` name files; here a cfg is the only file that is read."""
    region = YOLO.replace("[yolo]\nmask=0,1,2", "[region]\nsoftmax=1\nmap=../../etc/passwd")
    opened = []
    monkeypatch.setattr(Path, "open", lambda path, *rest, **more: opened.append(path))
    monkeypatch.setattr("builtins.open", lambda path, *rest, **more: opened.append(path))
    Darknet(parse_cfg(CLEAN.replace(YOLO, region)))
    assert opened == []
    seen("no file is opened")


def test_c33_a_failed_initialisation_is_fatal(monkeypatch, seen):
    def broken(head, bias):
        raise RuntimeError("shapes of another torch")

    monkeypatch.setattr(YoloHead, "init_bias", broken)
    with pytest.raises(RuntimeError, match="another torch"):
        Darknet(parse_cfg(CLEAN))
    seen("raised")


@pytest.mark.parametrize("path", [pytest.param(p, id=f"C33-{p.stem}") for p in sorted((ROOT / "cfg").glob("*.cfg"))])
def test_every_head_of_ours_is_initialised(path):
    """No head is passed over because the layer before it is not as expected."""
    with torch.device("meta"):
        model = Darknet(read_cfg(path))
    for index in model.graph.heads:
        for source in model.graph.layers[index].inputs if model.cfg.layers[index].type not in ("roi", "mask") else ():
            layer = model.layers[source]
            biased = getattr(getattr(layer, "conv", None), "bias", None) is not None
            shared = model.cfg.layers[source].type == "convolutional" and "share_index" in model.cfg.layers[source]
            assert biased or shared, f"layer {source}"


def test_c25_no_head_at_all(seen):
    """A classifier is a network; to train a detector of it is refused."""
    cfg = parse_cfg(NET + CONV.format(16, 2), "my.cfg")
    Darknet(cfg)
    seen(refused(lambda: adapt_classes(cfg, 2), where="my.cfg:1: ", says="no detection head"))


def test_several_mistakes_are_said_together():
    text = but("filters=21", "filters=20", but("stride=1", "strid=1", but("activation=leaky", "activation=leeky")))
    with pytest.raises(UserError) as caught:
        build_graph(parse_cfg(text, "my.cfg"))
    assert [problem.line for problem in caught.value.problems] == [12, 16]

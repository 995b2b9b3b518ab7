"""The graph against Darknet's own shapes and sizes, and its refusals."""

import numpy as np
import pytest

from models.cfg import parse_cfg, read_cfg
from models.graph import build_graph
from models.section import CfgError

NET = "[net]\nbatch=2\nsubdivisions=1\nwidth=32\nheight=32\nchannels=3\n"
CONV = "[convolutional]\nfilters={}\nsize=3\nstride={}\npad=1\nactivation=leaky\n"
HEAD = "[convolutional]\nfilters=21\nsize=1\nactivation=linear\n"
HEAD += "[yolo]\nmask=0,1,2\nanchors=4,4, 8,8, 16,16\nclasses=2\nnum=3\n"
CLEAN = NET + CONV.format(16, 2) + CONV.format(8, 1) + HEAD  # sections at lines 1, 7, 13, 19, 23

UNSUPPORTED = {  # every reference file that is refused, and the sections named
    "rnn": ["rnn.cfg", "rnn.train.cfg"],
    "gru": ["gru.cfg"],
    "lstm": ["lstm.train.cfg"],
    "detection": ["t1.test.cfg", *(f"yolov1/{n}.cfg" for n in ("tiny-coco", "tiny-yolo", "xyolo.test", "yolo-small"))],
    "detection, local": [f"yolov1/{name}.cfg" for name in ("yolo-coco", "yolo", "yolo.train", "yolo2")],
}


def graph(text, **size):
    return build_graph(parse_cfg(text, "my.cfg"), **size)


def problems(text):
    return build_graph(parse_cfg(text, "my.cfg", strict=False), strict=False).problems


def bad(old, new, text=CLEAN):
    changed = text.replace(old, new, 1)
    assert changed != text, old
    return changed


# ---- against Darknet


def test_every_reference_file_builds_or_is_refused_by_name(data_dir):
    reasons = {file: sections for sections, files in UNSUPPORTED.items() for file in files}
    built = refused = yolo = 0
    for file in sorted((data_dir / "cfg").rglob("*.cfg")):
        cfg, reason = read_cfg(file), reasons.get(file.relative_to(data_dir / "cfg").as_posix())
        if reason:
            with pytest.raises(CfgError) as caught:
                build_graph(cfg)
            messages = [problem.message for problem in caught.value.problems]
            assert all(message.endswith("is not supported") for message in messages)
            assert ", ".join(sorted({message.split("]")[0][1:] for message in messages})) == reason
            refused += 1
            continue
        found = build_graph(cfg)
        assert None not in found.layers
        built += 1
        yolo += any(cfg.layers[head].type in ("yolo", "Gaussian_yolo") for head in found.heads)
    assert (built, refused, yolo) == (95 - 13, 13, 42)


@pytest.mark.golden_case("darknet/parity/*.npz")
def test_shapes_and_floats_of_whole_networks(case, data_dir):
    golden = np.load(case)
    file = next(data_dir.rglob(str(golden["cfg"])))
    found = build_graph(read_cfg(file), int(golden["width"]), int(golden["height"]))
    assert [spec.shape for spec in found.layers] == [tuple(shape) for shape in golden["layer_shape"].tolist()]
    assert sum(spec.floats for spec in found.layers) == int(golden["weights_floats"])


@pytest.mark.golden_case("darknet/micro/*.npz")
def test_shapes_and_floats_of_single_features(case):
    golden = np.load(case)
    found = build_graph(parse_cfg(str(golden["cfg"]), strict=False))  # quirks doubles a key: read as Darknet reads it
    for spec in found.layers:
        assert spec.shape == golden[f"layer{spec.index}"].shape
    assert 20 + 4 * sum(spec.floats for spec in found.layers) == golden["weights"].size


@pytest.mark.parametrize(
    "name, size", [("yolo-fastest-1.1", 320), ("yolo-fastest-1.1-xl", 320), ("MobileNetV2-YOLOv3-Nano-voc", 320)]
)
def test_floats_of_real_weights(name, size, data_dir):
    found = build_graph(read_cfg(data_dir / "weights" / f"{name}.cfg"))
    assert (data_dir / "weights" / f"{name}.weights").stat().st_size == 20 + 4 * sum(s.floats for s in found.layers)


def test_published_sizes(data_dir):
    """Parameters and FLOPs of YOLOv3 and YOLOv3-tiny as published (65.9 and 5.6 BFLOPs at 416x416)."""
    for name, params, billions in (("yolov3", 61_949_149, 65.864), ("yolov3-tiny", 8_852_366, 5.565)):
        found = build_graph(read_cfg(data_dir / "cfg" / f"{name}.cfg"))
        assert sum(spec.params for spec in found.layers) == params
        assert sum(spec.flops for spec in found.layers) / 1e9 == pytest.approx(billions, abs=0.02)


# ---- the walk


def test_inputs_outputs_and_last_use():
    text = (
        NET + CONV.format(4, 1) + CONV.format(4, 1) + "[shortcut]\nfrom=-2\n[route]\nlayers=-1,0\n" + CONV.format(21, 2)
    )
    text += HEAD.split("linear\n")[1]
    found = graph(text)
    assert [spec.inputs for spec in found.layers] == [(-1,), (0,), (1, 0), (2, 0), (3,), (4,)]
    assert [spec.shape for spec in found.layers] == [(4, 32, 32)] * 3 + [(8, 32, 32)] + [(21, 16, 16)] * 2
    assert found.last_use == (3, 2, 3, 4, 5, 6) and found.heads == found.outputs == (5,) and found.strides == (2,)


def test_a_classifier_returns_its_last_computing_layer(data_dir):
    found = build_graph(read_cfg(data_dir / "cfg" / "darknet19.cfg"))
    assert found.heads == () and [found.cfg.layers[i].type for i in found.outputs] == ["softmax"]


def test_sizes_can_be_replaced_and_need_not_be_square():
    found = graph(CLEAN, width=64, height=96)
    assert found.layers[-1].shape == (21, 48, 32) and (found.height, found.width) == (96, 64)
    assert graph(bad("width=32", "width=64")).layers[-1].shape == (21, 16, 32)


def test_larger_layers_are_subsampled_in_a_shortcut():
    text = NET + CONV.format(4, 1) + CONV.format(4, 2) + "[shortcut]\nfrom=-2\n" + HEAD
    found = graph(text)
    assert found.layers[2].shape == (4, 16, 16) and "every 2 pixels" in found.problems[0].message


# ---- refusals


FAULTS = {  # (text, line, part of the message); those of the catalogue are in tests/faults/test_cfg_faults.py
    "sam": (bad("[yolo]", "[sam]\nfrom=0\n[yolo]"), 24, "multiplied layers differ in shape"),
    "crnn": (bad("[yolo]", "[crnn]\nhidden=4\noutput=21\n[yolo]"), 23, "a state of 4x14x14 becomes 4x12x12"),
    "crnn-groups": (bad("[yolo]", "[crnn]\nhidden=4\noutput=21\npad=1\ngroups=3\n[yolo]"), 27, "groups=1"),
    "padding": (bad("[yolo]", "[maxpool]\nsize=2\npadding=3\n[yolo]"), 25, "some windows of 2 see nothing but padding"),
    "dropout": (bad("[yolo]", "[dropout]\nprobability=1.5\n[yolo]"), 24, "probability=1.5, expected 0..1"),
    "flipped": (bad("filters=16", "filters=16\nflipped=1"), 9, "flipped=1 is not supported"),
    "new-coords": (bad("num=3", "num=3\nnew_coords=1"), 22, "new_coords needs activation=logistic"),
    "window": (bad("size=3", "size=99", bad("pad=1\n", "")), 9, "window 99x99 is larger than its input 3x32x32"),
    "dilation": (bad("size=3\nstride=2\npad=1", "size=3\nstride=2\npad=0\ndilation=2"), 12, "dilation with a padding"),
    "group-id": (bad("[yolo]", "[route]\nlayers=-1\ngroups=3\ngroup_id=3\n[yolo]"), 26, "group_id=3, expected 0..2"),
    "reorg": (bad("[yolo]", "[reorg3d]\nstride=3\n[yolo]"), 24, "stride=3 does not divide"),
    "share": (bad("filters=8", "share_index=0\nfilters=8"), 14, "has other weights"),
    "classes-differ": (
        CLEAN + HEAD.replace("21", "24").replace("classes=2", "classes=3"),
        35,
        "classes=3, but 2 at line 26",
    ),
    "weights-type": (
        bad("[yolo]", "[shortcut]\nfrom=0\nweights_type=per_channel\n[yolo]"),
        25,
        "without weights_normalization",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name):
    text, line, message = FAULTS[name]
    with pytest.raises(CfgError) as caught:
        graph(text)
    assert f"my.cfg:{line}: " in str(caught.value) and message in str(caught.value)
    assert len(caught.value.problems) == 1, "one mistake is one complaint"


def test_all_problems_at_once():
    text = bad("filters=21", "filters=20", bad("stride=1", "strid=1", bad("activation=leaky", "activation=leeky")))
    lines = [problem.line for problem in problems(text)]
    assert lines == [12, 16]  # the head's filters depend on a layer that has no shape: not judged
    found = problems(bad("activation=linear", "activation=linaer", bad("size=3", "size=x")))
    assert [p.line for p in found] == [9, 22]


@pytest.mark.parametrize(
    "old, new, line, message",
    [
        ("activation=leaky\n", "", 7, "lacks 'activation': logistic, as in Darknet"),
        ("size=3\n", "", 7, "lacks 'size': 1, as in Darknet"),
        ("mask=0,1,2\n", "", 23, "no mask: all 3 anchors"),
        ("16,16", "16,16, 32,32", 27, "4 anchors, but num=3"),
        ("filters=16", "foo=bar\nfilters=16", 8, "unknown key 'foo'"),
        ("width=32", "width=33", 4, "width=33 is not a multiple"),
    ],
)
def test_warnings(old, new, line, message):
    found = graph(bad(old, new)).problems
    assert [(p.severity, p.line) for p in found] == [("warning", line)] and message in found[0].message


def test_keys_darknet_knows_pass_in_silence():
    text = bad("filters=16", "stopbackward=1\ngrad_centr=0\nfilters=16", bad("batch=2", "max_epochs=9\nbatch=2"))
    assert graph(bad("num=3", "num=3\nuc_normalizer=1\nbeta1=.6\nembedding_layer=-3", text)).problems == ()


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "conv_lstm", "local", "detection"])
def test_refused_by_name(name):
    with pytest.raises(CfgError, match=rf"my.cfg:13: \[{name}\] .* is not supported"):
        graph(NET + CONV.format(16, 2) + f"[{name}]\n" + HEAD)


SHAPES = {  # section text -> (shape, params, floats) after a 16x16x16 layer (layer 0) and an 8x16x16 one
    "[connected]\noutput=10\nactivation=linear\nbatch_normalize=1\n": (
        (10, 1, 1),
        8 * 256 * 10 + 20,
        8 * 256 * 10 + 40,
    ),
    "[batchnorm]\n": ((8, 16, 16), 16, 32),
    "[avgpool]\n": ((8, 1, 1), 0, 0),
    "[maxpool]\nstride=2\n": ((8, 8, 8), 0, 0),
    "[maxpool]\nsize=3\nstride=2\nantialiasing=1\n": ((8, 8, 8), 0, 0),
    "[maxpool]\nmaxpool_depth=1\nout_channels=2\n": ((2, 16, 16), 0, 0),
    "[local_avgpool]\nsize=4\nstride=4\n": ((8, 4, 4), 0, 0),
    "[upsample]\n": ((8, 32, 32), 0, 0),
    "[upsample]\nstride=-2\n": ((8, 8, 8), 0, 0),
    "[reorg]\nstride=2\n": ((32, 8, 8), 0, 0),
    "[reorg]\nstride=2\nreverse=1\n": ((2, 32, 32), 0, 0),
    "[crop]\ncrop_height=9\ncrop_width=7\n": ((8, 9, 7), 0, 0),
    "[implicit]\nfilters=5\natoms=3\n": ((5, 3, 1), 15, 15),
    "[route]\nlayers=-1,0\ngroups=2\ngroup_id=1\n": ((12, 16, 16), 0, 0),
    "[shortcut]\nfrom=0\nweights_type=per_channel\nweights_normalization=relu\n": ((8, 16, 16), 16, 16),
    "[shortcut]\nfrom=0\nweights_type=per_feature\nweights_normalization=softmax\n": ((8, 16, 16), 2, 2),
    "[crnn]\noutput=6\nhidden=4\npad=1\nactivation=leaky\n": ((6, 16, 16), 9 * (32 + 16 + 24) + 14, 9 * 72 + 14),
    "[convolutional]\nfilters=6\ngroups=2\nsize=3\nstride_x=2\npad=1\nactivation=mish\n": ((6, 16, 8), 222, 222),
    "[convolutional]\nfilters=6\nsize=3\npad=1\nstride=2\nantialiasing=1\nactivation=mish\n": ((6, 8, 8), 438, 438),
    "[convolutional]\nfilters=6\nbatch_normalize=1\ndontloadscales=1\nactivation=mish\n": ((6, 16, 16), 60, 54),
    "[convolutional]\nfilters=6\nbatch_normalize=1\ndontload=1\nactivation=mish\n": ((6, 16, 16), 60, 0),
    "[convolutional]\nfilters=6\ncbn=1\nactivation=mish\n": ((6, 16, 16), 60, 72),
    "[dropout]\n": ((8, 16, 16), 0, 0),
    "[empty]\n": ((8, 16, 16), 0, 0),
}


@pytest.mark.parametrize("text", SHAPES)
def test_shapes(text):
    found = graph(NET + CONV.format(16, 2) + CONV.format(8, 1) + text)
    spec = found.layers[2]
    assert (spec.shape, spec.params, spec.floats) == SHAPES[text]

"""The networks in cfg/, layer by layer equal to the files they are named after."""

from pathlib import Path

import pytest

from models.cfg import head_anchors, head_mask, read_cfg
from models.graph import build_graph

CFG = Path(__file__).resolve().parents[2] / "cfg"
REFERENCE = {
    **dict.fromkeys(["yolov2-tiny", "yolov3", "yolov3-spp", "yolov3-tiny", "yolov4", "yolov4-csp"], "cfg"),
    **dict.fromkeys(["yolov4-tiny", "yolov7-tiny"], "cfg"),
    "yolo-fastest-1.1": "weights",
}
DEFAULTS = {  # what a missing key means, for the keys compared
    "layer": {"groups": "1", "group_id": "0", "batch_normalize": "0", "activation": "linear", "dilation": "1"},
    "head": {
        **{"new_coords": 0, "scale_x_y": 1, "beta_nms": 0.6, "ignore_thresh": 0.5, "truth_thresh": 1, "iou_thresh": 1},
        **{"iou_normalizer": 0.75, "obj_normalizer": 1, "cls_normalizer": 1, "max_delta": -1, "objectness_smooth": 0},
        **{"thresh": 0.5, "softmax": 0, "coords": 4, "rescore": 0, "bias_match": 0, "absolute": 0, "object_scale": 1},
        **{"noobject_scale": 1, "class_scale": 1, "coord_scale": 1},
    },
}


def layer_facts(spec):
    section = spec.section
    facts = [section.str(key, default) for key, default in DEFAULTS["layer"].items()]
    return section.type, spec.inputs, spec.in_shapes, spec.shape, spec.params, spec.floats, spec.flops, facts


def head_facts(section):
    numbers = {key: section.float(key, default) for key, default in DEFAULTS["head"].items()}
    words = section.str("nms_kind", "default"), section.str("iou_loss", "mse")
    return head_anchors(section), head_mask(section), section.int("classes"), numbers, words


@pytest.mark.parametrize("name", REFERENCE)
def test_equals_the_reference(name, data_dir):
    ours = build_graph(read_cfg(CFG / f"{name}.cfg"))
    theirs = build_graph(read_cfg(data_dir / REFERENCE[name] / f"{name}.cfg"))
    assert (ours.cfg.channels, ours.height, ours.width) == (theirs.cfg.channels, theirs.height, theirs.width)
    assert ours.cfg.net.int("letter_box", 0) == theirs.cfg.net.int("letter_box", 0)
    assert len(ours.layers) == len(theirs.layers) and ours.heads == theirs.heads
    for our, their in zip(ours.layers, theirs.layers):
        assert layer_facts(our) == layer_facts(their), f"layer {our.index}"
    for index in ours.heads:
        assert head_facts(ours.cfg.layers[index]) == head_facts(theirs.cfg.layers[index]), f"head {index}"


@pytest.mark.parametrize("file", sorted(CFG.glob("*.cfg")), ids=lambda file: file.stem)
def test_has_nothing_to_complain_about(file):
    cfg = read_cfg(file)
    assert cfg.problems == () and build_graph(cfg).problems == ()


def test_matchbox_is_small():
    graph = build_graph(read_cfg(CFG / "matchbox.cfg"))
    assert sum(spec.params for spec in graph.layers) < 600_000
    assert sum(spec.flops for spec in graph.layers) < 0.4e9
    assert graph.strides == (16, 8)

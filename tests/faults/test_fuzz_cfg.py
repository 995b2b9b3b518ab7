"""Damaged cfgs: an error with a line that is in the file, or a network that is what it says it is."""

import pytest
import torch
from cfg_seeds import SEEDS, TOKENS
from harness import ROOT
from mutator import mutations, num_inputs

from models.cfg import decode_cfg, parse_cfg, write_cfg
from models.darknet import Darknet
from models.darknet_weights import arrays_of, count_floats, declared
from models.graph import build_graph
from models.rules import SECTIONS
from models.section import CfgError
from utils.errors import UserError

BUILT = 100  # of so many accepted graphs one is built: torch's shape arithmetic takes 20 ms
OURS = [path.read_bytes() for path in sorted((ROOT / "cfg").glob("*tiny*.cfg"))]  # long: a few are enough


def options(cfg) -> list:
    return [(section.type, {o.key: o.text for o in section.options.values()}) for section in (cfg.net, *cfg.layers)]


def test_every_section_is_among_the_seeds():
    cfgs = [decode_cfg(seed, "seed") for seed in SEEDS]
    assert {section.type for cfg in cfgs for section in cfg.layers} == set(SECTIONS)
    for cfg in cfgs:
        build_graph(cfg)


def test_text():
    """What is accepted reads back from its own text; what is not says where."""
    accepted = 0
    for data in mutations(SEEDS * 20 + OURS, TOKENS, num_inputs()):
        try:
            cfg = decode_cfg(data, "my.cfg")
        except CfgError as error:
            assert all(1 <= problem.line <= data.count(b"\n") + 1 for problem in error.problems)
        except UserError as error:
            assert "NUL" in str(error)
        else:
            text = write_cfg(cfg)
            again = parse_cfg(text)
            assert options(again) == options(cfg) and write_cfg(again) == text
            accepted += 1
    assert accepted > 1000


def built(graph, again) -> None:
    """The network has the shapes, parameters and bytes that were inferred without it, without allocating any."""
    with torch.device("meta"):
        model = Darknet(graph.cfg).eval()
        outputs = model.layer_outputs(torch.empty(1, graph.cfg.channels, graph.height, graph.width))
    for spec, output in zip(graph.layers, outputs):
        maps = output if isinstance(output, tuple) else (output,)
        assert tuple(maps[0].shape[1:]) == spec.shape, spec.section
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(spec.params for spec in graph.layers)
    assert count_floats(declared(arrays_of(model))) == sum(spec.floats for spec in graph.layers)
    assert [spec.shape for spec in build_graph(again).layers] == [spec.shape for spec in graph.layers]


@pytest.mark.filterwarnings("ignore")
def test_networks():
    """10,000: inferring a graph is slower than reading its text."""
    accepted = 0
    for data in mutations(SEEDS, TOKENS, num_inputs(10_000), seed=1):
        try:
            cfg = decode_cfg(data, "my.cfg")
            graph = build_graph(cfg)
        except UserError:
            continue
        accepted += 1
        if accepted % BUILT == 1:
            try:
                built(graph, parse_cfg(write_cfg(cfg)))
            except UserError as error:  # what only a head or a layer can know
                assert isinstance(error, CfgError)
    assert accepted > 100

"""Sections -> what each layer reads and makes, before anything is allocated. Imports no torch.

All problems of a file are found in one walk: a layer that is wrong has no shape, and those that read it are passed over
in silence, so that one mistake is one complaint.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace

from models.cfg import Cfg, feeding_convolution, head_anchors, head_filters
from models.rules import ANY, HEADS, NET, READS, REFUSED, SECTIONS, Rule
from models.section import CfgError, Problem, Section, clip, raise_errors
from models.shapes import LayerSpec, Shape

BUDGET = {  # of a network
    "parameters": 2 * 10**9,  # 8 GB
    "values per image": 4 * 10**9,  # the outputs of all layers: 16 GB
}
NOT_AN_OUTPUT = ("cost", "contrastive", "dropout", "empty")  # training only
STAGES = ("rpn", "roi", "mask")  # the heads of a network in two stages
MAX_PROBLEMS = 1000
MISSPELT = 0.8  # similarity from which an unknown key is taken for a known one


@dataclass(frozen=True, eq=False)
class Graph:
    """What each layer reads and makes. ``layers[i]`` belongs to ``cfg.layers[i]``.

    heads: indices of the head layers, in cfg order.
    outputs: indices of the layers whose output the network returns: the heads, or the last computing layer.
    last_use: per layer, the last layer that reads it; ``len(layers)`` for outputs, its own index for nobody.
    """

    cfg: Cfg
    width: int
    height: int
    layers: tuple[LayerSpec | None, ...]  # None only where strict=False left a layer without a shape
    heads: tuple[int, ...]
    outputs: tuple[int, ...]
    last_use: tuple[int, ...]
    problems: tuple[Problem, ...]

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per cell of each head, from the shapes."""
        return tuple(round(self.height / self.layers[head].shape[1]) for head in self.heads)


def build_graph(cfg: Cfg, width: int | None = None, height: int | None = None, strict: bool = True) -> Graph:
    """Infer every layer's inputs, shape, parameters and FLOPs; ``width`` and ``height`` replace the cfg's.

    Errors: all problems of the file together as one `CfgError`; with ``strict=False`` they are in ``Graph.problems``.
    """
    return _Walk(cfg, width, height).graph(strict)


class _Walk:
    def __init__(self, cfg: Cfg, width: int | None, height: int | None):
        self.cfg, self.problems = cfg, []
        self.specs: list[LayerSpec | None] = []
        self.spent = {"parameters": 0, "values per image": 0}
        self.sound = [self._check_net(cfg.net)]
        self.sound = [*self.sound, *(self._check_section(section) for section in cfg.layers)]
        self.width = width or (cfg.width if self.sound[0] else 0)
        self.height = height or (cfg.height if self.sound[0] else 0)

    def graph(self, strict: bool) -> Graph:
        image = None
        if self.sound[0]:
            image = self._guarded(self._image, (self.cfg.channels, self.height, self.width))
        for index, section in enumerate(self.cfg.layers):
            self.specs.append(self._guarded(self._layer, index, section, image) if self.sound[index + 1] else None)
        heads = tuple(i for i, section in enumerate(self.cfg.layers) if section.type in HEADS)
        for index in heads:
            self._guarded(self._check_head, index)
        self._check_heads_together(heads)
        for index, section in enumerate(self.cfg.layers):
            if section.type == "convolutional" and "share_index" in section:
                self._guarded(self._check_shared, index, section)
        if strict:
            raise_errors(self.problems)
        outputs = heads or self._last_computing()
        problems = tuple(sorted(self.problems, key=lambda problem: problem.line))
        last_use = self._last_use(outputs)
        return Graph(self.cfg, self.width, self.height, tuple(self.specs), heads, outputs, last_use, problems)

    def _guarded(self, function, *arguments):
        """The function's result, or None with its complaint noted."""
        try:
            return function(*arguments)
        except CfgError as error:
            self.problems.extend(error.problems)
            return None

    # ---- keys and values

    def _check_section(self, section: Section) -> bool:
        if section.type in REFUSED:
            self._note(section, f"[{section.type}] ({REFUSED[section.type]}) is not supported", "Darknet reads it")
            return False
        if section.type not in SECTIONS:
            close = difflib.get_close_matches(section.type, [*SECTIONS, *REFUSED], 1)
            close = close or difflib.get_close_matches(section.type.lower(), SECTIONS, 1)
            hint = f"did you mean [{close[0]}]? " if close else ""
            fix = f"[{close[0]}]" if close and close[0] in SECTIONS else None
            self._note(
                section, f"unknown section [{clip(section.type)}]", f"{hint}Darknet does not know it either", fix=fix
            )
            return False
        return self._check_keys(section, SECTIONS[section.type])

    def _check_keys(self, section: Section, rule: Rule) -> bool:
        """Note every unknown key and every bad value; True where the section can be used."""
        before, meant = len(self._errors()), set()
        for key in section.options:
            check = rule.keys.get(key) or ANY.keys.get(key)
            if check:
                self._guarded(check, section, key)
            elif key not in rule.known:
                meant.add(self._unknown_key(section, key, rule))
        for key in rule.required:
            if key not in section and key not in meant:
                self._note(section, f"[{section.type}] lacks '{key}'")
        for key, default in rule.said.items():
            if key not in section and key not in meant:
                self._note(section, f"[{section.type}] lacks '{key}': {default}, as in Darknet", severity="warning")
        return len(self._errors()) == before

    def _unknown_key(self, section: Section, key: str, rule: Rule) -> str:
        """Note it and return the key that was probably meant.

        A close misspelling of a key that is not there is an error; what Darknet passes over as well is a warning.
        """
        if len(self.problems) > MAX_PROBLEMS:  # to look for what was meant takes time
            raise CfgError(*self.problems, section.problem(f"more than {MAX_PROBLEMS} problems", key, "is this a cfg?"))
        text, message = section.options[key].text, f"unknown key '{clip(key)}' in [{section.type}]"
        close = [name for name in difflib.get_close_matches(key, rule.known, 3, MISSPELT) if name not in section]
        if close:
            hint = f"did you mean '{close[0]}'? Darknet does not read '{clip(key)}' either"
            self._note(section, message, hint, key, fix=f"{close[0]}={text}")
            return close[0]
        self._note(section, message, "Darknet does not read it either", key, "warning", fix=f"# {key}={text}")
        return ""

    def _check_net(self, net: Section) -> bool:
        required = ("inputs",) if "inputs" in net else ("width", "height", "channels")
        sound = self._check_keys(net, replace(NET, required=required))
        if not sound:
            return False
        batch, subdivisions = net.int("batch", 1), net.int("subdivisions", 1)
        if subdivisions > batch:
            self._note(net, f"subdivisions={subdivisions} is more than batch={batch}", key="subdivisions")
        steps, scales = net.ints("steps", ()), net.floats("scales", ())
        if net.str("policy", "constant") == "steps" and len(steps) != len(scales):
            self._note(
                net, f"{len(steps)} steps but {len(scales)} scales", key="scales" if "scales" in net else "steps"
            )
        return True

    # ---- shapes

    def _image(self, shape: Shape) -> LayerSpec:
        self._spend(self.cfg.net, "width", 0, shape)
        return LayerSpec(index=-1, section=self.cfg.net, inputs=(), in_shapes=(), shape=shape)

    def _layer(self, index: int, section: Section, image: LayerSpec | None) -> LayerSpec | None:
        rule = SECTIONS[section.type]
        inputs = self._inputs(index, section, rule.reads)
        sources = [image if number == -1 else self.specs[number] for number in inputs]
        if None in sources:
            return None
        made = rule.infer(section, sources)
        self._spend(section, None, made.params, made.shape)
        floats = 0 if section.flag("dontload") else made.params if made.floats is None else made.floats
        shapes = tuple(source.shape for source in sources)
        if section.type == "shortcut" and len({shape[1:] for shape in shapes}) > 1:
            message = f"a larger layer is added every {max(s[1] for s in shapes) // shapes[0][1]} pixels"
            self._note(section, message, "as the first Darknet did", "from", "warning")
        return LayerSpec(
            index=index,
            section=section,
            inputs=inputs,
            in_shapes=shapes,
            shape=made.shape,
            params=made.params,
            floats=floats,
            flops=made.flops,
        )

    def _inputs(self, index: int, section: Section, reads: str) -> tuple[int, ...]:
        """Absolute indices of what the layer reads; -1 is the image."""
        key, previous = READS[reads]
        named = [self._absolute(index, section, key, number) for number in (section.ints(key) if key else ())]
        return (*([index - 1] if previous else []), *named)

    def _absolute(self, index: int, section: Section, key: str, number: int) -> int:
        absolute = index + number if number < 0 else number
        if absolute < 0:
            raise section.error(f"{section.type} {number} from layer {index} points before layer 0", key)
        if absolute == index:
            raise section.error(f"{section.type} {number} from layer {index} points to itself", key)
        if absolute > index:
            last = f"the last layer is {len(self.cfg.layers) - 1}"
            raise section.error(f"{section.type} {number} from layer {index} points forward", key, last)
        return absolute

    def _spend(self, section: Section, key: str | None, params: int, shape: Shape) -> None:
        """Refuse sizes that cannot be meant, before anything is allocated."""
        for what, new in (("parameters", params), ("values per image", math.prod(shape))):
            if self.spent[what] + new > BUDGET[what]:
                raise section.error(f"too large: {self.spent[what] + new:,} {what}, the limit is {BUDGET[what]:,}", key)
            self.spent[what] += new

    # ---- heads

    def _check_head(self, index: int) -> None:
        section, spec = self.cfg.layers[index], self.specs[index]
        if spec is None:
            return
        for source, shape, needed in zip(spec.inputs, spec.in_shapes, head_filters(section)):
            self._check_filters(section, source, shape[0], needed)
        if "anchors" in SECTIONS[section.type].required:
            self._check_anchors(section)
        if section.flag("new_coords"):
            self._check_logistic(section, self.cfg.layers[index - 1])

    def _check_filters(self, head: Section, source: int, found: int, needed: int) -> None:
        if found == needed:
            return
        convolution = feeding_convolution(self.cfg, source)
        if convolution is None:
            raise head.error(f"[{head.type}] reads {found} channels, needs {needed}", hint="a convolution before it")
        message = f"filters={convolution.int('filters')}, [{head.type}] line {head.line} needs {needed}"
        alone = len(head_filters(head)) == 1
        hint = "anchors in mask * (classes + values)" if alone else "boxes 4, objectness 1, classes"
        key = "filters" if "filters" in convolution else None
        self._note(convolution, message, hint, key, fix=f"filters={needed}")

    def _check_anchors(self, section: Section) -> None:
        pairs, num = len(head_anchors(section)), section.int("num")
        if pairs > num:
            found = f"{pairs} anchors, but num={num}: mask may name all of them"
            fix = f"num={pairs}" if "mask" in section else None  # without a mask num says how many are used
            self._note(section, found, "Darknet reads past its table", "num", "warning", fix)
        if section.type != "region" and "mask" not in section:
            self._note(section, f"no mask: all {section.int('num')} anchors", severity="warning")

    def _check_logistic(self, head: Section, before: Section) -> None:
        """A head with new_coords has no sigmoid of its own: the convolution right before it must have it."""
        if before.type != "convolutional":
            raise head.error(f"new_coords=1 after [{before.type}]", "new_coords", "a logistic convolution must feed it")
        if before.str("activation", "logistic") != "logistic":
            message = f"activation={before.str('activation')}, [{head.type}] line {head.line} has new_coords=1"
            fix = "activation=logistic"
            self._note(before, message, f"new_coords needs {fix}", "activation", fix=fix)

    def _check_heads_together(self, heads: tuple[int, ...]) -> None:
        self._check_stages([self.cfg.layers[i] for i in heads])
        classes = [self.cfg.layers[i] for i in heads if self.sound[i + 1] and "classes" in self.cfg.layers[i]]
        for section in classes[1:]:
            if section.int("classes") != classes[0].int("classes"):
                found = f"classes={section.int('classes')}, but {classes[0].int('classes')} at line "
                self._note(section, f"{found}{classes[0].options['classes'].line}", key="classes")
        specs = [self.specs[i] for i in heads if self.specs[i]]
        if not specs:
            return
        for key, size, axis in (("height", self.height, 1), ("width", self.width, 2)):
            cells = min(spec.shape[axis] for spec in specs)
            if size % cells:
                found = f"{key}={size} is not a multiple of the largest stride: {cells} cells"
                self._note(self.cfg.net, found, "cells then differ in size", key, "warning")

    def _check_stages(self, heads: list[Section]) -> None:
        """[rpn], [roi] and perhaps [mask] make a network together, and with no other head."""
        found = {section.type: section for section in reversed(heads)}
        staged = [section for kind, section in found.items() if kind in STAGES]
        if not staged:
            return
        for kind in STAGES[:2]:
            if kind not in found:
                self._note(
                    staged[-1], f"[{staged[-1].type}] without [{kind}]", "two stages: [rpn] proposes, [roi] decides"
                )
        for section in (section for kind, section in found.items() if kind not in STAGES):
            self._note(
                section, f"[{section.type}] beside [{staged[-1].type}]", "one-stage and two-stage heads do not mix"
            )
        for kind in STAGES[1:]:
            for section in [section for section in heads if section.type == kind][1:]:
                self._note(section, f"a second [{kind}], the first is at line {found[kind].line}")

    def _check_shared(self, index: int, section: Section) -> None:
        if not self.sound[index + 1]:
            return
        absolute = self._absolute(index, section, "share_index", section.int("share_index"))
        owner, spec = self.specs[absolute], self.specs[index]
        if owner is None or spec is None:
            return
        if weights_of(owner) != weights_of(spec):
            line = owner.section.line
            raise section.error(f"share_index: layer {absolute} (line {line}) has other weights", "share_index")

    # ---- what the network returns

    def _last_computing(self) -> tuple[int, ...]:
        for index in range(len(self.cfg.layers) - 1, -1, -1):
            if self.cfg.layers[index].type not in NOT_AN_OUTPUT:
                return (index,)
        return ()

    def _last_use(self, outputs: tuple[int, ...]) -> tuple[int, ...]:
        last = list(range(len(self.specs)))
        for spec in filter(None, self.specs):
            for source in spec.inputs:
                if source >= 0:
                    last[source] = spec.index
        for index in outputs:
            last[index] = len(last)
        return tuple(last)

    def _errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == "error"]

    def _note(self, section, message, hint="", key=None, severity="error", fix=None) -> None:
        self.problems.append(section.problem(message, key, hint, severity, fix))


def weights_of(spec: LayerSpec) -> tuple:
    """What two convolutions must agree in to share their arrays."""
    section = spec.section
    if section.type != "convolutional":
        return (section.type,)
    keys = ("filters", "size", "groups", "batch_normalize", "group_normalize", "binary", "xnor", "cbn")
    return (section.type, spec.in_shapes[0][0], *(section.int(key, int(key in ("size", "groups"))) for key in keys))

"""Darknet's cfg text <-> sections, with file:line in every complaint. Imports no torch.

What Darknet's reader does is done here too, but said aloud (a warning with file:line): text after a value is dropped,
spaces inside a value vanish (``61,45  61,45`` is ``61,4561,45``), the first of two equal keys wins. What Darknet would
guess at is an error: ``filters=16.5`` (it reads 16), ``filters=sixteen`` (0), ``a=1=2``, and the same key with two
different values outside ``[net]`` (other readers take the last one). Which keys and sections exist is not known here:
see `models.rules`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from models.section import CfgError, Option, Problem, Section, clip, raise_errors
from utils.errors import UserError
from utils.files import read_bytes

ALIASES = {
    "network": "net",
    "conv": "convolutional",
    "deconv": "deconvolutional",
    "max": "maxpool",
    "avg": "avgpool",
    "local_avg": "local_avgpool",
    "conn": "connected",
    "soft": "softmax",
    "lrn": "normalization",
    "silence": "empty",
}
MAX_BYTES = 1 << 20  # the longest known cfg has 50 kB
MAX_SECTIONS = 4000  # the longest known cfg has about 800; a generated one of 20 000 is a mistake or an attack

_TEXT_AFTER_NUMBER = re.compile(r"(?<=[0-9.])\s+[^\s0-9.,+-].*$")
_COMMENT = re.compile(r"[#;]")
_SPACE_INSIDE = re.compile(r"(?<=[^\s,])\s+(?=[^\s,])")


@dataclass(frozen=True, eq=False)
class Cfg:
    """A whole file: ``net`` and the layers (layer 0 is the section after ``[net]``), its text, and what was noticed."""

    path: str
    net: Section
    layers: tuple[Section, ...]
    text: str
    problems: tuple[Problem, ...] = ()

    @property
    def warnings(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "warning")

    @property
    def width(self) -> int:
        return self.net.int("width") if "inputs" not in self.net else 1

    @property
    def height(self) -> int:
        return self.net.int("height") if "inputs" not in self.net else 1

    @property
    def channels(self) -> int:
        return self.net.int("channels") if "inputs" not in self.net else self.net.int("inputs")

    @property
    def has_masks(self) -> bool:
        """Whether the network outlines objects, so that its data must, too."""
        return any(section.type == "mask" for section in self.layers)

    def with_lines(self, lines: dict[int, str]) -> Cfg:
        """A new cfg in which each given line (1-based) has another text, which may be several lines."""
        texts = self.text.split("\n")
        for number, text in lines.items():
            ending = "\r" if texts[number - 1].endswith("\r") else ""
            texts[number - 1] = text.replace("\n", ending + "\n") + ending
        return parse_cfg("\n".join(texts), self.path, strict=False)

    def with_options(self, changes: list[tuple[Section, str, object]]) -> Cfg:
        """A new cfg with ``section.key = value`` for each change; comments and all other text stay."""
        texts, lines = self.text.split("\n"), {}
        for section, key, value in changes:
            number = section.options[key].line if key in section else section.line
            old = lines.get(number, texts[number - 1].rstrip("\r"))
            if key in section:
                left, right = old.split("=", 1)
                start = len(right) - len(right.lstrip())
                comment = re.search(r"\s*[#;].*$", right)
                lines[number] = f"{left}={right[:start]}{value}{comment.group() if comment else ''}"
            else:
                lines[number] = f"{old}\n{key}={value}"
        return self.with_lines(lines)


def read_cfg(path, strict: bool = True) -> Cfg:
    """Read a cfg file: see `decode_cfg`. Errors: no such file, a folder, a pipe, unreadable; then those of that."""
    return decode_cfg(read_bytes(path, "a Darknet cfg", MAX_BYTES + 1), str(path), strict)


def decode_cfg(data: bytes, path: str, strict: bool = True) -> Cfg:
    """The bytes of a cfg: UTF-8 (with or without BOM), else Latin-1.

    Errors: too large, UTF-16 or binary; then those of `parse_cfg`.
    """
    if len(data) > MAX_BYTES:
        raise UserError(path, f"larger than {MAX_BYTES >> 20} MiB, expected a Darknet cfg", "is this a weights file?")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise UserError(f"{path}:{line}", "a NUL byte", "save it as UTF-8 text" if utf16 else "not a text file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        note = Problem(path, line, "warning", "not UTF-8: read as Latin-1")
        cfg = parse_cfg(data.decode("latin-1"), path, strict)
        return replace(cfg, problems=(note, *cfg.problems))
    return parse_cfg(text, path, strict)


def parse_cfg(text: str, path: str = "<text>", strict: bool = True) -> Cfg:
    """Split the text into sections (one pass, linear).

    With ``strict=False`` errors that leave something to go on with are returned in ``Cfg.problems`` (that is what the
    linter does, and how a file is read exactly as Darknet would).
    """
    reader = _Reader(path)
    text = text.removeprefix("\ufeff")
    for number, raw in enumerate(text.split("\n"), 1):
        reader.read(number, raw)
    sections, note = reader.sections, reader.note
    if not sections:
        raise CfgError(
            Problem(path=path, line=1, severity="error", message="no [net] section", hint="is the file empty?")
        )
    if sections[0].type != "net":
        note(sections[0].line, f"the first section is [{clip(sections[0].type)}], expected [net]")
        sections.insert(0, Section("net", sections[0].line, path))
    for section in sections[1:]:
        if section.type == "net":
            note(section.line, f"a second [net], the first is at line {sections[0].line}", "one network per file")
    if len(sections) == 1:
        note(sections[0].line, "no layer after [net]")
    problems = tuple(sorted(reader.problems, key=lambda problem: problem.line))
    if strict:
        raise_errors(problems)
    return Cfg(path, sections[0], tuple(s for s in sections[1:] if s.type != "net"), text, problems)


def write_cfg(cfg: Cfg) -> str:
    """The plain text of a cfg: one key per line, no comments; reads back as the same sections."""
    blocks = []
    for section in (cfg.net, *cfg.layers):
        blocks.append("\n".join([f"[{section.type}]", *(f"{o.key}={o.written}" for o in section.options.values())]))
    return "\n\n".join(blocks) + "\n"


class _Reader:
    """Line by line: sections so far and what was noticed."""

    def __init__(self, path: str):
        self.path, self.sections, self.problems = path, [], []

    def note(self, line: int, message: str, hint: str = "", severity: str = "error", fix: str | None = None) -> None:
        self.problems.append(Problem(self.path, line, severity, message, hint, fix))

    def error(self, line: int, message: str, hint: str = "") -> CfgError:
        return CfgError(*self.problems, Problem(self.path, line, "error", message, hint))

    def read(self, number: int, raw: str) -> None:
        line = raw.strip()
        if not line or line[0] in "#;":
            return
        if "\0" in line:
            raise self.error(number, "a NUL byte")
        if line[0] == "[":
            self._head(number, line)
        elif not self.sections:
            self.note(number, f"'{clip(line)}' before the first section", "a cfg starts with [net]")
        else:
            self._option(number, line)

    def _head(self, number: int, line: str) -> None:
        name, closed, rest = line[1:].partition("]")
        name = "".join(name.split())
        if not closed or not name:
            self.note(number, f"'{clip(line)}': no closing ']'", fix=None if not name or "=" in name else f"[{name}]")
        elif rest.strip():
            fix = f"# {rest.strip().lstrip('#; ')}\n[{name}]"
            severity = "warning" if rest.strip()[0] in "#;" else "error"
            self.note(number, f"text after [{clip(name)}]", "Darknet would not know this section", severity, fix)
        if len(self.sections) > MAX_SECTIONS:
            raise self.error(number, f"more than {MAX_SECTIONS} sections")
        self.sections.append(Section(ALIASES.get(name, name), number, self.path))

    def _option(self, number: int, line: str) -> None:
        section = self.sections[-1]
        content, comment = _cut_comment(line)
        key, equals, value = content.partition("=")
        key, value = "".join(key.split()), value.strip()
        if not equals or not key:
            self.note(number, f"'{clip(line)}': expected key=value", "comments start with #")
            return
        if "=" in value:
            self.note(number, f"'{clip(line)}': two '=' in one line", "one key=value per line")
            return
        after = _TEXT_AFTER_NUMBER.search(value)
        if after:
            value, comment = value[: after.start()], after.group().strip() + (f" {comment}" if comment else "")
        if not value:
            self.note(number, f"'{clip(key)}' has no value")
            return
        text = "".join(value.split())
        option = Option(key, text, number, value)
        if text != value and (words := option.joined):
            fix = f"{key}={_SPACE_INSIDE.sub(',', value)}" if "," in value else None
            found = f"{clip(key)}: '{clip(' '.join(words))}' is read as '{clip(''.join(words))}', as Darknet does"
            self.note(number, found, "a missing comma?", "warning", fix)
        elif comment:
            fix = f"# {comment.lstrip('#; ')}\n{key}={value}"
            hint = "move the comment to its own line"
            if not re.fullmatch(r"[0-9.,+\-eE]+", text):
                hint += f"; Darknet reads '{clip(text + ''.join(comment.split()))}'"
            self.note(number, f"{clip(key)}: text after the value: read as '{clip(text)}'", hint, "warning", fix)
        self._store(section, option)

    def _store(self, section: Section, option: Option) -> None:
        first = section.options.setdefault(option.key, option)
        if first is option:
            return
        values = f"{clip(first.text)} at line {first.line}, {clip(option.text)} here"
        same = first.text == option.text
        severity = "warning" if same or section.type == "net" else "error"
        hint = (
            "the first one counts, as in Darknet"
            if severity == "warning"
            else "Darknet takes the first, other readers the last"
        )
        fix = f"# {option.key}={option.text}" if severity == "warning" else None
        self.note(option.line, f"'{clip(option.key)}' twice in [{clip(section.type)}]: {values}", hint, severity, fix)


def _cut_comment(line: str) -> tuple[str, str]:
    found = _COMMENT.search(line)
    return (line[: found.start()].rstrip(), line[found.start() :]) if found else (line, "")


# ---- heads: how many channels they need, and another number of classes

HEAD_FILTERS = {  # channels of each layer that a head reads, for so many classes
    "yolo": lambda section, classes: (len(head_mask(section)) * (5 + classes),),  # x, y, w, h, objectness
    "Gaussian_yolo": lambda section, classes: (len(head_mask(section)) * (9 + classes),),  # a sigma for each of them
    "region": lambda section, classes: (len(head_mask(section)) * (section.int("coords", 4) + 1 + classes),),
    "yolox": lambda section, classes: (4, 1, classes),  # boxes, objectness, classes: a layer each, named by from=
    "fcos": lambda section, classes: (4, *([] if len(section.ints("from")) == 2 else [1]), classes),  # or without obj.
    "rpn": lambda section, classes: (len(section.floats("sizes")) * len(section.floats("ratios")) * 5,),
    "roi": lambda section, classes: (),  # a pyramid of any number of channels
    "mask": lambda section, classes: (),
}
WITHOUT_CLASSES = ("rpn",)  # heads that only say "object"
KEEPS_CHANNELS = ("activation", "batchnorm", "dropout", "empty", "local_avgpool", "maxpool", "shortcut", "upsample")


def head_anchors(section: Section) -> tuple[tuple[float, float], ...]:
    """A head's table of anchors: (width, height), in input pixels ([region]: in cells).

    All pairs count, also those beyond ``num`` (Darknet reads past its table then). Where a comma is missing Darknet's
    table comes out short and its last entries are 0.5; so do ours.
    """
    values, num = section.floats("anchors"), section.int("num")
    if section.options["anchors"].joined:
        values = (*values, *[0.5] * max(0, 2 * num - len(values)))
    if len(values) % 2:
        raise section.error(f"{len(values)} anchor values, expected pairs of width,height", "anchors")
    if len(values) < 2 * num:
        raise section.error(
            f"{len(values) // 2} anchors, but num={num} at line {section.options['num'].line}", "anchors"
        )
    if min(values) <= 0:
        raise section.error(f"anchor side {min(values):g}, expected > 0", "anchors")
    return tuple(zip(values[0::2], values[1::2]))


def head_mask(section: Section) -> tuple[int, ...]:
    """Which anchors of the table a head uses, in channel order; without ``mask`` the first ``num``."""
    known = len(head_anchors(section))
    mask = section.ints("mask", tuple(range(section.int("num"))))
    for entry in mask:
        if not 0 <= entry < known:
            raise section.error(f"mask names anchor {entry}, expected 0..{known - 1}", "mask")
    if len(set(mask)) < len(mask):
        raise section.error("mask names an anchor twice", "mask")
    return mask


def head_filters(section: Section, num_classes: int | None = None) -> tuple[int, ...]:
    """How many channels a head needs of each layer it reads; of an anchor head anchors * (classes + values)."""
    if num_classes is None:
        num_classes = 0 if section.type in WITHOUT_CLASSES else section.int("classes")
    return HEAD_FILTERS[section.type](section, num_classes)


def head_sources(cfg: Cfg, index: int) -> tuple[int, ...]:
    """The layers that head ``index`` reads: those of ``from`` where it reads several, else the one before it."""
    section = cfg.layers[index]
    numbers = section.ints("from") if len(head_filters(section)) > 1 else (-1,)
    return tuple(index + number if number < 0 else number for number in numbers)


def feeding_convolution(cfg: Cfg, index: int) -> Section | None:
    """The convolution whose ``filters`` decide the channels that layer ``index`` makes; None where there is none."""
    while index >= 0:
        section = cfg.layers[index]
        if section.type == "convolutional":
            return section
        if section.type == "route" and len(section.ints("layers")) == 1 and section.int("groups", 1) == 1:
            source = section.ints("layers")[0]
            index = source if 0 <= source < index else index + min(source, -1)
        elif section.type in KEEPS_CHANNELS:
            index -= 1
        else:
            return None
    return None


def adapt_classes(cfg: Cfg, num_classes: int) -> tuple[Cfg, list[str]]:
    """The same network for another number of classes: ``classes=`` of every head and ``filters=`` before it.

    Returns the new cfg (text edited in place, comments kept) and one line per change: ``file:line filters 255 -> 24``.
    Errors: fewer than one class, no head, a head that no convolution feeds.
    """
    if num_classes < 1:
        raise cfg.net.error(f"{num_classes} classes, expected at least 1")
    changes = []
    for index, section in enumerate(cfg.layers):
        if section.type in HEAD_FILTERS and section.type not in WITHOUT_CLASSES:
            for source, filters in zip(head_sources(cfg, index), head_filters(section, num_classes)):
                convolution = feeding_convolution(cfg, source)
                if convolution is None and section.int("classes", 0) == num_classes:
                    continue
                if convolution is None:
                    raise section.error(f"no convolution feeds this [{section.type}]: its channels cannot be adapted")
                changes.append((convolution, "filters", filters))
            changes.append((section, "classes", num_classes))
    if not changes:
        raise cfg.net.error("no detection head to adapt", hint=f"known: {', '.join(HEAD_FILTERS)}")
    changes = [change for change in changes if change[0].str(change[1], "1") != str(change[2])]
    lines = []
    for section, key, value in changes:
        old = section.options.get(key)
        lines.append(f"{cfg.path}:{old.line if old else section.line} {key} {old.text if old else 'absent'} -> {value}")
    return (cfg.with_options(changes), lines) if changes else (cfg, lines)

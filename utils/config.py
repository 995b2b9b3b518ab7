"""Text to frozen dataclasses, strictly: an unknown key is an error that names the nearest known one, all problems of a
mapping are reported together, and the declared type converts (YAML reads ``1e-3`` as a string).
"""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

import yaml

from utils.errors import UserError, nearest
from utils.files import read_bytes

if TYPE_CHECKING:  # a recipe pulls in torch and OpenCV; reading a data yaml must not
    from utils.datasets.augment import Augment
    from utils.optim import Optim

T = TypeVar("T")

RECIPES = Path(__file__).resolve().parents[1] / "cfg" / "hyp"
MAX_DEPTH = 20  # of nested YAML; real files use 3
MAX_DIGITS = 100  # of a number; Python refuses to print one of 4300
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Located(dict):
    """A mapping that remembers where each of its keys stands: ``places["lr0"] == "hyp.yaml:7"``."""

    def __init__(self, *args, places: Mapping[str, str] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.places = dict(places or {})


# ---------------------------------------------------------------------------------------------------------------- build


def build(cls: Callable[..., T], mapping: Mapping, where: object) -> T:
    """Call ``cls`` (a keyword-only dataclass, nn.Module or function) with the values of ``mapping``, converted.

    Args:
        cls: its signature says which keys exist, of what type, and which may be left out.
        mapping: plain values; a ``Located`` one gives errors their line.
        where: what to blame otherwise: a file, or a section of one.

    Raises:
        UserError: unknown or missing keys, values that do not convert, all of them at once; or a ValueError of ``cls``
            itself (a range check).
    """
    if not isinstance(mapping, Mapping):
        raise UserError(where, f"expected key: value pairs, found {mapping!r}")
    parameters = inspect.signature(cls, eval_str=True).parameters
    places = getattr(mapping, "places", {})
    values, problems = {}, []
    for key, value in mapping.items():
        place = places.get(key, str(where))
        if key not in parameters:
            problems.append((place, f"unknown key '{key}', {nearest(key, parameters)}"))
            continue
        try:
            values[key] = convert(parameters[key].annotation, value, f"{place}: {key}")
        except UserError as error:
            problems.append((str(error.where), error.message))
        except ValueError as error:
            problems.append((place, f"{key}: {error}"))
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in mapping:
            problems.append((str(where), f"missing key '{key}'"))
    if problems:
        raise join_problems(problems)
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(where, str(error)) from error


def join_problems(problems: list[tuple[str, str]]) -> UserError:
    """One error that says all of them; the first place leads, the others stand beside their problem."""
    (first, message), rest = problems[0], problems[1:]
    return UserError(
        first, "; ".join([message, *(f"{place}: {text}" if place != first else text for place, text in rest)])
    )


def convert(declared: Any, value: Any, where: str = "") -> Any:
    """``value`` as the declared type; ValueError says what was expected and what was found."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if declared in (Any, inspect.Parameter.empty):
        return value
    if dataclasses.is_dataclass(declared):
        return build(declared, value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(inner, value, where)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"expected one of {', '.join(map(str, inner))}, found {value!r}, {nearest(value, inner)}")
        return value
    if declared in (tuple, list) or origin in (tuple, list):
        return _convert_sequence(origin or declared, inner, value, where)
    if declared in (dict, Mapping) or origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"expected key: value pairs, found {value!r}")
        return value
    if declared not in CONVERTERS:
        raise TypeError(f"{where}: no conversion to {declared}")
    return CONVERTERS[declared](value)


def _convert_union(members, value, where):
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "~")):
        if type(None) in members:
            return None
        raise ValueError("a value is missing")
    problems = []
    for member in members:
        if member is type(None):
            continue
        try:
            return convert(member, value, where)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(" or ".join(problems))


def _convert_sequence(kind, inner, value, where):
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a list, found {value!r}")
    if not inner:
        return kind(value)
    if kind is list or (len(inner) == 2 and inner[1] is Ellipsis):
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        raise ValueError(f"expected {len(inner)} values, found {len(value)}")
    return kind(convert(one, item, where) for one, item in zip(inner, value))


def _to_float(value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"expected a number, found {value!r}")
    try:
        number = float(value)
    except ValueError as error:
        raise ValueError(f"expected a number, found {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, found {value!r}")
    return number


def _to_int(value) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _to_float(value)
    if number != int(number):
        raise ValueError(f"expected a whole number, found {value!r}")
    return int(number)


def _to_bool(value) -> bool:
    word = str(value).lower()
    if word not in WORDS:
        raise ValueError(f"expected true or false, found {value!r}")
    return WORDS[word]


def _to_str(value) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {value!r} (quote it)")
    return value


CONVERTERS = {float: _to_float, int: _to_int, bool: _to_bool, str: _to_str}

# ----------------------------------------------------------------------------------------------------------------- yaml


class _Loader(yaml.SafeLoader):
    """Plain values only; tags, aliases, double keys and deep nesting are refused. A date is text."""

    def __init__(self, text: str, path: str):
        self.path, self.depth = path, 0
        super().__init__(text)

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise self.error(self.peek_event().start_mark, "aliases (*name) are refused", "write the value out")
        if self.peek_event().tag is not None:
            raise self.error(self.peek_event().start_mark, f"tags ({self.peek_event().tag}) are refused", "remove it")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(self.peek_event().start_mark, f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node, deep=False):
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise self.error(node.start_mark, f"a number of {len(node.value)} digits")
        try:
            return super().construct_object(node, deep)
        except UserError:
            raise
        except (ValueError, OverflowError) as error:  # 0x_
            raise self.error(node.start_mark, f"not a number: {node.value!r}") from error

    def error(self, mark, message, hint="") -> UserError:
        return UserError(f"{self.path}:{mark.line + 1}", message, hint)

    def construct_located(self, node):
        result = Located()
        yield result
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float)):
                raise self.error(key_node.start_mark, f"a key must be a word or a number, found {key!r}")
            place = f"{self.path}:{key_node.start_mark.line + 1}"
            if key in result:
                raise UserError(place, f"'{key}' is given twice, first on line {result.places[key].rsplit(':', 1)[1]}")
            result[key] = self.construct_object(value_node, deep=True)
            result.places[key] = place


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_located)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_str)


def parse_yaml(text: str, path: object = "<text>") -> Any:
    """Plain values of a YAML text; mappings come as ``Located``. Raises UserError with path:line."""
    try:
        return _Loader(text, str(path)).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}", f"not YAML: {error.problem}") from error
    except yaml.YAMLError as error:  # characters YAML does not allow
        raise UserError(path, f"not YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: str | Path) -> Located:
    """The mapping in a YAML file, with the line of every key. Raises UserError for anything else."""
    path = Path(path)
    try:
        text = read_bytes(path, "YAML").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(path, "not UTF-8 text") from error
    data = parse_yaml(text, path)
    if not isinstance(data, Located):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise UserError(path, f"expected key: value lines, found {found}")
    return data


# --------------------------------------------------------------------------------------------------------------- recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is taught: the four sections of ``cfg/hyp/*.yaml``."""

    assigner: Mapping[str, Any]  # name, and what that assigner takes
    loss: Mapping[str, Any]  # name, and what that loss takes
    optim: "Optim"
    augment: "Augment"

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values: for a checkpoint's header and the run's ``recipe.yaml``."""
        sections = {"assigner": dict(self.assigner), "loss": dict(self.loss)}
        for name in ("optim", "augment"):
            sections[name] = dataclasses.asdict(getattr(self, name))
        return _plain(sections)


def _plain(value):
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, or one of ``cfg/hyp`` by name, and apply ``--set`` overrides in order.

    ``assigner=simota`` replaces the section by that name alone, ``optim.lr0=0.01`` sets one key, and ``lr0=0.01`` too
    where only one section knows it.
    """
    candidates = [Path(path), RECIPES / str(path), RECIPES / f"{path}.yaml"]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        names = [file.stem for file in RECIPES.glob("*.yaml")]
        raise UserError(path, "no such recipe", nearest(Path(path).stem, names))
    data = read_yaml(found)
    for override in overrides:
        apply_override(data, override)
    return make_recipe(data, found)


def make_recipe(data: Mapping, where: object) -> Recipe:
    """A recipe from plain values. Whether assigner and loss know their keys is checked where these are built."""
    from utils.datasets.augment import Augment
    from utils.optim import Optim

    defaults = {"optim": Optim(), "augment": Augment()}

    def sections(
        *, assigner: dict, loss: dict, optim: Optim = defaults["optim"], augment: Augment = defaults["augment"]
    ):
        return Recipe(assigner=assigner, loss=loss, optim=optim, augment=augment)

    recipe = build(sections, data, where)
    for section in ("assigner", "loss"):
        if not isinstance(data[section].get("name"), str):
            raise UserError(getattr(data, "places", {}).get(section, where), f"{section} has no name")
    return recipe


def apply_override(data: Located, override: str) -> None:
    """Change ``data`` by one ``key=value``, ``section.key=value`` or ``assigner=name``."""
    place = f"--set {override}"
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(place, "expected key=value")
    value, name = parse_yaml(text, place), name.strip()
    if name in ("assigner", "loss"):
        data[name] = Located(name=value, places={"name": place})
        return
    section, dot, key = name.partition(".")
    if not dot:
        section, key = _section_of(data, name, place), name
    if section not in (known := _known_keys(data)):
        raise UserError(place, f"unknown section '{section}'", nearest(section, known))
    values = data.setdefault(section, Located())
    values[key] = value
    values.places[key] = place


def _known_keys(data: Mapping) -> dict[str, set[str]]:
    from utils.datasets.augment import Augment
    from utils.optim import Optim

    keys = {section: set(data.get(section) or ()) - {"name"} for section in ("assigner", "loss")}
    return keys | {
        "optim": {field.name for field in dataclasses.fields(Optim)},
        "augment": {field.name for field in dataclasses.fields(Augment)},
    }


def _section_of(data: Mapping, key: str, place: str) -> str:
    known = _known_keys(data)
    owners = [section for section, keys in known.items() if key in keys]
    if not owners:
        everything = set().union(*known.values())
        raise UserError(place, f"unknown hyper-parameter '{key}'", nearest(key, everything))
    if len(owners) > 1:
        choices = " or ".join(f"{section}.{key}" for section in owners)
        raise UserError(place, f"'{key}' stands in several sections", f"say {choices}")
    return owners[0]

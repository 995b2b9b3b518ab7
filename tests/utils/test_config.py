"""Strictness: whatever a person gets wrong is named, with its line and the nearest right word."""

from dataclasses import dataclass
from typing import Literal

import pytest

from utils.config import Located, apply_override, build, make_recipe, parse_yaml, read_recipe, read_yaml
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    lr0: float
    kind: Literal["sgd", "adam"] = "sgd"
    steps: tuple[float, ...] = (0.5,)
    size: tuple[int, int] = (1, 2)
    limit: int | None = None
    flag: bool = False
    inner: Inner = Inner()

    def __post_init__(self):
        if self.lr0 <= 0:
            raise ValueError(f"lr0 must be > 0, found {self.lr0}")


def test_declared_types_convert():
    mapping = {
        "lr0": "1e-3",
        "steps": "0.1, 0.2",
        "size": [3.0, "4"],
        "limit": "none",
        "flag": "yes",
        "inner": {"depth": "7"},
    }
    found = build(Options, mapping, "x")
    assert found == Options(lr0=1e-3, steps=(0.1, 0.2), size=(3, 4), limit=None, flag=True, inner=Inner(depth=7))
    assert isinstance(found.size[0], int)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"lr": 1.0, "lr0": 1}, "unknown key 'lr', did you mean 'lr0'?"),
        ({}, "missing key 'lr0'"),
        ({"lr0": "fast"}, "lr0: expected a number, found 'fast'"),
        ({"lr0": True}, "expected a number"),
        ({"lr0": "nan"}, "finite"),
        ({"lr0": -1}, "must be > 0"),
        ({"lr0": 1, "limit": 1.5}, "expected a whole number"),
        ({"lr0": 1, "kind": "adan"}, "did you mean 'adam'?"),
        ({"lr0": 1, "size": [1]}, "expected 2 values, found 1"),
        ({"lr0": 1, "flag": "perhaps"}, "expected true or false"),
        ({"lr0": 1, "inner": {"deep": 1}}, "unknown key 'deep'"),
        ({"lr0": 1, "inner": 3}, "expected key: value pairs"),
    ],
)
def test_wrong_values_are_named(mapping, message):
    with pytest.raises(UserError, match=r"^recipe") as error:
        build(Options, mapping, "recipe")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_come_together_with_their_lines(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("lr0: fast\n\nkindd: 1\nlimit: 0.5\n")
    with pytest.raises(UserError) as error:
        build(Options, read_yaml(path), path)
    text = str(error.value)
    assert f"{path}:1: lr0" in text and f"{path}:3: unknown key 'kindd'" in text and f"{path}:4: limit" in text


def test_build_takes_modules_and_functions():
    def make(*, alpha: float, beta: int = 2):
        return alpha * beta

    assert build(make, {"alpha": "1.5"}, "x") == 3.0


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\na: 2\n", 2, "given twice, first on line 1"),
        ("a: &x [1]\nb: *x\n", 2, "aliases"),
        ("a: " + "[" * 5000, 1, "nested deeper"),
        ("a: !!python/object/apply:os.system ['true']\n", 1, "tag"),
        ("\ta: 1\n", 1, "not YAML"),
        ("a: [1\nb: 2\n", 2, "not YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path, text, line, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and message in str(error.value)


@pytest.mark.parametrize("data", [b"", b"- 1\n", b"word", b"a: \x00", b"\xff\xfe\xfa"])
def test_files_that_are_no_mapping(tmp_path, data):
    path = tmp_path / "x.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x.yaml"):
        read_yaml(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no such file"):
        read_yaml(tmp_path / "none.yaml")


def recipe_data() -> Located:
    return parse_yaml(
        "assigner: {name: wh_iou, iou_thres: 0.2}\nloss: {name: yolo}\noptim: {lr0: 0.1}\naugment: {}\n", "r"
    )


def test_overrides():
    data = recipe_data()
    for override in ("lr0=0.5", "optim.momentum=0.8", "mosaic=1", "iou_thres=0.3", "steps=[0.1, 0.2]"):
        apply_override(data, override)
    recipe = make_recipe(data, "r")
    assert (recipe.optim.lr0, recipe.optim.momentum, recipe.augment.mosaic) == (0.5, 0.8, 1.0)
    assert recipe.optim.steps == (0.1, 0.2)
    assert recipe.assigner == {"name": "wh_iou", "iou_thres": 0.3}
    apply_override(data, "assigner=simota")
    assert make_recipe(data, "r").assigner == {"name": "simota"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("momentun=0.1", "did you mean 'momentum'?"),
        ("lr0", "expected key=value"),
        ("optin.lr0=1", "did you mean 'optim'?"),
        ("optim.lr=1", "unknown key 'lr'"),
        ("lr0=-3", "must be > 0"),
        ("lr0=[1", "not YAML"),
    ],
)
def test_wrong_overrides(override, message):
    data = recipe_data()
    with pytest.raises(UserError) as error:
        apply_override(data, override)
        make_recipe(data, "r")
    assert message in str(error.value)


def test_recipe_survives_the_checkpoint():
    recipe = make_recipe(recipe_data(), "r")
    assert make_recipe(recipe.as_dict(), "again") == recipe


def test_recipe_without_name():
    with pytest.raises(UserError, match=r"r:2: loss has no name"):
        make_recipe(parse_yaml("assigner: {name: x}\nloss: {gain: 1}\n", "r"), "r")


def test_unknown_recipe():
    with pytest.raises(UserError, match=r"no such recipe"):
        read_recipe("nonesuch")

"""One ``[section]`` of a cfg with typed, strict getters, and what is said when it is wrong. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from utils.errors import UserError, printable

INT32 = 2**31 - 1  # the numbers of a cfg are C ints
MAX_SHOWN = 20
REQUIRED = object()

_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a file; ``fix`` is the text that line should have, where that is beyond doubt."""

    path: str
    line: int
    severity: str  # "error" | "warning"
    message: str
    hint: str = ""
    fix: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class CfgError(UserError):
    """One or several problems of a cfg; its text has one ``file:line: message`` per problem."""

    def __init__(self, *problems: Problem):
        self.problems = problems
        first = problems[0]
        super().__init__(f"{first.path}:{first.line}", first.message, first.hint)
        self.args = (listing(problems),)


def listing(problems: tuple[Problem, ...]) -> str:
    """One line per problem; beyond the first ones, where to see the rest."""
    lines = [printable(problem) for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        lines.append(f"and {len(problems) - MAX_SHOWN} more: python -m models.lint {problems[0].path}")
    return "\n".join(lines)


def raise_errors(problems) -> None:
    """Raise the errors among ``problems`` together, by line."""
    errors = sorted((problem for problem in problems if problem.severity == "error"), key=lambda problem: problem.line)
    if errors:
        raise CfgError(*errors)


@dataclass(frozen=True)
class Option:
    """One ``key=text`` as Darknet reads it: no spaces, no text after the value."""

    key: str
    text: str
    line: int
    written: str  # the value with its spaces

    @property
    def joined(self) -> tuple[str, ...]:
        """The words that became one because spaces vanish: a comma may be missing."""
        return next((words for item in self.written.split(",") if len(words := tuple(item.split())) > 1), ())


@dataclass(frozen=True, eq=False)
class Section:
    """One ``[section]`` with typed, strict getters. Every getter raises `CfgError` with file:line."""

    type: str
    line: int
    path: str
    options: dict[str, Option] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self.options

    def problem(self, message, key=None, hint="", severity="error", fix=None) -> Problem:
        """A problem at the line of ``key``, or of the section's head."""
        line = self.options[key].line if key in self.options else self.line
        return Problem(self.path, line, severity, message, hint, fix)

    def error(self, message: str, key: str | None = None, hint: str = "") -> CfgError:
        return CfgError(self.problem(message, key, hint))

    def int(self, key: str, default=REQUIRED) -> int:
        return self._get(key, default, self._to_int)

    def float(self, key: str, default=REQUIRED) -> float:
        return self._get(key, default, self._to_float)

    def flag(self, key: str, default: bool = False) -> bool:
        """Non-zero integers are true."""
        return bool(self.int(key, int(default)))

    def str(self, key: str, default=REQUIRED, choices=None) -> str:
        value = self._get(key, default, lambda key, text: text)
        if choices is not None and value not in choices:
            raise self.error(f"{key}={clip(value)}", key, f"known: {', '.join(choices)}")
        return value

    def ints(self, key: str, default=REQUIRED) -> tuple[int, ...]:
        return self._get(key, default, lambda key, text: tuple(self._to_int(key, item) for item in _items(text)))

    def floats(self, key: str, default=REQUIRED) -> tuple[float, ...]:
        return self._get(key, default, lambda key, text: tuple(self._to_float(key, item) for item in _items(text)))

    def _get(self, key, default, convert):
        if key not in self.options:
            if default is REQUIRED:
                raise self.error(f"[{self.type}] lacks '{key}'")
            return default
        return convert(key, self.options[key].text)

    def _to_int(self, key, text):
        if not _INT.fullmatch(text):
            raise self.error(f"{key}={clip(text)}: not an integer", key)
        value = int(text) if len(text) <= 12 else INT32 + 1
        if abs(value) > INT32:
            raise self.error(f"{key}={clip(text)}: does not fit in 32 bits", key)
        return value

    def _to_float(self, key, text):
        if not _FLOAT.fullmatch(text) or not math.isfinite(float(text)):
            raise self.error(f"{key}={clip(text)}: not a finite number", key)
        return float(text)


def clip(value: object, length: int = 40) -> str:
    """A value as it may stand in a message: one line, printable, short."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= length else text[:length] + "..."


def _items(text: str) -> list[str]:
    """The items of a list; a trailing comma adds none."""
    return text.removesuffix(",").split(",")

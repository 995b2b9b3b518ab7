"""The doctor's nouns: a data set as the checks see it, and what they find."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from utils.datasets.lookalikes import Look
from utils.datasets.records import DataSet
from utils.errors import UserError
from utils.structures import Record

ERROR, WARNING, NOTE = "error", "warning", "note"  # stops a training or makes its numbers lies; costs quality; to know
SEVERITIES = (ERROR, WARNING, NOTE)


class Found(NamedTuple):
    """A box that a network found."""

    box: tuple[float, float, float, float]  # xyxy, pixels of the original
    caption: str


class Shown(NamedTuple):
    """A picture to show, and which boxes it is about; none: the whole picture with all of them."""

    record: Record
    rows: tuple[int, ...] = ()  # of its annotated boxes
    found: tuple[Found, ...] = ()


class Place(NamedTuple):
    """One case of a finding."""

    where: str  # file or file:line
    text: str
    shown: tuple[Shown, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to look at."""

    severity: str  # one of SEVERITIES
    title: str
    places: tuple[Place, ...] = ()
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Exam:
    """A data set as the checks see it."""

    sets: tuple[DataSet, ...]
    looks: dict[str, Look | UserError]  # by path
    size: tuple[int, int]  # (H, W) of the network's input

    def records(self) -> Iterator[tuple[DataSet, Record]]:
        return ((data, record) for data in self.sets for record in data.records)

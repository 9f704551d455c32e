"""What a picture shows, as numbers and words. Nothing here is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from flexgen_bench.core.digits import settled
from flexgen_bench.core.status import Evidence

Range = tuple[float, float]


class Better(StrEnum):
    """Which end of an axis is the good one."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = ""


@dataclass(frozen=True)
class Axis:
    title: str
    unit: str
    log: bool = False
    better: Better = Better.NEITHER

    @property
    def text(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Source:
    """Where a number comes from. record: the file, seen from the results folder; of a prediction the file that holds
    it. run_id is empty for a prediction."""

    run_id: str
    spec_hash: str
    record: str


@dataclass(frozen=True)
class Point:
    """x_range, y_range: smallest and largest, as the record's interval has them; None where no spread is known. label:
    what tells it from the others of its series."""

    x: float
    y: float
    x_range: Range | None
    y_range: Range | None
    label: str
    source: Source


@dataclass(frozen=True)
class Failure:
    """A run that gave no number where the others did."""

    x: float
    status: str
    reason: str
    source: Source


@dataclass(frozen=True)
class Series:
    """Points of one kind of run. joined: whether a line through them means something."""

    system: str
    lossy: str
    evidence: Evidence
    points: Sequence[Point]
    joined: bool = False
    failures: Sequence[Failure] = ()
    # What the series is of besides: the machine, where several are in a picture.
    of: str = ""

    @property
    def label(self) -> str:
        """The system, and what makes its results differ; then what else it is of."""
        name = f"{self.system} ({self.lossy})" if self.lossy else self.system
        return f"{name}, {self.of}" if self.of else name


@dataclass(frozen=True)
class Guide:
    """A line (or a single place) to read the points by: a front, a diagonal. stepped: between two of its points it
    keeps the height of the first."""

    label: str
    points: Sequence[tuple[float, float]]
    stepped: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    guides: Sequence[Guide] = ()


@dataclass(frozen=True)
class Picture:
    """facts: what all its points have in common, in words: machine, hardware, model, workload. key: unique, and safe as
    a file's name. notes: what a reader must know to read it, a sentence each."""

    name: str
    key: str
    title: str
    facts: Mapping[str, str]
    panels: Sequence[Panel]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Found:
    """What records gave. missing: for each picture that could not be made what it lacks, in sentences."""

    pictures: tuple[Picture, ...] = ()
    missing: tuple[str, ...] = ()


def point(x: float, y: float, label: str, source: Source, *, x_range: Range | None, y_range: Range | None) -> Point:
    """With the digits that every machine agrees on, so that ties and orders are the same everywhere."""
    return Point(settled(x), settled(y), _settled(x_range), _settled(y_range), label, source)


def _settled(ends: Range | None) -> Range | None:
    return None if ends is None else (settled(ends[0]), settled(ends[1]))

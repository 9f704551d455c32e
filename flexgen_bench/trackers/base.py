"""What a tracker must offer: somewhere to send runs that are already safe on disk, as they happen.

What is sent is made of records and moments by the other files here, the same for every tracker: a tracker only carries
it. So another one is a file with these four methods, its entry in ``registry.py`` and a YAML in ``conf/tracker``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

# A scalar of a row, a summary or a table: a number, text, true or false.
Value = Any


@dataclass(frozen=True)
class TrackedTable:
    """A table: names of columns, and rows of as many values."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Value | None]]


@dataclass(frozen=True)
class TrackedFile:
    """A file to keep with a run: one that is there (``path``), or its ``text``."""

    name: str
    path: str = ""
    text: str = ""


@dataclass(frozen=True)
class TrackedRun:
    """One run as it begins: a cell, an accuracy run of one mode, or a suite's summary.

    id: the same whenever the same thing is sent again, which replaces what was there. group: the suite. kind: "cell",
    "accuracy" or "suite". tables: what is known beforehand, such as the plan.
    """

    id: str
    name: str
    group: str
    kind: str
    tags: Sequence[str]
    config: Mapping[str, Any]
    tables: Mapping[str, TrackedTable] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackedResult:
    """A run as it ends. ok: whether it is a result. rows: of its history, besides those that were logged. pictures: SVG
    texts by name."""

    ok: bool
    summary: Mapping[str, Value]
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    rows: Sequence[Mapping[str, Value]] = ()
    tables: Mapping[str, TrackedTable] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[TrackedFile] = ()


class Tracker(Protocol):
    """A sink for runs, one at a time. The record on disk stays the truth: a tracker that cannot do its work says once
    on standard error what was lost and never raises, so that no run is lost or held up by it.
    """

    def begin(self, run: TrackedRun) -> None:
        """A run begins; nothing of it is measured before this returns."""

    def log(self, row: Mapping[str, Value]) -> None:
        """Add a row to the history of the run that has begun. A measurement is running: must not wait."""

    def end(self, result: TrackedResult) -> None:
        """The run that has begun is over, and its record is written."""

    def close(self) -> None:
        """Nothing follows; a run that has begun and not ended was interrupted. May be called more than once."""

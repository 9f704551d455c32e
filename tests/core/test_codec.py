"""Dataclasses as JSON and back: what a field may say of its stored form, and errors that name the field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pytest

from flexgen_bench.core.codec import OMITTED, from_json, inlined, to_json
from flexgen_bench.core.errors import UserError


class Place(StrEnum):
    NEAR = "near"
    FAR = "far"


def even(value: Any, at: str) -> Any:
    if int(value) % 2:
        raise UserError(at, value, "even")
    return int(value)


Even = Annotated[int, even]


@dataclass(frozen=True)
class Part:
    size: int
    share: float = 1.0
    name: str = field(default="", metadata=OMITTED)


@dataclass(frozen=True)
class Whole:
    parts: Mapping[Place, Part] = field(metadata=inlined(Place.NEAR, Place.FAR))
    where: Path
    place: Place
    rates: Mapping[Even, float] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    samples: Sequence[float] = ()
    best: float | None = None
    free: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = field(default_factory=list, metadata=OMITTED)


WHOLE = Whole(
    parts={Place.FAR: Part(3, 0.5, "far one"), Place.NEAR: Part(1)},
    where=Path("/a/b"),
    place=Place.FAR,
    rates={2: 1.0, 16: 2.5},
    sizes=(1, 2),
    samples=(1.0,),
    free={"b": [1, None, {"x": True}], "a": "text"},
)
STORED = {
    "far": {"size": 3, "share": 0.5, "name": "far one"},
    "near": {"size": 1, "share": 1.0},
    "where": "/a/b",
    "place": "far",
    "rates": {"2": 1.0, "16": 2.5},
    "sizes": [1, 2],
    "samples": [1.0],
    "best": None,
    "free": {"b": [1, None, {"x": True}], "a": "text"},
}


def test_what_is_written_reads_back_equal() -> None:
    assert to_json(WHOLE) == STORED
    assert list(to_json(WHOLE, sort_keys=True)["free"]) == ["a", "b"]
    for complete in (False, True):
        assert from_json(Whole, json.loads(json.dumps(STORED)), "whole", complete=complete) == WHOLE


def test_what_is_equal_is_written_alike() -> None:
    """A hash of a spec is a hash of its text: 600 seconds are 600.0 seconds."""
    assert Part(1, 2) == Part(1, 2.0)
    assert json.dumps(to_json(Part(1, 2))) == json.dumps(to_json(Part(1, 2.0)))


def test_a_default_may_be_missing_but_for_complete_documents() -> None:
    assert from_json(Part, {"size": 1}, "part") == Part(1)
    with pytest.raises(UserError, match=r"part\.share = None: must be given"):
        from_json(Part, {"size": 1}, "part", complete=True)


def test_a_number_that_is_not_finite_is_unknown_or_refused() -> None:
    known = STORED | {"best": float("nan"), "free": {"x": float("inf")}}
    read = from_json(Whole, known, "whole")
    assert read.best is None
    assert read.free == {"x": None}
    with pytest.raises(UserError, match=r"whole\.samples\[0\] = nan: must be a finite number"):
        from_json(Whole, STORED | {"samples": [float("nan")]}, "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"near": {}}, r"whole\.near\.size = None: must be given\. whole\.near states all of size"),
        ({"near": {"size": 1, "colour": 2}}, r"whole\.near\.colour = 2: must be left out"),
        ({"near": 3}, r"whole\.near = 3: must be a mapping of size, share, name"),
        ({"there": {}}, r"whole\.there = \{\}: must be left out"),
        ({"place": "fur"}, r"whole\.place = 'fur': must be one of far, near\. Did you mean 'far'\?"),
        ({"place": None}, r"whole\.place = None: must be given"),
        ({"where": 1}, r"whole\.where = 1: must be text"),
        ({"rates": {"3": 1.0}}, r"whole\.rates = '3': must be even"),
        ({"rates": {"2": "1"}}, r"whole\.rates\.2 = '1': must be a number"),
        ({"sizes": 1}, r"whole\.sizes = 1: must be a list"),
        ({"sizes": [1, True]}, r"whole\.sizes\[1\] = True: must be an integer"),
        ({"free": {"x": [Path("y")]}}, r"whole\.free\.x\[0\] = PosixPath\('y'\): must be text, a number"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_by_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_json(Whole, STORED | change, "whole")

"""The Pareto front: what nothing else beats in both respects."""

from __future__ import annotations

from collections.abc import Iterable

from flexgen_bench.pictures.picture import Point


def front(points: Iterable[Point]) -> list[Point]:
    """Points that no other one equals or beats in x (lower is better) and y (higher is better) at once, by x. Of equal
    ones the first."""
    kept: list[Point] = []
    for candidate in sorted(points, key=lambda p: (p.x, -p.y)):
        if not kept or candidate.y > kept[-1].y:
            kept.append(candidate)
    return kept

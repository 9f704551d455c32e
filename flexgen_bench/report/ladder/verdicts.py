"""Who is faster on which rung of a ladder, how sure that is, and where it changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from flexgen_bench.core.status import Status
from flexgen_bench.report.cells import number
from flexgen_bench.report.ladder.rungs import OURS, Figure, Ladder, Point


class Standing(Enum):
    """Of this engine among the systems of a rung."""

    AHEAD = "ahead"
    BEHIND = "behind"
    UNDECIDED = "undecided"  # both were repeated, and the intervals overlap
    ALONE = "alone"  # others were tried and did not end well
    OUT = "out"  # it was tried and did not end well, and another did
    NOBODY = "nobody"  # all that were tried did not end well
    UNTRIED = "untried"  # it, or everybody else, was not tried, or is not installed


@dataclass(frozen=True)
class Verdict:
    """Of one rung, among systems whose weights have as many bits. ratio: this engine's tokens/s over the best other
    one's; low, high: of the repetitions of both, where both were repeated."""

    share: float
    standing: Standing
    ours: Point | None = None
    rival: Point | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


def verdicts(ladder: Ladder, bits: int) -> list[Verdict]:
    """One for each rung, from the smallest share."""
    return [_verdict(share, ladder.at(bits, share)) for share in ladder.shares if ladder.at(bits, share)]


def sentences(found: Sequence[Verdict]) -> Iterator[str]:
    """What the verdicts come to, in words; what is bad for this engine is said like what is good."""
    ahead = [v for v in found if v.standing is Standing.AHEAD]
    if ahead:
        ratios = sorted(v.ratio for v in ahead if v.ratio is not None)
        much = f"{number(ratios[0])}x" + (f" to {number(ratios[-1])}x" if len(ratios) > 1 else "")
        yield f"{OURS} is faster than every other system at {_percents(ahead)}: {much} the best of them."
    for verdict in found:
        if verdict.standing is Standing.BEHIND and verdict.rival and verdict.ratio:
            rival = verdict.rival.label
            yield f"At {percent(verdict.share)} {rival} is faster: {number(1 / verdict.ratio)}x {OURS}."
    undecided = [v for v in found if v.standing is Standing.UNDECIDED]
    if undecided:
        yield f"Undecided at {_percents(undecided)}: the intervals of the two fastest overlap."
    for standing, text in (
        (Standing.ALONE, f"no system that was tried runs but {OURS}"),
        (Standing.OUT, f"{OURS} does not run, and others do"),
        (Standing.NOBODY, "nothing that was tried runs"),
        (Standing.UNTRIED, f"nothing is compared: only {OURS} was tried, or only others"),
    ):
        such = [v for v in found if v.standing is standing]
        if such:
            yield f"At {_percents(such)} {text}."
    yield from _crossovers(found)


def percent(share: float) -> str:
    """``0.25`` -> ``25 %``."""
    return f"{share * 100:.6g} %"


def _crossovers(found: Sequence[Verdict]) -> Iterator[str]:
    decided = [v for v in found if v.standing in (Standing.AHEAD, Standing.BEHIND)]
    for below, above in itertools.pairwise(decided):
        if below.standing is not above.standing:
            first = OURS if below.standing is Standing.AHEAD else below.rival and below.rival.label
            then = OURS if above.standing is Standing.AHEAD else above.rival and above.rival.label
            between = f"between {percent(below.share)} and {percent(above.share)}"
            yield f"The crossover is {between}: {first} is the fastest below it, {then} above."


def _percents(found: Sequence[Verdict]) -> str:
    texts = [f"{v.share * 100:.6g}" for v in found]
    return f"{' and '.join(filter(None, [', '.join(texts[:-1]), texts[-1]]))} %"


def _verdict(share: float, points: Sequence[Point]) -> Verdict:
    tried = [p for p in points if p.status is not Status.UNAVAILABLE]
    ours = _fastest([p for p in tried if p.is_ours])
    rival = _fastest([p for p in tried if not p.is_ours])
    if len({p.is_ours for p in tried}) < 2:
        return Verdict(share, Standing.UNTRIED, ours, rival)
    if ours is None or rival is None:
        alone = Standing.ALONE if ours else Standing.OUT if rival else Standing.NOBODY
        return Verdict(share, alone, ours, rival)
    mine, theirs = ours.figure, rival.figure
    assert mine is not None, "it ran"
    assert theirs is not None, "it ran"
    ratio = mine.value / theirs.value
    low, high = _bounds(mine, theirs)
    if low is not None and high is not None and low <= 1 <= high:
        standing = Standing.UNDECIDED
    else:
        standing = Standing.AHEAD if ratio >= 1 else Standing.BEHIND
    return Verdict(share, standing, ours, rival, ratio, low, high)


def _bounds(mine: Figure, theirs: Figure) -> tuple[float, float] | tuple[None, None]:
    if mine.low is None or mine.high is None or theirs.low is None or theirs.high is None:
        return None, None
    return mine.low / theirs.high, mine.high / theirs.low


def _fastest(points: Sequence[Point]) -> Point | None:
    """Of those that ran."""
    ran = [point for point in points if point.figure is not None]
    return max(ran, key=lambda point: point.figure.value if point.figure else 0.0, default=None)

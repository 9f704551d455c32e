"""Ladders as Markdown: a table for each width of the weights, and what it comes to in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import format_bytes
from flexgen_bench.report.cells import MARKS, STATUS_WORDS, UNKNOWN, number
from flexgen_bench.report.ladder.rungs import Ladder, Point
from flexgen_bench.report.ladder.verdicts import Verdict, percent, sentences, verdicts
from flexgen_bench.report.table import escape

_UNCOMPRESSED = 16  # bits
_MEMORY = {Tier.GPU: "GPU memory", Tier.CPU: "Host memory", Tier.DISK: "Disk"}
# Whether a cap holds the process itself is the first question to such a table (docs/notes/ladder.md).
_HOST_CAP = (
    "A cap on host memory holds all of a cell's processes: Python, torch and what else the system loads, buffers, "
    "weights, KV cache, and the page cache of the files it reads. Nothing is added for the process itself."
)
_GPU_CAP = (
    "A cap on GPU memory is on what torch's allocator may hold; the driver's context lies outside, for everyone. A "
    "system that allocates by itself (llama.cpp) is asked to fit, and nothing enforces it."
)
_PREDICTED = (
    "In predictions the rivals' models keep 3 GB of host memory for their process (0.5 GB without a GPU), this "
    "engine's none: below some gigabytes of host memory compare with care."
)


def ladder_lines(ladders: Sequence[Ladder], title: str = "## Ladder") -> list[str]:
    """A section of a page; empty where there is no ladder."""
    if not ladders:
        return []
    lines = [title, ""]
    for ladder in ladders:
        lines += _ladder(ladder)
    return [*lines, *_legend(ladders), ""]


def _ladder(ladder: Ladder) -> Iterator[str]:
    fixed = "".join(f", {_MEMORY[Tier(tier)]} at {percent(share)} of them" for tier, share in ladder.fixed.items())
    what = f"{_MEMORY[ladder.tier]} at shares of the weights ({format_bytes(ladder.weight_bytes)} uncompressed){fixed}"
    yield from (f"**{escape(ladder.heading)}**", "", f"{escape(what)}:", "")
    caps = {point.share: point.cap_bytes for point in ladder.points}
    for bits in ladder.widths:
        found = verdicts(ladder, bits)
        shown = [f"{percent(share)} ({format_bytes(caps[share])})" for share in ladder.shares]
        # Of a compressed run it is known what it was allowed to: a system may choose less.
        width = f"{bits}-bit weights" if bits >= _UNCOMPRESSED else f"{bits}-bit weights allowed"
        yield _line([f"{width}, tok/s", *shown])
        yield _line("---" for _ in range(1 + len(shown)))
        of_rung = {verdict.share: verdict for verdict in found}
        labels = dict.fromkeys(p.label for p in ladder.points if p.bits == bits)
        for label in sorted(labels, key=lambda one: _order(ladder, one)):
            places = (_at(ladder, bits, share, label) for share in ladder.shares)
            yield _line([escape(label), *(_text(point, of_rung) for point in places)])
        yield _line(["ratio to the best other", *(_ratio(of_rung.get(share)) for share in ladder.shares)])
        yield ""
        below = [*sentences(found), *_doubts(ladder, bits)]
        yield from (*(f"- {escape(line)}" for line in below), "")


def _order(ladder: Ladder, label: str) -> tuple[bool, str]:
    ours = any(point.is_ours for point in ladder.points if point.label == label)
    return not ours, label


def _at(ladder: Ladder, bits: int, share: float, label: str) -> Point | None:
    return next((point for point in ladder.at(bits, share) if point.label == label), None)


def _text(point: Point | None, of_rung: dict[float, Verdict]) -> str:
    if point is None:
        return UNKNOWN
    figure, mark = point.figure, MARKS[point.evidence]
    if figure is None:
        return STATUS_WORDS[point.status]
    verdict = of_rung[point.share]
    fastest = max((p for p in (verdict.ours, verdict.rival) if p is not None), key=_value)
    text = number(figure.value) + (f" ({mark})" if mark else "")
    text = f"**{text}**" if fastest is point else text
    details = [f"batch {point.batch_size}"] if point.batch_size is not None else []
    if figure.low is not None and figure.high is not None:
        details.append(f"{number(figure.low)} to {number(figure.high)}, n={figure.n}")
    elif figure.n:
        details.append(f"n={figure.n}")
    return f"{text} ({'; '.join(details)})" if details else text


def _value(point: Point) -> float:
    return point.figure.value if point.figure is not None else 0.0


def _ratio(verdict: Verdict | None) -> str:
    if verdict is None or verdict.ratio is None:
        return UNKNOWN
    assert verdict.rival is not None
    spread = ""
    if verdict.low is not None and verdict.high is not None:
        spread = f", {number(verdict.low)} to {number(verdict.high)}"
    return f"{number(verdict.ratio)}x {escape(verdict.rival.label)}{spread}"


def _doubts(ladder: Ladder, bits: int) -> Iterator[str]:
    """What a reader must know of some of the figures."""
    points = [point for point in ladder.points if point.bits == bits]
    loose = [p for p in points if p.figure is not None and not p.enforced]
    if loose:
        yield f"The cap was not enforced: {_named(loose)}."
    for label in dict.fromkeys(p.label for p in points):
        ended = [p for p in points if p.label == label and p.figure is None]
        for status in dict.fromkeys(p.status for p in ended):
            at = sorted((p for p in ended if p.status is status), key=lambda p: p.share)
            reason = _first_line(at[-1].reason)  # of the largest share: what would be needed is nearest there
            shares = ", ".join(percent(p.share) for p in at)
            yield f"{label} at {shares}: {STATUS_WORDS[status]}" + (f": {reason}" if reason else "")


def _named(points: Iterable[Point]) -> str:
    return ", ".join(f"{point.label} at {percent(point.share)}" for point in points)


def _first_line(reason: str) -> str:
    return reason.splitlines()[0].rstrip(".") if reason else ""


def _legend(ladders: Sequence[Ladder]) -> list[str]:
    points = [point for ladder in ladders for point in ladder.points]
    tiers = {ladder.tier for ladder in ladders} | {Tier(tier) for ladder in ladders for tier in ladder.fixed}
    kinds = {point.evidence for point in points}
    bases: dict[str, int] = {}
    for point in points:
        if point.base_bytes is not None:
            bases[point.label] = max(bases.get(point.label, 0), point.base_bytes)
    lines = [
        "Generated tokens / (prefill + decode time), each system at its best of the batch sizes that were tried; in "
        "bold the fastest of a rung. Shares are of the weights in the cell's dtype, also where they are compressed.",
        _HOST_CAP if Tier.CPU in tiers else "",
        _GPU_CAP if Tier.GPU in tiers else "",
        _PREDICTED if Evidence.SIMULATED in kinds and Tier.CPU in tiers else "",
    ]
    if bases:
        named = ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(bases.items()))
        lines.append(f"Of that the process alone, before anything of the model is loaded: {named}.")
    marks = [f"({MARKS[kind]}) = {kind.value}" for kind in Evidence if kind in kinds and MARKS[kind]]
    lines.append(f"{', '.join(marks)}." if marks else "All figures are MEASURED.")
    return [escape(" ".join(filter(None, lines)))]


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"

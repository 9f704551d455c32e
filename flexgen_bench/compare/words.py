"""A comparison in words, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from flexgen_bench.compare.pairs import Matched
from flexgen_bench.compare.ratio import Ratio
from flexgen_bench.compare.sides import Side
from flexgen_bench.compare.verdict import Judged
from flexgen_bench.core.digits import TIMED, significant
from flexgen_bench.core.metrics import DEFINITIONS


def to_text(a: Side, b: Side, matched: Matched, judged: Sequence[Judged], margin: float) -> str:
    """What a person reads: the worst first, then what could not be compared, then the count."""
    lines = [f"A: {a.name}", f"B: {b.name}", ""]
    order = ("worse", "undecided", "better", "the same")
    for cell in sorted(judged, key=lambda cell: (order.index(cell.verdict), cell.pair.title)):
        lines += _cell(cell)
    for name, only in (("A", matched.only_a), ("B", matched.only_b)):
        lines += [f"only in {name}: {title}" for title in only]
    for name, side in (("A", a), ("B", b)):
        lines += [f"not usable in {name}: {problem.path}: {problem.message}" for problem in side.problems]
    counts = Counter(str(cell.verdict) for cell in judged)
    total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict]) or "no cell on both sides"
    lines += ["", f"{total} (margin {100 * margin:g} %, 95 % intervals)"]
    return "\n".join(lines)


def to_json(sides: tuple[Side, Side], matched: Matched, judged: Sequence[Judged], margin: float) -> dict[str, Any]:
    """The same for programs."""
    return {
        "margin": margin,
        "cells": [
            {
                "title": cell.pair.title,
                "verdict": str(cell.verdict),
                "why": cell.why,
                "metric": cell.metric,
                "values": cell.values,
                "unit": DEFINITIONS[cell.metric].unit,
                "ratio": None if cell.ratio is None else [cell.ratio.value, cell.ratio.low, cell.ratio.high],
                "of": None if cell.ratio is None else cell.ratio.of,
                "counts": None if cell.ratio is None else cell.ratio.counts,
                "notes": list(cell.notes),
                "records": [[stored.record.run_id for stored in side] for side in (cell.pair.a, cell.pair.b)],
            }
            for cell in judged
        ],
        "only_a": list(matched.only_a),
        "only_b": list(matched.only_b),
        "problems": [[problem.message for problem in side.problems] for side in sides],
    }


def _cell(cell: Judged) -> list[str]:
    lines = [f"{cell.verdict}: {cell.pair.title}"]
    if cell.ratio is not None and cell.values is not None:
        first, second = (significant(value, TIMED) for value in cell.values)
        unit = DEFINITIONS[cell.metric].unit
        lines.append(f"    {cell.metric}: {first} -> {second} {unit}, {_ratio(cell.ratio)}; {cell.why}")
    else:
        lines.append(f"    {cell.why}")
    return lines + [f"    {note}" for note in cell.notes]


def _ratio(ratio: Ratio) -> str:
    a, b = ratio.counts
    of = f"{a} {ratio.of}" if ratio.of == "rounds" else f"{a} and {b} {ratio.of}"
    if ratio.low is None or ratio.high is None:
        return f"x{significant(ratio.value, 3)} ({of})"
    low, middle, high = (significant(value, 3) for value in (ratio.low, ratio.value, ratio.high))
    return f"x{middle} ({low} to {high}, {of})"

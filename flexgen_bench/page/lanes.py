"""What every lane did in a traced run, as the page draws it: exact steps where they are wide enough, else shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.timeline import Slice, Timeline
from flexgen_bench.page.gather import PageRow
from flexgen_bench.store.trace import read_trace
from flexgen_bench.trace.chart import COLOURS
from flexgen_bench.trace.passes import find_passes, typical
from flexgen_bench.trace.summary import Waiting, summarise

_MOST_STEPS = 1500  # drawn one by one in a panel; more are narrower than a pixel
_BINS = 300
_OTHER = "#bbbbbb"


def lanes(of: PageRow) -> dict[str, Any] | None:
    """The lanes of a run; None where no trace was kept, ``{"problem": ...}`` where it cannot be used."""
    stored = of.row.stored
    if not stored.record.trace:
        return None
    path = stored.path.parent / stored.record.trace
    try:
        trace = read_trace(path)
    except StoreError as error:
        return {"problem": str(error)}
    if trace.spec_hash != stored.record.spec_hash:
        return {"problem": f"{path} is the trace of another cell. Measure the cell again."}
    return picture(trace.timeline)


def picture(timeline: Timeline) -> dict[str, Any]:
    """Figures of each lane, and what it did in the whole repetition and in a typical pass of each kind. Seconds."""
    steps = {name: list(lane) for name, lane in timeline.lanes.items() if len(lane)}
    if not steps:
        return {"problem": "the trace holds no steps"}
    kinds = sorted({s.kind for of_lane in steps.values() for s in of_lane}, key=_order)
    summary = summarise(timeline)
    begin = min(of_lane[0].begin_s for of_lane in steps.values())
    passes = find_passes(timeline)
    spans = [("Whole repetition", begin, begin + summary.wall_s)]
    for one in typical(passes):
        what = "Prefill and decode" if one.prefills and one.decodes else "Prefill" if one.prefills else "Decode"
        spans.append((f"{what}: pass {one.number} of {len(passes)}", one.begin_s, one.end_s))
    return {
        "wall_s": summary.wall_s,
        "kinds": kinds,
        "colours": [COLOURS.get(kind, _OTHER) for kind in kinds],
        "lanes": [
            {"lane": x.lane, "steps": x.steps, "busy_s": x.busy_s, "bytes": x.bytes if x.is_link else None}
            | {"limit": x.bytes_per_s}
            for x in summary.lanes
        ],
        "by_kind": [
            {"lane": lane, "kind": kind, "steps": count, "seconds": seconds}
            for lane, kind, count, seconds in summary.kinds
        ],
        "waiting": _waiting(summary.waiting),
        "dropped": summary.dropped,
        "panels": [_panel(name, first, last, begin, steps, kinds) for name, first, last in spans],
    }


def _order(kind: str) -> tuple[int, str]:
    known = list(COLOURS)
    return (known.index(kind) if kind in COLOURS else len(known), kind)


def _waiting(waiting: Waiting | None) -> str:
    """What the busiest lane waited for, in a sentence."""
    if waiting is None:
        return ""
    others = [f"{share:.0%} {name}" for name, share in sorted(waiting.others.items(), key=lambda item: -item[1])]
    told = ", ".join(text for text in [*others, f"{waiting.nobody:.0%} nobody"] if not text.startswith("0%"))
    return f"{waiting.lane} was idle for {waiting.idle_s:.3g} s; busy in that time: {told}."


def _panel(
    name: str, first: float, last: float, begin: float, steps: dict[str, list[Slice]], kinds: Sequence[str]
) -> dict[str, Any]:
    """first, last: the span on the timeline's clock; the page gets times since the span began."""
    inside = {lane: [s for s in of_lane if s.end_s > first and s.begin_s < last] for lane, of_lane in steps.items()}
    exact = sum(map(len, inside.values())) <= _MOST_STEPS
    places = {kind: place for place, kind in enumerate(kinds)}
    draw = _exact if exact else _shares
    return {
        "name": name,
        "from_s": first - begin,
        "span_s": last - first,
        "exact": exact,
        "lanes": {lane: draw(of_lane, first, last, places) for lane, of_lane in inside.items()},
    }


def _exact(steps: Sequence[Slice], first: float, last: float, places: dict[str, int]) -> list[list[float]]:
    """[kind, begin in s, seconds, unit, micro-batch] of every step, cut at the span's ends."""

    def row(s: Slice) -> list[float]:
        begin, end = max(s.begin_s, first), min(s.end_s, last)
        return [places[s.kind], _us(begin - first), _us(end - begin), s.unit, s.micro_batch_index]

    return [row(s) for s in steps]


def _shares(steps: Sequence[Slice], first: float, last: float, places: dict[str, int]) -> list[list[float]]:
    """[bin, kind, share of the bin] wherever a kind worked."""
    width = (last - first) / _BINS
    bins: list[dict[int, float]] = [{} for _ in range(_BINS)]
    for s in steps:
        begin, end = max(s.begin_s, first) - first, min(s.end_s, last) - first
        for place in range(int(begin / width), min(_BINS, int(end / width) + 1)):
            covered = min(end, (place + 1) * width) - max(begin, place * width)
            if covered > 0:
                bins[place][places[s.kind]] = bins[place].get(places[s.kind], 0.0) + covered / width
    return [[b, kind, round(share, 3)] for b, of_bin in enumerate(bins) for kind, share in sorted(of_bin.items())]


def _us(seconds: float) -> float:
    return round(seconds, 6)

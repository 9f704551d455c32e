"""What a timeline says in figures: who was busy, who waited for whom, and how fast the links were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexgen_bench.core.tiers import Lane
from flexgen_bench.core.timeline import Slice, Timeline
from flexgen_bench.core.units import GB, format_bytes

Intervals = list[tuple[float, float]]  # seconds, in order, not overlapping


@dataclass(frozen=True)
class LaneSummary:
    """One lane. busy_s: seconds it worked; bytes_per_s: the throttle of an emulated link, None for none."""

    lane: str
    steps: int
    busy_s: float
    bytes: int
    bytes_per_s: float | None
    is_link: bool


@dataclass(frozen=True)
class Waiting:
    """What the busiest lane waited for: seconds it was idle, and of these the share in which others were busy."""

    lane: str
    idle_s: float
    others: dict[str, float]
    nobody: float


@dataclass(frozen=True)
class Summary:
    """The figures of a timeline. wall_s: from the first step's begin to the last one's end."""

    wall_s: float
    lanes: tuple[LaneSummary, ...]
    kinds: tuple[tuple[str, str, int, float], ...]  # lane, kind, steps, seconds; longest first
    waiting: Waiting | None
    dropped: int


def summarise(timeline: Timeline) -> Summary:
    """Every figure of a timeline; lanes that did nothing are left out."""
    steps = {lane: list(of_lane) for lane, of_lane in timeline.lanes.items() if len(of_lane)}
    if not steps:
        return Summary(0.0, (), (), None, timeline.dropped)
    begin = min(of_lane[0].begin_s for of_lane in steps.values())
    end = max(of_lane[-1].end_s for of_lane in steps.values())
    lanes = tuple(
        LaneSummary(
            lane,
            len(of_lane),
            sum(s.seconds for s in of_lane),
            sum(s.bytes for s in of_lane),
            timeline.lanes[lane].bytes_per_s,
            Lane.parse(lane).is_link,
        )
        for lane, of_lane in steps.items()
    )
    busiest = max(lanes, key=lambda lane: lane.busy_s).lane
    return Summary(
        wall_s=end - begin,
        lanes=lanes,
        kinds=_by_kind(steps),
        waiting=_waiting(busiest, {lane: busy(of_lane) for lane, of_lane in steps.items()}, begin, end),
        dropped=timeline.dropped,
    )


def _by_kind(slices: dict[str, list[Slice]]) -> tuple[tuple[str, str, int, float], ...]:
    steps: dict[tuple[str, str], int] = defaultdict(int)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for lane, of_lane in slices.items():
        for s in of_lane:
            steps[lane, s.kind] += 1
            seconds[lane, s.kind] += s.seconds
    longest = sorted(seconds, key=lambda key: -seconds[key])
    return tuple((lane, kind, steps[lane, kind], seconds[lane, kind]) for lane, kind in longest)


def busy(slices: Iterable[Slice]) -> Intervals:
    """When a lane worked; steps that follow each other at once are joined."""
    joined: Intervals = []
    for s in slices:
        if joined and s.begin_s <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], s.end_s))
        elif s.end_s > s.begin_s:
            joined.append((s.begin_s, s.end_s))
    return joined


def gaps(intervals: Intervals, begin: float, end: float) -> Intervals:
    """What ``intervals`` leave free between ``begin`` and ``end``."""
    edges = [begin, *(t for interval in intervals for t in interval), end]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [(a, b) for a, b in pairs if b > a]


def overlap(first: Intervals, second: Intervals) -> float:
    """Seconds that lie in both."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total


def _waiting(lane: str, working: dict[str, Intervals], begin: float, end: float) -> Waiting:
    idle = gaps(working[lane], begin, end)
    idle_s = sum(b - a for a, b in idle)
    others = {name: spans for name, spans in working.items() if name != lane}
    anybody = _union([span for spans in others.values() for span in spans])

    def share(spans: Intervals) -> float:
        return overlap(idle, spans) / idle_s if idle_s else 0.0

    nobody = 1.0 - share(anybody) if idle_s else 0.0
    return Waiting(lane, idle_s, {name: share(spans) for name, spans in others.items()}, nobody)


def _union(spans: Intervals) -> Intervals:
    joined: Intervals = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def to_text(summary: Summary) -> str:
    """The figures as tables for a terminal."""
    wall = summary.wall_s
    if not summary.lanes:
        return "No lane did anything.\n"
    rows = [["lane", "steps", "busy s", "of wall", "moved", "GB/s busy", "GB/s wall", "limit GB/s"]]
    for lane in summary.lanes:
        moved = [format_bytes(lane.bytes), *(_rate(lane.bytes, s) for s in (lane.busy_s, wall))]
        limit = "-" if lane.bytes_per_s is None else f"{lane.bytes_per_s / GB:.2f}"
        link = Lane.parse(lane.lane).link.name
        if link != lane.lane:
            limit = f"of {link}"
        links = [*moved, limit] if lane.is_link else ["-"] * 4
        rows.append([lane.lane, str(lane.steps), f"{lane.busy_s:.3f}", _percent(lane.busy_s, wall), *links])
    parts = [f"Wall time {wall:.3f} s\n\n{_table(rows, left=1)}"]
    rows = [["lane", "kind", "steps", "seconds", "of wall"]]
    rows += [[ln, kind, str(n), f"{s:.3f}", _percent(s, wall)] for ln, kind, n, s in summary.kinds]
    parts.append(_table(rows, left=2))
    waiting = summary.waiting
    if waiting is not None:
        shares = [f"{share:.1%} {name}" for name, share in waiting.others.items()]
        shares.append(f"{waiting.nobody:.1%} nobody")
        parts.append(
            f"The busiest lane, {waiting.lane}, was idle for {waiting.idle_s:.3f} s ({_percent(waiting.idle_s, wall)} "
            f"of wall); busy in that time: {', '.join(shares)}.\n"
        )
    if summary.dropped:
        parts.append(f"The job's last {summary.dropped} steps are not in the trace, which has a limit.\n")
    return "\n".join(parts)


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds / GB:.2f}" if seconds else "-"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _table(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns aligned by spaces; the first ``left`` ones to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"

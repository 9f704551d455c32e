"""A picture of a run: one row per lane, time to the right, a colour for each kind of step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flexgen_bench.core.machine_name import machine_of
from flexgen_bench.core.tiers import Lane
from flexgen_bench.core.timeline import Slice
from flexgen_bench.core.units import format_seconds
from flexgen_bench.schedule.steps import StepKind
from flexgen_bench.trace.axis import ticks
from flexgen_bench.trace.passes import find_passes, typical
from flexgen_bench.trace.runs import TracedRun
from flexgen_bench.trace.svg import Box, Svg

# Weights blue, KV cache green, hidden states purple, what crosses around attention and experts cyan, compute warm.
COLOURS: dict[str, str] = {
    StepKind.LOAD_WEIGHTS: "#6fa1e0",
    StepKind.LOAD_EXPERTS: "#4c7fc4",
    StepKind.DEQUANTIZE: "#b9d2f2",
    StepKind.LOAD_KV: "#4fb882",
    StepKind.STORE_KV: "#86cfa4",
    StepKind.APPEND_KV: "#bfe3c9",
    StepKind.LOAD_HIDDEN: "#a67fd0",
    StepKind.STORE_HIDDEN: "#d3bfea",
    StepKind.MOVE_QKV: "#45b8c4",
    StepKind.MOVE_ATTENTION: "#86d3db",
    StepKind.MOVE_ROUTED: "#2f96a3",
    StepKind.MOVE_EXPERTS: "#b4e5ea",
    StepKind.GATHER_ROWS: "#7d8a5b",
    StepKind.MOVE_ROWS: "#b6c08f",
    StepKind.EMBED: "#e3c34f",
    StepKind.PROJECT: "#f08a24",
    StepKind.ATTEND: "#e8655d",
    StepKind.OUTPUT: "#f7b267",
    StepKind.LAYER: "#f39a3f",
    StepKind.EXPERTS: "#d9722e",
    StepKind.ADD_EXPERTS: "#fbd3a5",
    StepKind.HEAD: "#c58a5c",
    StepKind.MOVE_LOGITS: "#dcc4b3",
    StepKind.SAMPLE: "#909090",
    StepKind.MOVE_TOKENS: "#b9a795",
    # Between ranks red, tokens pale.
    StepKind.RECV_HIDDEN: "#c44f7a",
    StepKind.MOVE_RECEIVED: "#d98aa6",
    StepKind.ENTER: "#ecc3d2",
    StepKind.LEAVE: "#e8b1c4",
    StepKind.MOVE_LEAVING: "#d1708f",
    StepKind.SEND_HIDDEN: "#a8325d",
    StepKind.SEND_TOKENS: "#c9a0ae",
    StepKind.RECV_TOKENS: "#dcc2cb",
    StepKind.MOVE_PARTIAL: "#9c8bd9",
    StepKind.REDUCE: "#7a63c7",
    StepKind.MOVE_REDUCED: "#c3b8ea",
    StepKind.MLP: "#f5a040",
    StepKind.ADD: "#fbd9b0",
}
_UNKNOWN = "#bbbbbb"

WIDTH, MARGIN, TOP, LEFT, RIGHT = 1240, 16, 76, 96, 72
ROW, BAR = 26, 20  # height of a lane's row, and of what is drawn in it
PLOT = WIDTH - LEFT - RIGHT
MOST_BOXES = 4000  # in one panel; beyond that steps are far narrower than a pixel
_LABEL_WIDTH = 26  # pixels that a unit's number needs


@dataclass(frozen=True)
class Panel:
    """A span of time to draw, from ``begin_s`` to ``end_s``."""

    heading: str
    begin_s: float
    end_s: float

    @property
    def span_s(self) -> float:
        return self.end_s - self.begin_s

    def x(self, time_s: float) -> float:
        """Where a moment lies, in pixels; moments outside lie on the border."""
        share = (time_s - self.begin_s) / self.span_s if self.span_s else 0.0
        return LEFT + min(1.0, max(0.0, share)) * PLOT


def chart(run: TracedRun) -> str:
    """The picture as SVG: the whole run, the first prefill, and a decode pass from its middle."""
    lanes = {name: list(slices) for name, slices in run.timeline.lanes.items() if len(slices)}
    panels = _panels(run, lanes)
    kinds = [k for k in COLOURS if any(s.kind == k for slices in lanes.values() for s in slices)]
    panel_height = 24 + ROW * len(lanes) + 34
    legend_rows = -(-len(kinds) // 8)
    height = TOP + panel_height * len(panels) + 20 * legend_rows + 16 + MARGIN
    svg = Svg(WIDTH, height, run.title)
    svg.text((MARGIN, 26), run.title, size=16, weight="bold")
    svg.text((MARGIN, 44), _subtitle(run), fill="#666666")
    svg.text((MARGIN, 60), machine_of(run.record.environment), fill="#666666")
    top = float(TOP)
    for panel in panels:
        _draw(svg, run, panel, lanes, top)
        top += panel_height
    for i, kind in enumerate(kinds):
        x, y = MARGIN + (i % 8) * 152, top + 20 * (i // 8)
        svg.rect((x, y, 12, 12), COLOURS[kind])
        svg.text((x + 17, y + 10), kind.replace("_", " "))
    svg.text((MARGIN, top + 20 * legend_rows + 10), _key(run), size=11, fill="#666666")
    return svg.to_text()


def _key(run: TracedRun) -> str:
    layers = run.num_layers
    return (
        f"Numbers are units: 0 the embedding, 1 to {layers} the layers, {layers + 1} the head. Where steps are "
        "narrower than "
        "pixels, a colour is as high as its share of the time."
    )


def _subtitle(run: TracedRun) -> str:
    record = run.record
    parts = [f"run {record.run_id}", f"batch {record.batch_size}", "last measured repetition"]
    throttled: dict[str, float] = {}
    for name, lane in run.timeline.lanes.items():
        if lane.bytes_per_s:  # lanes that share a link are throttled together
            throttled[Lane.parse(name).link.name] = lane.bytes_per_s
    parts += [f"{name} throttled to {rate / 1e9:g} GB/s" for name, rate in throttled.items()]
    if run.timeline.dropped:
        parts.append(f"the last {run.timeline.dropped} steps were not kept")
    return ", ".join(parts)


def _panels(run: TracedRun, lanes: dict[str, list[Slice]]) -> list[Panel]:
    if not lanes:
        return []
    begin = min(slices[0].begin_s for slices in lanes.values())
    end = max(slices[-1].end_s for slices in lanes.values())
    panels = [Panel(f"Whole repetition: {_time(end - begin)}", begin, end)]
    passes = find_passes(run.timeline)
    for one in typical(passes):
        what = "Prefill and decode" if one.prefills and one.decodes else "Prefill" if one.prefills else "Decode"
        panels.append(
            Panel(
                f"{what}: pass {one.number} of {len(passes)}, from {_time(one.begin_s - begin)}, "
                f"{_time(one.seconds)} long",
                one.begin_s,
                one.end_s,
            )
        )
    return panels


def _time(seconds: float) -> str:
    return format_seconds(seconds) if seconds >= 10 else f"{seconds * 1000:.4g} ms"


def _draw(svg: Svg, run: TracedRun, panel: Panel, lanes: dict[str, list[Slice]], top: float) -> None:
    svg.text((MARGIN, top + 14), panel.heading, weight="bold")
    top += 24
    bottom = top + ROW * len(lanes)
    for after_s, label in ticks(panel.span_s):
        x = panel.x(panel.begin_s + after_s)
        svg.line((x, top), (x, bottom + 4), "#dddddd")
        svg.text((x, bottom + 17), label, anchor="middle", size=11, fill="#666666")
    shown = {
        name: [s for s in slices if s.end_s > panel.begin_s and s.begin_s < panel.end_s]
        for name, slices in lanes.items()
    }
    exact = sum(map(len, shown.values())) <= MOST_BOXES
    for i, (name, slices) in enumerate(shown.items()):
        y = top + ROW * i + (ROW - BAR) / 2
        svg.text((LEFT - 8, y + 14), name, anchor="end")
        svg.rect((LEFT, y, PLOT, BAR), "#f3f3f3")
        if exact:
            _steps(svg, run, panel, slices, y)
        else:
            _shares(svg, panel, slices, y)
        worked = sum(_inside(panel, s) for s in slices)
        busy = worked / panel.span_s if panel.span_s else 0.0
        svg.text((LEFT + PLOT + 8, y + 14), f"{busy:.0%} busy", size=11, fill="#666666")


def _inside(panel: Panel, s: Slice) -> float:
    """Seconds of a step that lie in the panel."""
    return min(s.end_s, panel.end_s) - max(s.begin_s, panel.begin_s)


def _steps(svg: Svg, run: TracedRun, panel: Panel, slices: Sequence[Slice], y: float) -> None:
    """Every step as a box of its own; wide ones bear their unit's number."""
    for s in slices:
        x, end = panel.x(s.begin_s), panel.x(s.end_s)
        tooltip = f"{run.slice_name(s)}, {s.seconds * 1000:.3f} ms"
        # A sliver of background between neighbours of one kind, where there is room for it.
        width = max(0.3, end - x - (0.5 if end - x > 2 else 0.0))
        svg.rect((x, y, width, BAR), COLOURS.get(s.kind, _UNKNOWN), tooltip)
        if width >= _LABEL_WIDTH:
            svg.text((x + width / 2, y + 14), str(run.number(s.unit)), anchor="middle", size=10)


def _shares(svg: Svg, panel: Panel, slices: Sequence[Slice], y: float) -> None:
    """Steps narrower than pixels: in every column of pixels, a kind is as high as its share of that time."""
    columns: list[dict[str, float]] = [{} for _ in range(PLOT)]
    for s in slices:
        for place, share in _spread(panel, s):
            columns[place][s.kind] = columns[place].get(s.kind, 0.0) + share
    boxes: dict[str, list[Box]] = {}
    for i, column in enumerate(columns):
        bottom = y + BAR
        for kind in sorted(column):
            height = column[kind] * BAR
            bottom -= height
            boxes.setdefault(kind, []).append((LEFT + i, bottom, 1, height))
    for kind, drawn in boxes.items():
        svg.boxes(_joined(drawn), COLOURS.get(kind, _UNKNOWN))


def _spread(panel: Panel, s: Slice) -> Iterator[tuple[int, float]]:
    """(column of pixels, share of its width) that a step covers."""
    begin, end = panel.x(s.begin_s) - LEFT, panel.x(s.end_s) - LEFT
    for column in range(int(begin), min(PLOT, int(end) + 1)):
        yield column, max(0.0, min(end, column + 1) - max(begin, column))


def _joined(boxes: Sequence[Box]) -> list[Box]:
    """Neighbours of the same height as one box."""
    joined: list[Box] = []
    for x, y, width, height in boxes:
        if height < 0.05:
            continue
        if joined:
            last_x, last_y, last_width, last_height = joined[-1]
            same = abs(last_y - y) < 0.05 and abs(last_height - height) < 0.05
            if same and abs(last_x + last_width - x) < 0.01:
                joined[-1] = (last_x, last_y, last_width + width, last_height)
                continue
        joined.append((x, y, width, height))
    return joined

"""Any picture as SVG, as wide as a column of a paper: colour says the system, shape the compression, filling the
evidence, and the legend all three in words. The same picture gives the same bytes (with one version of matplotlib)."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen_bench.core.digits import significant
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.core.status import Evidence
from flexgen_bench.pictures.picture import Axis, Guide, Panel, Picture, Point, Series

# Told apart without seeing red and green apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
# How much of a marker is filled.
FILLS = {
    Evidence.MEASURED: "full",
    Evidence.EMULATED: "left",
    Evidence.PROJECTED: "bottom",
    Evidence.SIMULATED: "none",
    Evidence.QUOTED: "top",
}
GREY = "#555555"
# Inches, and points of text.
WIDTH, LEFT, RIGHT, PANEL, GAP = 3.5, 0.62, 0.12, 2.2, 0.62
BODY, SMALL, LINE = 7.0, 6.0, 0.118
COLUMNS, COLUMNS_TITLE = 78, 56  # letters in a line of small and of bold text
MOST_LABELS = 12  # of points in one panel; more would cover each other
# Where the ends of a logarithmic axis are at least so far apart, ticks at 1, 2 and 5 would be too close.
WIDE = 30.0


class CannotDraw(UserError):
    """What draws is not installed."""


@dataclass(frozen=True)
class _Style:
    colour: str
    marker: str
    fill: str
    dashed: bool


def svg(picture: Picture) -> str:
    """Raises CannotDraw with the command that installs matplotlib where it is missing."""
    matplotlib = _matplotlib()
    settings = {
        "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
        "svg.hashsalt": picture.key,
        "font.family": "sans-serif",
        "font.size": BODY,
        "axes.linewidth": 0.6,
        "path.simplify": False,
    }
    with matplotlib.rc_context(settings):
        return _figure(picture, matplotlib)


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.lines
        import matplotlib.ticker
    except ImportError as error:
        raise CannotDraw("picture", "svg", "drawn with matplotlib", how_to_install("matplotlib")) from error
    return matplotlib


def _figure(picture: Picture, matplotlib: Any) -> str:
    styles = _styles([one for panel in picture.panels for one in panel.series])
    entries = list(_legend(picture, styles))
    title = textwrap.wrap(picture.title, COLUMNS_TITLE)
    facts = _wrapped(f"{value}." for value in picture.facts.values())
    notes = _wrapped(picture.notes)
    above = LINE * (len(title) * 1.25 + len(facts)) + 0.12
    below = LINE * (len(entries) * 1.2 + len(notes)) + 0.2
    height = above + below + len(picture.panels) * (PANEL + GAP)
    figure = matplotlib.figure.Figure(figsize=(WIDTH, height))
    _lines(figure, title, height - 0.08, height, size=BODY + 1.5, weight="bold", step=LINE * 1.25)
    _lines(figure, facts, height - 0.1 - LINE * 1.25 * len(title), height, size=SMALL, colour=GREY)
    bottom = height - above
    for panel in picture.panels:
        bottom -= PANEL
        box = (LEFT / WIDTH, bottom / height, (WIDTH - LEFT - RIGHT) / WIDTH, (PANEL - 0.12) / height)
        _panel(figure.add_axes(box), panel, styles, matplotlib)
        bottom -= GAP
    top = bottom + GAP - 0.44
    for number, (label, handle) in enumerate(entries):
        y = (top - LINE * 1.2 * (number + 0.5)) / height
        line = matplotlib.lines.Line2D([0.04, 0.11], [y, y], transform=figure.transFigure, **handle)
        line.set_markevery([])
        figure.add_artist(line)
        marker = {**handle, "linestyle": "none"}
        figure.add_artist(matplotlib.lines.Line2D([0.075], [y], transform=figure.transFigure, **marker))
        figure.text(0.13, y, label, size=BODY, va="center_baseline")
    _lines(figure, notes, top - LINE * 1.2 * len(entries) - 0.06, height, size=SMALL, colour=GREY)
    summary = f"{picture.title}: {'; '.join(picture.facts.values())}"
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": "flexgen-bench", "Title": summary})
    return out.getvalue()


def _lines(
    figure: Any,
    lines: Sequence[str],
    top: float,
    height: float,
    *,
    size: float,
    weight: str = "normal",
    colour: str = "black",
    step: float = LINE,
) -> None:
    """Lines of text below each other from ``top`` inches."""
    for number, line in enumerate(lines):
        y = (top - step * number) / height
        figure.text(0.02, y, line, size=size, weight=weight, color=colour, va="top")


def _wrapped(sentences: Iterable[str]) -> list[str]:
    return [line for sentence in sentences for line in textwrap.wrap(sentence, COLUMNS)]


def _styles(series: Sequence[Series]) -> dict[tuple[str, str, str, Evidence], _Style]:
    """Colours by system, shapes by what else a series is of: compression, machine."""
    systems = list(dict.fromkeys(one.system for one in sorted(series, key=lambda s: s.system)))
    kinds = list(dict.fromkeys(sorted((one.lossy, one.of) for one in series)))
    return {
        _key(one): _Style(
            COLOURS[systems.index(one.system) % len(COLOURS)],
            MARKERS[kinds.index((one.lossy, one.of)) % len(MARKERS)],
            FILLS[one.evidence],
            bool(one.lossy),
        )
        for one in series
    }


def _key(one: Series) -> tuple[str, str, str, Evidence]:
    return one.system, one.lossy, one.of, one.evidence


def _marks(style: _Style) -> dict[str, Any]:
    return {
        "color": style.colour,
        "marker": style.marker,
        "fillstyle": style.fill,
        "markerfacecoloralt": "white",
        "markersize": 5,
        "markeredgewidth": 0.9,
        "linewidth": 1.1,
    }


def _legend(picture: Picture, styles: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each series once, whatever panels it is in, then the guides."""
    shown: dict[str, dict[str, Any]] = {}
    for panel in picture.panels:
        for one in panel.series:
            style = styles[_key(one)]
            line = ("--" if style.dashed else "-") if one.joined else "none"
            shown.setdefault(f"{one.label}: {one.evidence.value}", {**_marks(style), "linestyle": line})
    for panel in picture.panels:
        for number, guide in enumerate(panel.guides):
            shown.setdefault(guide.label, _guide_marks(guide, number))
    for label, handle in shown.items():
        first, *more = textwrap.wrap(label, COLUMNS - 14)
        yield first, handle
        for line in more:
            yield f"  {line}", {"linestyle": "none"}


def _guide_marks(guide: Guide, number: int) -> dict[str, Any]:
    if len(guide.points) == 1:
        return {"color": GREY, "marker": "+", "markersize": 8, "linestyle": "none"}
    return {"color": GREY, "linestyle": (":", "-.")[number % 2], "linewidth": 0.9}


def _panel(axes: Any, panel: Panel, styles: Any, matplotlib: Any) -> None:
    for number, guide in enumerate(panel.guides):
        axes.plot(*zip(*guide.points, strict=True), zorder=1, **_guide_marks(guide, number))
    for one in panel.series:
        style = styles[_key(one)]
        line = ("--" if style.dashed else "-") if one.joined else "none"
        xs, ys = [p.x for p in one.points], [p.y for p in one.points]
        for p in one.points:
            _ranges(axes, p, style.colour)
        axes.plot(xs, ys, linestyle=line, zorder=3, **_marks(style))
    _scale(axes, panel, matplotlib)
    _failed(axes, panel, styles)
    _label_points(axes, panel)
    axes.set_xlabel(f"{panel.x.text}{_arrow(panel.x, '→', '←')}", size=BODY, labelpad=2)
    axes.set_ylabel(f"{panel.y.text}{_arrow(panel.y, '→', '←')}", size=BODY, labelpad=2)
    axes.tick_params(labelsize=SMALL, width=0.5, length=2.5, pad=2)
    axes.grid(which="major", linewidth=0.35, color="#dddddd")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel.title:
        axes.set_title(panel.title, size=BODY, weight="bold", pad=2, loc="left")


def _arrow(axis: Axis, higher: str, lower: str) -> str:
    return {"higher": f" {higher} better", "lower": f" {lower} better", "": ""}[axis.better.value]


def _ranges(axes: Any, p: Point, colour: str) -> None:
    """The interval of a point in both directions."""
    if p.x_range is not None:
        axes.plot(p.x_range, (p.y, p.y), color=colour, linewidth=0.8, zorder=2)
    if p.y_range is not None:
        axes.plot((p.x, p.x), p.y_range, color=colour, linewidth=0.8, zorder=2)


def _scale(axes: Any, panel: Panel, matplotlib: Any) -> None:
    failures = [f.x for one in panel.series for f in one.failures]
    points = [p for one in panel.series for p in one.points]
    guides = [place for guide in panel.guides for place in guide.points]
    xs = [*(v for p in points for v in (p.x, *(p.x_range or ()))), *failures, *(x for x, _ in guides)]
    ys = [*(v for p in points for v in (p.y, *(p.y_range or ()))), *(y for _, y in guides)]
    for axis, values, which in ((panel.x, xs, "x"), (panel.y, ys or [1.0], "y")):
        low, high = min(values), max(values)
        log = axis.log and low > 0
        if log:
            room = max((high / low) ** 0.08, 1.1)
            low, high = low / room, high * room
        else:
            room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
            low, high = (0.0 if low >= 0 else low - room), high + room
        getattr(axes, f"set_{which}scale")("log" if log else "linear")
        getattr(axes, f"set_{which}lim")(low, high)
        ticks = getattr(axes, f"{which}axis")
        if log:
            steps = (1, 2, 5) if high / low < WIDE else (1,)
            steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high / low < 4 else steps
            ticks.set_major_locator(matplotlib.ticker.LogLocator(subs=steps))
            ticks.set_minor_locator(matplotlib.ticker.NullLocator())
        else:
            ticks.set_major_locator(matplotlib.ticker.MaxNLocator(6))
        ticks.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: significant(value, 4)))


def _failed(axes: Any, panel: Panel, styles: Any) -> None:
    """A cross for each at the foot of the panel, those of one place beside each other."""
    taken: dict[float, int] = {}
    for one in panel.series:
        for x in dict.fromkeys(f.x for f in one.failures):
            place = taken[x] = taken.get(x, 0) + 1
            axes.annotate(
                "×",
                (x, 0),
                xycoords=("data", "axes fraction"),
                xytext=(6 * (place - 1), 4),
                textcoords="offset points",
                color=styles[_key(one)].colour,
                size=9,
                weight="bold",
                ha="center",
            )


def _label_points(axes: Any, panel: Panel) -> None:
    points = [p for one in panel.series for p in one.points if p.label]
    if len(points) > MOST_LABELS:
        return
    low, high = axes.get_xlim()
    middle = (low + high) / 2 if axes.get_xscale() == "linear" else (low * high) ** 0.5
    for p in points:
        right = p.x > middle
        axes.annotate(
            p.label,
            (p.x, p.y),
            xytext=(-5 if right else 5, 3),
            textcoords="offset points",
            size=5,
            color=GREY,
            ha="right" if right else "left",
            zorder=4,
        )

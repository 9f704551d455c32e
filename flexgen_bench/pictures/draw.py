"""Any picture as SVG, as wide as a column of a paper: colour says the system, shape the compression, filling the
evidence, and the legend all three in words. The same picture gives the same bytes (with one version of matplotlib)."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from flexgen_bench.core.digits import significant
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.pictures.labels import Box, placed
from flexgen_bench.pictures.picture import Better, Panel, Picture, Point
from flexgen_bench.pictures.style import GREY, Styles, guide_marks, key_of, marks, styles_of

# Along the axis: those of the vertical one are turned with its text.
ARROWS = {Better.HIGHER: " → better", Better.LOWER: " ← better", Better.NEITHER: ""}
# Inches, and points of text.
WIDTH, LEFT, RIGHT, PANEL, GAP = 3.5, 0.62, 0.12, 2.2, 0.62
BODY, SMALL, TINY, LINE = 7.0, 6.0, 5.0, 0.118
# Letters in a line of small text, of bold text, of the legend and beside an axis.
COLUMNS, COLUMNS_TITLE, COLUMNS_LEGEND, COLUMNS_X, COLUMNS_Y = 72, 52, 56, 58, 42
MOST_LABELS = 12  # of points in one panel; in a crowd they say nothing
# Between the ends of a logarithmic axis there are ticks at powers of ten, at 1, 2 and 5 below WIDE, at even steps below
# NARROW.
WIDE, NARROW = 30.0, 3.0


class CannotDraw(UserError):
    """What draws is not installed."""


def svg(picture: Picture, systems: Sequence[str] = ()) -> str:
    """systems: in the order that gives them their colours, so that a system has one colour in several pictures.

    Raises CannotDraw with the command that installs matplotlib where it is missing."""
    matplotlib = _matplotlib()
    settings = {
        "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
        "svg.hashsalt": picture.key,
        "font.family": "sans-serif",
        "font.size": BODY,
        "axes.linewidth": 0.6,
        "path.simplify": False,
        "text.parse_math": False,  # a dollar is a dollar
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Of letters that matplotlib's font lacks it knows no width; the reader's font draws them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        return _figure(picture, systems, matplotlib)


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.lines
        import matplotlib.ticker
    except ImportError as error:
        raise CannotDraw("picture", "svg", "drawn with matplotlib", how_to_install("matplotlib")) from error
    return matplotlib


def _figure(picture: Picture, systems: Sequence[str], matplotlib: Any) -> str:
    styles = styles_of([one for panel in picture.panels for one in panel.series], systems)
    same = {label for panel in picture.panels for one in panel.series for p in one.points if (label := p.label)}
    is_told = len(same) > 1  # what all points say is said once
    entries = list(_legend(picture, styles))
    title = _wrapped(picture.title, COLUMNS_TITLE)
    known = picture.facts
    shared = f"{known['model']}. {known['workload']}. {known['machine']}; hardware {known['hardware']}."
    facts = _wrapped(shared, COLUMNS)
    sentences = [*([] if is_told else [f"All points: {one}." for one in same]), *picture.notes]
    notes = [line for sentence in sentences for line in _wrapped(sentence, COLUMNS)]
    above = LINE * (len(title) * 1.25 + len(facts)) + 0.12
    below = LINE * (len(entries) * 1.2 + len(notes)) + 0.2
    height = above + below + len(picture.panels) * (PANEL + GAP)
    figure = matplotlib.figure.Figure(figsize=(WIDTH, height), dpi=72)  # a pixel is a point
    _lines(figure, title, height - 0.08, height, size=BODY + 1.5, weight="bold", step=LINE * 1.25)
    _lines(figure, facts, height - 0.1 - LINE * 1.25 * len(title), height, size=SMALL, colour=GREY)
    bottom = height - above
    for panel in picture.panels:
        bottom -= PANEL
        box = (LEFT / WIDTH, bottom / height, (WIDTH - LEFT - RIGHT) / WIDTH, (PANEL - 0.12) / height)
        _panel(figure.add_axes(box), panel, styles, is_told, matplotlib)
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
    summary = _clean(f"{picture.title}: {'; '.join(picture.facts.values())}")
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


def _wrapped(text: str, columns: int) -> list[str]:
    return textwrap.wrap(_clean(text), columns)


def _clean(text: str) -> str:
    """Without what XML cannot hold: names and reasons in records come from anywhere."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _legend(picture: Picture, styles: Styles) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each series once, whatever panels it is in, then the guides."""
    shown: dict[str, dict[str, Any]] = {}
    for panel in picture.panels:
        for one in panel.series:
            style = styles[key_of(one)]
            line = ("--" if style.dashed else "-") if one.joined else "none"
            shown.setdefault(f"{one.label}: {one.evidence.value}", {**marks(style), "linestyle": line})
    for panel in picture.panels:
        for number, guide in enumerate(panel.guides):
            shown.setdefault(guide.label, guide_marks(guide, number))
    for label, handle in shown.items():
        first, *more = _wrapped(label, COLUMNS_LEGEND)
        yield first, handle
        for line in more:
            yield f"  {line}", {"linestyle": "none"}


def _panel(axes: Any, panel: Panel, styles: Styles, is_told: bool, matplotlib: Any) -> None:
    for number, guide in enumerate(panel.guides):
        axes.plot(*zip(*guide.points, strict=True), zorder=1, **guide_marks(guide, number))
    for one in panel.series:
        style = styles[key_of(one)]
        line = ("--" if style.dashed else "-") if one.joined else "none"
        xs, ys = [p.x for p in one.points], [p.y for p in one.points]
        for p in one.points:
            _ranges(axes, p, style.colour)
        axes.plot(xs, ys, linestyle=line, zorder=3, **marks(style))
    _scale(axes, panel, matplotlib)
    _failed(axes, panel, styles)
    if is_told:
        _label_points(axes, panel)
    for name, axis, columns in (("x", panel.x, COLUMNS_X), ("y", panel.y, COLUMNS_Y)):
        lines = _wrapped(f"{axis.text}{ARROWS[axis.better]}", columns)
        getattr(axes, f"set_{name}label")("\n".join(lines), size=BODY, labelpad=2)
    axes.tick_params(labelsize=SMALL, width=0.5, length=2.5, pad=2)
    axes.grid(which="major", linewidth=0.35, color="#dddddd")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel.title:
        axes.set_title(_clean(panel.title), size=BODY, weight="bold", pad=2, loc="left")


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
            begin = min(low, 0.0)
            room = 0.08 * (high - begin) or 1.0
            low, high = (begin - room if begin < 0 else begin), high + room
        getattr(axes, f"set_{which}scale")("log" if log else "linear")
        getattr(axes, f"set_{which}lim")(low, high)
        ticks = getattr(axes, f"{which}axis")
        if log:
            ticks.set_minor_locator(matplotlib.ticker.NullLocator())
        if log and high / low >= NARROW:
            steps = (1, 2, 5) if high / low < WIDE else (1,)
            ticks.set_major_locator(matplotlib.ticker.LogLocator(subs=steps))
        else:
            ticks.set_major_locator(matplotlib.ticker.MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
        ticks.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: significant(value, 4)))


def _failed(axes: Any, panel: Panel, styles: Styles) -> None:
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
                color=styles[key_of(one)].colour,
                size=9,
                weight="bold",
                ha="center",
            )


def _label_points(axes: Any, panel: Panel) -> None:
    points = [p for one in panel.series for p in one.points if p.label]
    if len(points) > MOST_LABELS:
        return
    places = axes.transData.transform([(p.x, p.y) for p in points]) if points else ()
    named = [(_clean(p.label), float(x), float(y)) for p, (x, y) in zip(points, places, strict=True)]
    area = axes.get_window_extent()
    for label in placed(named, TINY, Box(area.x0, area.y0, area.x1, area.y1)):
        at = axes.transData.inverted().transform((label.x, label.y))
        axes.text(*map(float, at), label.text, size=TINY, color=GREY, va="baseline", zorder=4)

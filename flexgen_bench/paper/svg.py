"""Plots as SVG text, drawn by hand: no library, and the same numbers always give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from flexgen_bench.core.digits import fixed, settled, significant
from flexgen_bench.paper.curves import Curve, Plot

_WIDTH, _HEIGHT = 640, 400
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 40, 20, 50
_LEGEND_LINE = 18
_LEGEND_GAP = 14
# With more, ticks of 2 and 5 would be too close.
_WIDE_DECADES = 2.5
# Distinguishable without seeing red and green apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = {"printed": "", "simulated": "6 4", "this engine": "2 3"}


@dataclass(frozen=True)
class _Axis:
    """Values from ``low`` to ``high`` spread over pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            low, high = (settled(math.log10(v)) for v in (self.low, self.high))
            exponents = range(math.floor(low), math.ceil(high))
            steps = (1,) if settled(high - low, 9) > _WIDE_DECADES else (1, 2, 5)
            places = [m * 10.0**e for e in [*exponents, exponents.stop] for m in steps]
            return [t for t in places if self.low <= t * (1 + 1e-9) and t <= self.high * (1 + 1e-9)]
        step = _nice((self.high - self.low) / 5)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def svg(plot: Plot) -> str:
    """The plot with its legend below it."""
    height = _HEIGHT + _LEGEND_GAP + _LEGEND_LINE * len(plot.curves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(plot.title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(_WIDTH / 2, 22, plot.title, "middle", bold=True),
    ]
    points = [p for c in plot.curves for p in c.points]
    if not points:
        parts.append(_text(_WIDTH / 2, _HEIGHT / 2, "no values", "middle"))
        return "\n".join([*parts, "</svg>"]) + "\n"
    x = _axis([p[0] for p in points], _LEFT, _WIDTH - _RIGHT, plot.log)
    y = _axis([p[1] for p in points], _HEIGHT - _BOTTOM, _TOP, plot.log)
    parts += _frame(x, y, plot)
    for curve in plot.curves:
        parts += _curve(curve, x, y)
    for index, curve in enumerate(plot.curves):
        parts += _legend(curve, _HEIGHT + _LEGEND_GAP + _LEGEND_LINE * index)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axis(values: Sequence[float], start: float, end: float, log: bool) -> _Axis:
    low, high = min(values), max(values)
    if log:
        return _Axis(low / 1.5, high * 1.5, start, end, True)
    low, high = min(low, 0.0), high if high > 0 else 1.0
    return _Axis(low, low + (high - low) * 1.08, start, end, False)


def _frame(x: _Axis, y: _Axis, plot: Plot) -> list[str]:
    parts = []
    for tick in x.ticks():
        at = x.at(tick)
        parts += [_line(at, y.start, at, y.end, "#e0e0e0"), _text(at, y.start + 18, _number(tick), "middle")]
    for tick in y.ticks():
        at = y.at(tick)
        parts += [_line(x.start, at, x.end, at, "#e0e0e0"), _text(x.start - 8, at + 4, _number(tick), "end")]
    parts += [
        _line(x.start, y.start, x.end, y.start, "black"),
        _line(x.start, y.start, x.start, y.end, "black"),
        _text((x.start + x.end) / 2, y.start + 38, plot.x, "middle"),
    ]
    middle = (y.start + y.end) / 2
    turned = f'transform="rotate(-90 16 {_at(middle)})"'
    parts.append(f'<text x="16" y="{_at(middle)}" text-anchor="middle" {turned}>{escape(plot.y)}</text>')
    return parts


def _curve(curve: Curve, x: _Axis, y: _Axis) -> list[str]:
    places = [(x.at(a), y.at(b)) for a, b in curve.points]
    path = " ".join(f"{_at(a)},{_at(b)}" for a, b in places)
    stroke = f'fill="none" stroke="{_colour(curve)}" stroke-width="1.8"{_dash(curve)}'
    return [f'<polyline points="{path}" {stroke}/>', *(_marker(curve, a, b) for a, b in places)]


def _legend(curve: Curve, at: float) -> list[str]:
    stroke = f'stroke="{_colour(curve)}" stroke-width="1.8"{_dash(curve)}'
    return [
        f'<line x1="{_LEFT}" y1="{at}" x2="{_LEFT + 34}" y2="{at}" {stroke}/>',
        _marker(curve, _LEFT + 17, at),
        _text(_LEFT + 44, at + 4, curve.label, "start"),
    ]


def _marker(curve: Curve, x: float, y: float) -> str:
    """Filled where it was printed, open where it was simulated, square for this engine."""
    colour = _colour(curve)
    if curve.kind == "this engine":
        return f'<rect x="{_at(x - 3.5)}" y="{_at(y - 3.5)}" width="7" height="7" fill="{colour}"/>'
    fill = colour if curve.kind == "printed" else "white"
    return f'<circle cx="{_at(x)}" cy="{_at(y)}" r="3.5" fill="{fill}" stroke="{colour}"/>'


def _colour(curve: Curve) -> str:
    return _COLOURS[curve.series % len(_COLOURS)]


def _dash(curve: Curve) -> str:
    dash = _DASHES[curve.kind]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{_at(x1)}" y1="{_at(y1)}" x2="{_at(x2)}" y2="{_at(y2)}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{_at(x)}" y="{_at(y)}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, ... above ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _number(value: float) -> str:
    return significant(value, 6)


def _at(pixels: float) -> str:
    return fixed(pixels, 2)

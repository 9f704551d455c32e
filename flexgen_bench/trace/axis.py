"""A time axis: ticks at round times, labelled in the unit that suits the span."""

from __future__ import annotations

import math

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def ticks(span_s: float, most: int = 10) -> list[tuple[float, str]]:
    """(seconds from the beginning, label) of at most ``most`` + 1 ticks over ``span_s``, 1, 2 or 5 times a power of ten
    apart."""
    if span_s <= 0:
        return [(0.0, "0 s")]
    step = 10.0 ** math.floor(math.log10(span_s / most))
    step = next(s for s in (step, 2 * step, 5 * step, 10 * step) if span_s / s <= most)
    size, unit = next(((s, u) for s, u in _UNITS if span_s >= 5 * s), _UNITS[-1])
    decimals = max(0, -math.floor(math.log10(step / size) + 1e-9))
    count = math.floor(span_s / step + 1e-9) + 1
    return [(i * step, f"{i * step / size:.{decimals}f} {unit}") for i in range(count)]

"""How a figure becomes text: with the digits that mean something, and the same ones on every machine.

Two processors sum in different orders, so their figures differ in the 14th digit or so. Printed with fewer digits they
are the same, except where that difference lies on the edge of a rounding, and such edges are common: 25 right answers
of 200 are 12.5 %, which is printed without decimals. So a value is first brought to ``NOISE_FREE`` digits, which makes
an exact tie of a near one, and a tie goes to the even digit, in decimal arithmetic.
"""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Context, Decimal

# What arithmetic in float64 over thousands of terms still agrees on.
NOISE_FREE = 12
# Digits of a figure that was timed or predicted: repetitions differ in the third, and a ratio of two figures should be
# good to three.
TIMED = 4
# Of errors and divergences, which are computed in float32 (7 digits, fewer after summing).
SINGLE = 4
# Of a probability.
CHANCE = 3
# Decimals of scores between 0 and 1 and of bits per byte: a ten-thousandth of the smallest margin that anybody asks
# for.
SCORE = 6

_EXACT = Context(prec=40, rounding=ROUND_HALF_EVEN)


def settled(value: float, decimals: int | None = None) -> float:
    """``value`` without the digits that differ between machines; for comparisons and for sorting.

    decimals: also those beyond so many decimals. Differences need it: what is left of two equal numbers is all noise.
    """
    if not math.isfinite(value):
        return value
    number = float(f"{value:.{NOISE_FREE - 1}e}")
    return number if decimals is None else round(number, decimals) + 0.0


def fixed(value: float, decimals: int, *, plus: bool = False) -> str:
    """``value`` with so many decimals: ``12.50``. plus: with a sign before positive ones and zero. A zero never has a
    minus."""
    if not math.isfinite(value):
        return f"{value:+f}" if plus else f"{value:f}"
    text = _fixed(value, decimals)
    return f"{text:+f}" if plus else f"{text:f}"


def significant(value: float, digits: int, *, plus: bool = False) -> str:
    """``value`` with so many significant digits and no zeros at the end: ``0.0123``, ``1234``, ``1.2e-07``, as the
    format ``g`` has it, but that large ones are written out up to 1e15."""
    number = rounded(value, digits)
    if not math.isfinite(number):
        return f"{number:+f}" if plus else f"{number:f}"
    sign = "+" if plus else ""
    if abs(number) >= 10**digits and abs(number) < 1e15:
        return f"{number:{sign}.0f}"
    return f"{number:{sign}.{digits}g}"


def power(value: float, decimals: int, *, plus: bool = False) -> str:
    """``1.2e-03``: for what spans powers of ten."""
    number = rounded(value, decimals + 1)
    return f"{number:{'+' if plus else ''}.{decimals}e}"


def rounded(value: float, digits: int) -> float:
    """``value`` with so many significant digits, as a number; ``-0.0`` becomes ``0.0``."""
    if not math.isfinite(value) or value == 0:
        return value + 0.0
    exact = Decimal(repr(settled(value)))
    return float(Context(prec=digits, rounding=ROUND_HALF_EVEN).plus(exact)) + 0.0


def _fixed(value: float, decimals: int) -> Decimal:
    """Twice: to six decimals more than wanted (a difference of two numbers keeps their noise, however small it is
    itself), then as wanted."""
    exact = Decimal(repr(settled(value)))
    for places in (decimals + 6, decimals):
        exact = exact.quantize(Decimal(1).scaleb(-places), context=_EXACT)
    return exact if exact else abs(exact)

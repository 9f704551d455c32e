"""Figures as text: enough digits, and the same on every machine."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_bench.core.digits import fixed, power, rounded, settled, significant


def around(value: float, steps: int = 8) -> list[float]:
    """The value with its neighbours in float64, as other orders of summing would give them."""
    found = [value]
    for end in (-math.inf, math.inf):
        near = value
        for _ in range(steps):
            near = math.nextafter(near, end)
            found.append(near)
    return found


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.125, 2, "0.12"),
        (0.375, 2, "0.38"),
        (2.675, 2, "2.68"),
        (-0.5, 0, "-0"),
        (1.5, 0, "2"),
        (100.0, 1, "100.0"),
        (0.0, 3, "0.000"),
        (1e22, 1, "10000000000000000000000.0"),
    ],
)
def test_neighbours_of_a_tie_are_printed_alike(value: float, decimals: int, text: str) -> None:
    assert {fixed(v, decimals) for v in around(value)} == {text.replace("-0", "0")}


def test_nothing_is_left_of_noise() -> None:
    """-0.0 beside +0.0, or 1e-17 beside 0, is how two machines see the same two equal scores."""
    for noise in (0.0, -0.0, 1e-17, -3e-16):
        assert fixed(noise, 4, plus=True) == "+0.0000"
        assert settled(noise, 9) == 0.0
        assert math.copysign(1, settled(noise, 9)) == 1


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1234.5678, 4, "1235"),
        (0.0123456, 3, "0.0123"),
        (1259044074.6, 4, "1259000000"),
        (99.995, 4, "100"),
        (0.5, 4, "0.5"),
        (9.9996, 4, "10"),
        (1.25e-7, 2, "1.2e-07"),
        (0.0, 3, "0"),
        (-2.5, 1, "-2"),
        (math.inf, 3, "inf"),
    ],
)
def test_significant_digits(value: float, digits: int, text: str) -> None:
    assert {significant(v, digits) for v in ([value] if math.isinf(value) else around(value))} >= {text}
    if value:
        assert len({significant(v, digits) for v in around(value)}) == 1


def test_signs_and_powers() -> None:
    assert significant(0.5, 2, plus=True) == "+0.5"
    assert power(0.00125, 1) == "1.2e-03"
    assert power(-2e-9, 1, plus=True) == "-2.0e-09"
    assert fixed(math.nan, 2) == "nan"
    assert rounded(math.inf, 3) == math.inf


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12), st.integers(1, 8))
def test_no_more_is_lost_than_asked(value: float, digits: int) -> None:
    assert rounded(value, digits) == pytest.approx(value, rel=0.5000001 * 10.0 ** (1 - digits))
    assert float(fixed(value, digits)) == pytest.approx(value, abs=0.5000001 * 10.0**-digits, rel=1e-11)

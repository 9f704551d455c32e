"""Bytes: units, pages, and as text. GiB = 2**30, GB = 10**9 (docs/vocabulary.md)."""

from __future__ import annotations

import re

from flexgen_bench.core.digits import fixed
from flexgen_bench.core.errors import UserError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
PAGE = 4 * KIB  # what direct I/O addresses, and the system maps


_UNITS = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": KB,
    "mb": MB,
    "gb": GB,
    "tb": TB,
}
_PATTERN = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*$")


def aligned(count: int, to: int = PAGE) -> int:
    """The smallest multiple of ``to`` that is not below ``count``."""
    return -(-count // to) * to


def parse_bytes(text: str | int | float, field: str = "size") -> int:
    """Turn ``"2GiB"``, ``"1.5 GB"`` or a plain number of bytes into bytes.

    Raises UserError naming ``field`` for anything else, and for sizes below zero.
    """
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise UserError(field, text, "a number of bytes or text like '2GiB' or '16GB'")
    if not isinstance(text, str):
        if not 0 <= text < float("inf"):
            raise UserError(field, text, "a finite size of at least zero bytes")
        return int(text)
    match = _PATTERN.match(text)
    if match is None or match.group(2).lower() not in _UNITS:
        raise UserError(
            field, text, "a number followed by B, KiB, MiB, GiB, TiB, KB, MB, GB or TB, e.g. '2GiB'"
        )
    return int(float(match.group(1)) * _UNITS[match.group(2).lower()])


def format_bytes(count: float) -> str:
    """``1610612736`` -> ``'1.50 GiB'``; three significant places, binary units."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= unit:
            return f"{fixed(count / unit, 2)} {name}"
    return f"{int(count)} B"


def format_seconds(seconds: float) -> str:
    """``75.2`` -> ``'1m 15s'``; short runs keep a decimal."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def about(seconds: float) -> str:
    """``73.9`` -> ``'about 1 min'``: as much as can be said beforehand."""
    if seconds < 55:
        return f"about {max(1, round(seconds / 10)) * 10} s"
    minutes = max(1, round(seconds / 60))
    if minutes < 90:
        return f"about {minutes} min"
    return f"about {round(minutes / 60)} h"

"""Bytes: units, pages, and as text. GiB = 2**30, GB = 10**9 (docs/vocabulary.md)."""

from __future__ import annotations

from flexgen_bench.core.digits import fixed

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
PAGE = 4 * KIB  # what direct I/O addresses, and the system maps


def aligned(count: int, to: int = PAGE) -> int:
    """The smallest multiple of ``to`` that is not below ``count``."""
    return -(-count // to) * to


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

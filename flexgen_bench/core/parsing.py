"""Sizes as people write them."""

from __future__ import annotations

import re

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.units import GB, GIB, KB, KIB, MB, MIB, TB, TIB

_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB, "kb": KB, "mb": MB, "gb": GB, "tb": TB}
_PATTERN = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*$")
_SHARE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*of\s+weights\s*$")


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
        raise UserError(field, text, "a number followed by B, KiB, MiB, GiB, TiB, KB, MB, GB or TB, e.g. '2GiB'")
    return int(float(match.group(1)) * _UNITS[match.group(2).lower()])


def parse_weight_share(text: object, field: str = "size") -> float | None:
    """``"50% of weights"`` -> 0.5; None for what is written without a percent sign, and so is a size of its own.

    Raises UserError naming ``field`` for a percentage of nothing, or of something else, and for one of zero.
    """
    if not isinstance(text, str) or "%" not in text:
        return None
    match = _SHARE.match(text)
    if match is None:
        raise UserError(field, text, "a share such as '50% of weights', or a size such as '2GiB'")
    share = float(match.group(1)) / 100
    if share <= 0:
        raise UserError(field, text, "more than 0 % of the weights")
    return share

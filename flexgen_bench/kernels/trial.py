"""Kernels that are compiled where they run, for a device nobody has seen: tried once, on numbers whose result is known.

What cannot be compiled or launched, or says something else than torch's operators do, costs speed and no run. One that
reaches for memory that is not its own may break the device's context, and the run with it: no trial can prevent that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from flexgen_bench.core.microscaling import Codes, Microscaling

_log = logging.getLogger("flexgen_bench.kernels")


class WrongNumbers(Exception):
    """A kernel runs and gives other numbers than its reference."""

    def __init__(self) -> None:
        super().__init__("it gives other numbers than torch's operators")


def passes(trial: Callable[[], None], what: str, lost: str) -> bool:
    """Whether ``trial`` ends without an error. If not, one warning says ``what`` there is none of here, why, and what
    is ``lost``; whoever asks keeps the answer."""
    try:
        trial()
    except Exception as error:  # compilers, loaders and drivers have no type of error in common
        warn(error, what, lost)
        return False
    return True


def warn(error: Exception, what: str, lost: str) -> None:
    """``what`` there is none of here, for ``error``, and what is ``lost``."""
    lines = str(error).strip().splitlines()
    _log.warning("No %s here (%s: %s): %s", what, type(error).__name__, lines[0] if lines else "no reason", lost)


def require_equal(found: Tensor, expected: Tensor) -> None:
    """The same bits. Raises WrongNumbers."""
    if not torch.equal(found, expected):
        raise WrongNumbers


def require_close(found: Tensor, expected: Tensor) -> None:
    """Sums that may have been made in another order: within 2 % of the largest, as any wrong index or code is not.
    Raises WrongNumbers."""
    apart = (found.double() - expected.double()).abs()
    if not bool((apart <= 0.02 * expected.double().abs().max()).all()):  # nor is a NaN
        raise WrongNumbers


def any_codes(rows: int, n: int, compression: Codes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes (rows, bytes) and parameters of rows of n values: any at all are some values. The same in every call."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (rows, compression.code_bytes(n)), dtype=torch.uint8, generator=generator)
    groups = compression.groups(n)
    if isinstance(compression, Microscaling):  # powers of two around 1
        params = torch.randint(120, 132, (rows, groups), dtype=torch.uint8, generator=generator)
    else:
        params = torch.randn(rows, groups, 2, generator=generator).half()
    return codes.to(device), params.to(device)

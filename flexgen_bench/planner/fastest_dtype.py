"""What a machine computes fastest: the dtype of cells that leave it open (``dtype=fastest``)."""

from __future__ import annotations

from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.instructions import Level
from flexgen_bench.core.model import DType
from flexgen_bench.core.rates import SiteRates, number_format

# Rows of the products that count: a batch in a decode step, and some prompts.
ROWS = (32, 256)
_WIDTH = 2048


def fastest_dtype(hardware: HardwareProfile, level: Level) -> DType:
    """By the rates of what computes, where they are known. level: what the processor's instructions are, where they are
    not.

    All systems of a cell have the same dtype, so both ways of computing count alike: this engine's kernels, and torch's
    own products. Without rates: an accelerator takes float16, which every GPU multiplies at its full rate; a processor
    bfloat16 if it has instructions that multiply it, else float32 (torch makes float32 of 16-bit numbers one by one,
    which takes several times as long as float32).
    """
    site = None if hardware.rates is None else hardware.rates.sites.get(hardware.compute_tier)
    if site is not None:
        return _by_rates(site)
    if hardware.accelerator is Accelerator.CUDA:
        return DType.FLOAT16
    return DType.BFLOAT16 if level.multiplies_bfloat16 else DType.FLOAT32


def _by_rates(site: SiteRates) -> DType:
    known = [dtype for dtype in DType if number_format(dtype) in site.matrix]
    return min(known, key=lambda dtype: _seconds_per_flop(site, dtype))


def _seconds_per_flop(site: SiteRates, dtype: DType) -> float:
    """Of all the products that count together."""
    ours = (site.matrix_rate(number_format(dtype), rows, _WIDTH) for rows in ROWS)
    torch = (site.torch_matrix_rate(dtype, rows, _WIDTH) for rows in ROWS)
    return sum(1 / rate for rate in (*ours, *torch))

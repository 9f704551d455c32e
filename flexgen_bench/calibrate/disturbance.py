"""What a machine loses to what else happens on it: medians are of undisturbed moments, a job meets the disturbed ones
as well."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace

from flexgen_bench.calibrate.stable import Reading
from flexgen_bench.core.tiers import Tier

# Of devices that compute. A link or a disk has few samples, of many milliseconds each.
_COMPUTING = (Tier.GPU, Tier.CPU)


def slowdowns(readings: Mapping[str, Reading]) -> dict[str, float]:
    """By computing tier: how long its work took on average, over all samples of all its constants, compared with what
    the constants say.

    One factor for a tier, since a single constant has too few samples to show what happens every few seconds.
    """
    samples: dict[str, list[float]] = {tier: [] for tier in _COMPUTING}
    for name, reading in readings.items():
        if _place(name) in samples:
            samples[_place(name)] += reading.slowdowns
    return {tier: statistics.fmean(of_tier) for tier, of_tier in samples.items() if of_tier}


def as_met(readings: Mapping[str, Reading], factors: Mapping[str, float]) -> dict[str, Reading]:
    """The readings with the rates that a job meets: those of a tier over its slowdown."""
    return {
        name: replace(reading, rate=reading.rate / factors.get(_place(name), 1.0)) for name, reading in readings.items()
    }


def _place(name: str) -> str:
    """``cpu.matrix.float16.512.1`` -> ``cpu``."""
    return name.partition(".")[0]

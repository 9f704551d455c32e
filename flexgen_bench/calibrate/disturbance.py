"""What a machine loses to what else happens on it: medians are of undisturbed moments, a job meets the disturbed ones as well."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace

from flexgen_bench.calibrate.stable import Reading
from flexgen_bench.core.tiers import Tier

# Of devices that compute. A link or a disk has few samples, of many milliseconds each.
_COMPUTING = (Tier.GPU, Tier.CPU)


def slowdowns(readings: Mapping[str, Reading]) -> dict[Tier, float]:
    """By computing tier: how long its work took on average, over all samples of all its constants, compared with what the constants say.

    One factor for a tier, since a single constant has too few samples to show what happens every few seconds.
    """
    found = {}
    for tier in _COMPUTING:
        own = [r for name, r in readings.items() if name.startswith(f"{tier}.") and r.slowdowns]
        if own:
            found[tier] = statistics.fmean(each for reading in own for each in reading.slowdowns)
    return found


def as_met(readings: Mapping[str, Reading]) -> dict[str, Reading]:
    """The readings with the rates that a job meets: those of a tier over its slowdown."""
    factors = slowdowns(readings)

    def met(name: str, reading: Reading) -> Reading:
        factor = next((f for tier, f in factors.items() if name.startswith(f"{tier}.")), 1.0)
        return replace(reading, rate=reading.rate / factor)

    return {name: met(name, reading) for name, reading in readings.items()}

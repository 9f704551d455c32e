"""From seconds by part ("lane: what") to what a Prediction tells."""

from __future__ import annotations

from collections.abc import Mapping

from flexgen_bench.core.tiers import Lane


def lane_seconds(parts: Mapping[str, float], times: float = 1.0) -> dict[str, float]:
    """Seconds each lane works. What is no lane (a network, waiting) is left out."""
    busy = {str(lane): 0.0 for lane in Lane}
    for name, seconds in parts.items():
        lane, _, what = name.partition(": ")
        if lane in busy and not what.startswith("idle"):
            busy[lane] += times * seconds
    return {lane: seconds for lane, seconds in busy.items() if seconds}


def bottleneck(parts: Mapping[str, float]) -> str:
    """The part that takes longest."""
    return max(parts, key=lambda name: parts[name], default="")

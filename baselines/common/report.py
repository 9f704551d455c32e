"""From seconds by part ("lane: what") to what a Prediction tells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from flexgen_bench.core.tiers import LaneKind


def lane_seconds(parts: Mapping[str, float], times: float = 1.0) -> dict[str, float]:
    """Seconds each lane works. What is no lane (a network, waiting) is left out."""
    busy = {str(kind): 0.0 for kind in LaneKind}
    for name, seconds in parts.items():
        lane, _, what = name.partition(": ")
        if lane in busy and not what.startswith("idle"):
            busy[lane] += times * seconds
    return {lane: seconds for lane, seconds in busy.items() if seconds}


def bottleneck(parts: Mapping[str, float]) -> str:
    """The longest part of what is busy longest: a lane with many parts may be busier than the one with the longest
    part."""
    busy: dict[str, float] = defaultdict(float)
    for name, seconds in parts.items():
        busy[_resource(name)] += seconds
    busiest = max(busy, key=lambda resource: busy[resource], default="")
    of_it = [name for name in parts if _resource(name) == busiest]
    return max(of_it, key=lambda name: parts[name], default="")


def _resource(name: str) -> str:
    """The lane of a part; waiting keeps none busy, so it stands for itself."""
    lane, _, what = name.partition(": ")
    return name if what.startswith("idle") else lane

"""Which policy a run had, and why it was as fast as it was, in short sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.policy import Policy
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Status
from flexgen_bench.report.cells import one_line
from flexgen_bench.report.settings_text import policy_text, settings_text

_LONGEST = 600


def policy_of(record: Record) -> str:
    """What ran, as short as a table needs it: a policy of ours, or another system's own settings. Of a cell that did
    not run: what was asked for."""
    ran = record.report.requested
    if Policy.stated_in(ran) is not None:
        return policy_text(ran)
    words = settings_text(ran) if ran else ""
    if words:
        return words
    asked = record.spec.get("policy")
    options = record.spec.get("system_options")
    if isinstance(asked, Mapping):
        return policy_text(asked)
    return settings_text(options) if isinstance(options, Mapping) and options else ""


def chosen_by(record: Record) -> str:
    """Who decided on it."""
    if record.spec.get("policy") is not None:
        return "given with the cell"
    if Policy.stated_in(record.report.requested) is not None:
        return "chosen by the engine's search (policy=auto)"
    if record.tuning:
        return f"the system's own, at the best of {len(record.tuning)} batch sizes that were tried"
    return "the system's own"


def generating_s(record: Record) -> float:
    """Seconds of all generations since the weights were loaded, warm-up included: what lanes' busy time is part of."""
    return math.fsum(s.total_s for s in [*record.samples, *record.warmup_samples])


def busy_shares(record: Record) -> dict[str, float]:
    """The share of that time in which each lane worked; empty where batch sizes were tried in it, or the times do not
    fit together."""
    total = generating_s(record)
    if not total > 0 or record.tuning:
        return {}
    shares = {lane: seconds / total for lane, seconds in record.report.lane_busy_s.items()}
    return shares if all(share <= 1.05 for share in shares.values()) else {}


def why(record: Record, lanes: Mapping[str, Any] | None = None) -> list[str]:
    """Why the figure is what it is, the surest first. Each sentence says how it is known.

    lanes: ``page.lanes.picture`` of the run's trace, which knows more than the sums that a record holds.
    """
    if record.status is not Status.OK:
        return [one_line(record.reason, _LONGEST)] if record.reason else ["Its record gives no reason."]
    lines = []
    traced = lanes is not None and "problem" not in lanes
    shares = busy_shares(record)
    if lanes is not None and traced:
        shares = {one["lane"]: one["busy_s"] / lanes["wall_s"] for one in lanes["lanes"]}
    if shares:
        busiest = sorted(shares.items(), key=lambda item: -item[1])[:3]
        told = ", ".join(f"{lane} {min(share, 1.0):.0%}" for lane, share in busiest if share >= 0.005)
        if told:
            when = "in its last repetition" if traced else "while it generated"
            lines.append(f"Busy {when}: {told} ({record.evidence.value}).")
    if lanes is not None and traced and lanes["waiting"]:
        lines.append(str(lanes["waiting"]))
    if record.report.lowest_tier:
        lines.append(f"The slowest tier that it touched is {record.report.lowest_tier}.")
    bound = record.prediction.get("bottleneck")
    if bound:
        lines.append(f"Expected to be bound by {bound} (SIMULATED).")
    return lines

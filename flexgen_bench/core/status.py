"""How a cell ended, and how a number was obtained."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """How a cell ended. Everything but OK carries a reason."""

    OK = "ok"
    OOM = "oom"  # the memory cap, or the memory itself, was exhausted
    TIMEOUT = "timeout"
    FAILED = "failed"  # the system raised or crashed
    INVALID = "invalid"  # it ran, but the output fails a check
    UNAVAILABLE = "unavailable"  # it cannot run on this machine at all


class Evidence(StrEnum):
    """How a number was obtained. Two kinds never share a column without a mark."""

    MEASURED = "MEASURED"  # real run on the named hardware
    EMULATED = "EMULATED"  # real numerics, links or capacities throttled to imitate other hardware
    PROJECTED = "PROJECTED"  # part of a run, scaled up
    SIMULATED = "SIMULATED"  # event simulation; nothing was run
    QUOTED = "QUOTED"  # printed in a paper

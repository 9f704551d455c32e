"""One cell's full result, as data. The schema is described in docs/record.md and versioned here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexgen_bench.core.status import Evidence, Status

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Sample:
    """Raw figures of one repetition: everything a metric is computed from.

    ``prompt_tokens`` and ``generated_tokens`` count over all prompts of the workload.
    ``decode_tokens`` counts the tokens generated after each sequence's first.
    """

    prefill_s: float
    decode_s: float
    prompt_tokens: int
    generated_tokens: int
    decode_tokens: int

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s


@dataclass(frozen=True)
class Metric:
    """A quantity with its unit, direction and evidence; ``samples`` hold one value per repetition."""

    unit: str
    higher_is_better: bool
    evidence: Evidence
    samples: tuple[float, ...]


@dataclass(frozen=True)
class LinkUse:
    """What one link carried since the last ``load``, warm-up included: bytes, and seconds it was busy."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class SystemReport:
    """What a system did, told by itself after the measured repetitions.

    requested / realised: the policy asked for and what the allocator really did (shares and bytes per tier).
    peak_bytes: peak bytes per tier; links: per lane name; lane_busy_s: seconds each lane worked.
    notes: facts a reader of the number must know (e.g. "reads go through the page cache").
    """

    requested: Mapping[str, Any] = field(default_factory=dict)
    realised: Mapping[str, Any] = field(default_factory=dict)
    planned_bytes: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    links: Mapping[str, LinkUse] = field(default_factory=dict)
    lane_busy_s: Mapping[str, float] = field(default_factory=dict)
    lowest_tier: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TuningProbe:
    """One trial of the search for a system's best batch: projected tokens/s, or why it failed."""

    batch_size: int
    tok_per_s: float | None
    reason: str = ""


@dataclass(frozen=True)
class Record:
    """One run's full result. Written to a temporary name and renamed, before anything is printed.

    prediction: what a model of the system says of the run, from the machine's constants, under the policy that ran;
    empty where there is no model or no constants.
    """

    run_id: str
    spec_hash: str
    spec: Mapping[str, Any]
    suite: str
    status: Status
    reason: str
    started_utc: str
    ended_utc: str
    rerun_command: str
    evidence: Evidence = Evidence.MEASURED
    batch_size: int | None = None
    load_s: float | None = None
    samples: Sequence[Sample] = ()
    warmup_samples: Sequence[Sample] = ()
    tuning: Sequence[TuningProbe] = ()
    report: SystemReport = field(default_factory=SystemReport)
    memory_cap: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)
    validity: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    trace: str = ""  # the file with every step of the last repetition, seen from the record's folder
    prediction: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

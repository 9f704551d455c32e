"""How far a running cell has come, at one moment: what a live dashboard is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class JobState:
    """What a job of our engine is doing now. Counts begin with the job.

    passes: those that are over. waiting, prefill, decode, done: sequences by where they are. used_bytes: allocated by
    now, by tier; planned_bytes: what the memory plan has. link_bytes: moved, by lane. busy_s: seconds each lane worked;
    a step counts when it is over.
    """

    passes: int
    waiting: int
    prefill: int
    decode: int
    done: int
    used_bytes: Mapping[str, int] = field(default_factory=dict)
    planned_bytes: Mapping[str, int] = field(default_factory=dict)
    link_bytes: Mapping[str, int] = field(default_factory=dict)
    busy_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """One look at a cell's process.

    stage: probe, warmup or measure. generation: the number of this generation in the process, from 1; token counts
    begin anew with each. time_s: since the first generation began; elapsed_s: since this one began. prefill_tokens: of
    prompts that were computed; decode_tokens: of those after each sequence's first. resident_bytes: of the process;
    storage_read_bytes: fetched from storage since this generation began, as the kernel counts; gpu_bytes: what torch
    has allocated on the GPU. None where nobody can say. job: None of systems that know phases alone.
    """

    stage: str
    generation: int
    time_s: float
    elapsed_s: float
    prefill_tokens: int
    decode_tokens: int
    resident_bytes: int | None = None
    storage_read_bytes: int | None = None
    gpu_bytes: int | None = None
    job: JobState | None = None

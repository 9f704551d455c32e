"""Batch after batch: how a job's prompts are cut, and what becomes a Prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from baselines.common.report import bottleneck, lane_seconds
from flexgen_bench.core.job import Job
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.tiers import Tier


@dataclass(frozen=True)
class BatchTimes:
    """One batch: seconds until its first tokens, seconds of the rest, and of the parts ("lane: what")."""

    prefill_s: float
    decode_s: float
    parts: Mapping[str, float]


def predict_batches(
    job: Job,
    batch: int,
    times: Callable[[int], BatchTimes],
    needed: Mapping[Tier, Mapping[str, float]],
    settings: Mapping[str, Any],
    notes: tuple[str, ...] = (),
) -> Prediction:
    """``batch`` prompts at a time, the rest in a last smaller batch. times: of a batch of this size; needed: bytes by
    tier and part."""
    prompts = batch if job.num_prompts is None else job.num_prompts
    whole, rest = divmod(prompts, batch)
    sizes = ([(whole, times(batch))] if whole else []) + ([(1, times(rest))] if rest else [])
    parts: Counter[str] = Counter()
    for count, one in sizes:
        for name, seconds in one.parts.items():
            parts[name] += count * seconds  # type: ignore[assignment]
    return Prediction(
        prefill_s=sum(count * one.prefill_s for count, one in sizes),
        decode_s=sum(count * one.decode_s for count, one in sizes),
        num_prompts=prompts,
        prompt_len=job.prompt_len,
        gen_len=job.gen_len,
        batch_size=batch,
        bytes={str(tier): int(sum(named.values())) for tier, named in needed.items()},
        lane_busy_s=lane_seconds(parts),
        bottleneck=bottleneck(parts),
        settings=dict(settings),
        notes=notes,
    )


def passes(
    gen_len: int, prefill: tuple[float, Mapping[str, float]], decode: tuple[float, Mapping[str, float]]
) -> BatchTimes:
    """A pass over the prompt and ``gen_len - 1`` equal ones, each given as seconds and parts."""
    parts: Counter[str] = Counter()
    for count, one in ((1, prefill[1]), (gen_len - 1, decode[1])):
        for name, seconds in one.items():
            parts[name] += count * seconds  # type: ignore[assignment]
    return BatchTimes(prefill[0], (gen_len - 1) * decode[0], dict(parts))

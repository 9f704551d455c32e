"""This project's engine predicted over several ranks, all of them simulated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.device_memory import job_bytes, reserved_bytes
from flexgen_bench.core.job import Job
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.tiers import LaneKind, Site, Tier
from flexgen_bench.planner.cost import rates_of
from flexgen_bench.planner.rank_forecast import RankForecast
from flexgen_bench.planner.rank_machines import machines_of
from flexgen_bench.planner.rank_plans import Ranks, choose_for_ranks
from flexgen_bench.planner.search_space import SearchSpace, permitted
from flexgen_bench.planner.sensitivity import sensitivity
from flexgen_bench.planner.why import why


def predict_ranks(job: Job, policy: Policy | None) -> Prediction:
    """Under the policy that is given, or the best that is found. Raises DoesNotFit, UserError."""
    rates_of(job.hardware)
    room = job_bytes(job.hardware)
    available = {} if room is None else {Tier.GPU: room}
    lossies = permitted(job.lossy) if policy is None else (policy.lossy,)
    ranks = Ranks(job, machines_of(job), lossies, available)
    if policy is not None:
        space = ranks.space(0)
        times = ranks.forecast(policy, space.count(policy))
        return _prediction(space, policy, times, {"why": ["as asked for", *_why(space, times)]})
    chosen = choose_for_ranks(ranks)
    space, policy, times = chosen.space, chosen.policy, chosen.forecast
    limits = sensitivity(space, policy, space.count(policy) * job.gen_len / times.total_s)
    words = {
        "why": [*_why(space, times), f"{chosen.auto.choice.tried} policies were played on one rank's part"],
        "binding": ", ".join(limits.binding),
        "gains": dict(limits.more),
    }
    return _prediction(space, policy, times, words)


def _why(space: SearchSpace, times: RankForecast) -> Iterator[str]:
    rank, ranks = times.slowest, len(times.plans)
    lane = times.plans[rank].job.site.lane.name
    yield f"rank {rank} of {ranks} is the slowest; its {lane} waits {times.bubble(rank):.0%} of the job"
    yield why(space, times.plans[rank], times.of_rank(rank), None)


def _prediction(space: SearchSpace, policy: Policy, times: RankForecast, words: Mapping[str, Any]) -> Prediction:
    job, prompts, busy = space.job, space.count(policy), times.times.busy_s()
    rank = times.slowest
    shares = times.busy_shares(rank)
    lane = max(shares, key=lambda one: shares[one])
    stages = [plan.job.stage for plan in times.plans]
    return Prediction(
        prefill_s=times.times.prefill_s,
        decode_s=times.times.decode_s,
        num_prompts=prompts,
        prompt_len=job.prompt_len,
        gen_len=job.gen_len,
        batch_size=space.under_way(policy),
        bytes=_bytes(times),
        lane_busy_s={str(lane): seconds for lane, seconds in busy.items() if seconds},
        bottleneck=f"{lane} of rank {rank}: busy {shares[lane]:.0%} of the job",
        settings={
            "policy": to_json(policy),
            "layers_per_rank": [len(stage.layers) for stage in stages if stage is not None],
            "slowest_rank": rank,
            "bubble": [round(times.bubble(one), 4) for one in range(len(times.plans))],
            **words,
        },
        disk_written_bytes=sum(
            count for lane, count in times.times.moved_bytes().items() if lane.kind is LaneKind.DISK_WRITE
        ),
        overlapped=policy.mixes_phases(space.wave_prompts or prompts),
    )


def _bytes(times: RankForecast) -> dict[str, int]:
    """Of every rank by the tiers of its number (``gpu:1``), with what a process takes of a GPU beside its plan."""
    found: dict[str, int] = {}
    for rank, plan in enumerate(times.plans):
        reserved = reserved_bytes(plan.hardware)
        for site, parts in plan.bytes.items():
            beside = reserved if site.tier is Tier.GPU else 0
            found[Site(site.tier, rank).name] = sum(parts.values()) + beside
    return found

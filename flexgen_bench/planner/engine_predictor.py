"""This project's engine predicted: its own schedule, simulated with the machine's rates, under a policy that is given
or searched for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.device_memory import job_bytes, reserved_bytes
from flexgen_bench.core.job import Job
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.tiers import Lane, LaneKind, Tier
from flexgen_bench.planner.auto_policy import LEAST_GAIN, AutoChoice, auto_choice
from flexgen_bench.planner.cost import rates_of
from flexgen_bench.planner.forecast import Forecast, forecast
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.predictor import Predictor
from flexgen_bench.planner.rank_predictor import predict_ranks
from flexgen_bench.planner.search_space import SearchSpace, permitted
from flexgen_bench.planner.sensitivity import sensitivity
from flexgen_bench.planner.sliced_job import slice_of
from flexgen_bench.planner.why import why


class EnginePredictor(Predictor):
    """options: ``policy`` is a Policy, or None to search for one. It has no constants: what the engine sustains is in
    the machine's rates."""

    def predict(self, job: Job) -> Prediction:
        """Under the policy that is given, or under the one that ``policy=auto`` comes to on a machine with nothing else
        in its memory. Several GPUs are the ranks of a pipeline, or share every layer: then the bytes and lanes are one
        rank's."""
        policy: Policy | None = self.options.get("policy")
        if job.num_gpus * job.hardware.count > 1:
            return predict_ranks(job, policy)
        if job.hardware.tensor_parallel > 1:
            job = slice_of(job)
        rates_of(job.hardware)
        room = job_bytes(job.hardware)
        available = {} if room is None else {Tier.GPU: room}
        if policy is not None:
            space = SearchSpace(job, (policy.lossy,), available)
            plan = space.plan(policy)
            times = forecast(plan)
            reasons = ["as asked for", why(space, plan, times, None)]
            return _prediction(space, plan, times, {"why": reasons})
        space = SearchSpace(job, permitted(job.lossy), available)
        auto = auto_choice(space)
        choice = auto.choice
        limits = sensitivity(space, choice.policy, choice.tok_per_s)
        words = {"why": list(_why(space, auto)), "binding": ", ".join(limits.binding), "gains": dict(limits.more)}
        return _prediction(space, choice.plan, choice.forecast, words)


def _why(space: SearchSpace, auto: AutoChoice) -> Iterator[str]:
    choice, gain = auto.choice, auto.gain
    reason = why(space, choice.plan, choice.forecast, choice.other if gain is None else None)
    if gain is not None:
        reason += (
            f"; it is the plain rule's policy: the best found promises {gain:.1%} more than it, and less than "
            f"{LEAST_GAIN - 1:.0%} more is not relied on"
        )
    yield reason
    yield f"{len(choice.candidates)} ways to share out memory were worth a look, {choice.tried} policies were played"
    bound = max((c.bound for c in choice.candidates), default=0.0)
    if bound > choice.tok_per_s:  # else the programs keep room for staging that the policy found does without
        yield f"without any waiting the best would reach {bound:.3g} tokens/s"


def _prediction(space: SearchSpace, plan: MemoryPlan, times: Forecast, words: Mapping[str, Any]) -> Prediction:
    job, policy, busy = space.job, plan.policy, times.busy_s()
    prompts = space.count(policy)
    return Prediction(
        prefill_s=times.prefill_s,
        decode_s=times.decode_s,
        num_prompts=prompts,
        prompt_len=job.prompt_len,
        gen_len=job.gen_len,
        batch_size=policy.block_size,
        bytes=_bytes(plan),
        lane_busy_s={str(lane): seconds for lane, seconds in busy.items() if seconds},
        bottleneck=_bottleneck(busy, times.total_s),
        settings={"policy": to_json(policy), **words},
        disk_written_bytes=sum(
            count for lane, count in times.moved_bytes().items() if lane.kind is LaneKind.DISK_WRITE
        ),
        overlapped=policy.mixes_phases(prompts),
    )


def _bytes(plan: MemoryPlan) -> dict[str, int]:
    """By tier, with what a process takes of a GPU beside its plan."""
    planned = {site.name: sum(parts.values()) for site, parts in plan.bytes.items()}
    reserved = reserved_bytes(plan.hardware)
    return planned | ({str(Tier.GPU): plan.total(Tier.GPU) + reserved} if reserved else {})


def _bottleneck(busy: Mapping[Lane, float], total_s: float) -> str:
    lane = max(busy, key=lambda one: busy[one])
    return f"{lane}: busy {busy[lane] / total_s:.0%} of the job"

"""This project's engine predicted: its own schedule, played with the machine's rates, under a policy that is given or
searched for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.device_memory import beside_bytes, job_bytes
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.prediction import Prediction, Question
from flexgen_bench.core.tiers import Lane, LaneKind, Tier
from flexgen_bench.models.packing import pack
from flexgen_bench.models.registry import family
from flexgen_bench.planner.auto_policy import LEAST_GAIN, AutoChoice, auto_choice
from flexgen_bench.planner.cost import rates_of
from flexgen_bench.planner.forecast import Forecast, forecast
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.predictor import Predictor
from flexgen_bench.planner.sensitivity import gains
from flexgen_bench.planner.task import Task
from flexgen_bench.planner.why import why
from flexgen_bench.schedule.sequence_groups import Request


class EnginePredictor(Predictor):
    """options: ``policy`` is a Policy as a mapping, or None to search for one. It has no constants: what the engine
    sustains is in the machine's rates."""

    def predict(self, question: Question) -> Prediction:
        """Under the policy that is given, or under the one that ``policy=auto`` comes to on a machine with nothing else
        in its memory."""
        if question.num_gpus > 1:
            raise CannotRun("this engine uses one GPU")
        rates_of(question.hardware)
        given = self.options.get("policy")
        policy = None if given is None else Policy.from_dict(dict(given))
        task = _task(question, policy)
        if policy is not None:
            plan = task.plan(policy)
            times = forecast(task.shape, task.packed[policy.lossy], task.dtype, policy, task.hardware, plan)
            told = ["as asked for", why(task, policy, plan, times, None)]
            return _prediction(task, policy, plan, times, {"why": told})
        auto = auto_choice(task)
        choice = auto.choice
        found = gains(task, choice.policy, choice.tok_per_s)
        words = {"why": list(_why(task, auto)), "binding": ", ".join(found.binding), "gains": dict(found.more)}
        return _prediction(task, choice.policy, choice.plan, choice.forecast, words)


def _why(task: Task, auto: AutoChoice) -> Iterator[str]:
    choice, gain = auto.choice, auto.gain
    told = why(task, choice.policy, choice.plan, choice.forecast, choice.other if gain is None else None)
    if gain is not None:
        told += f"; it is the plain rule's policy: the best found promises {gain:.1%} more than it, and less than {LEAST_GAIN - 1:.0%} more is not relied on"
    yield told
    yield f"{len(choice.candidates)} ways to share out memory were worth a look, {choice.tried} policies were played"
    promised = max((c.tok_per_s for c in choice.candidates), default=0.0)
    if promised > choice.tok_per_s:  # else the programs keep room for staging that the policy found does without
        yield f"without any waiting the best would reach {promised:.3g} tokens/s"


def _task(question: Question, policy: Policy | None) -> Task:
    shape = question.shape
    inventory = family(shape.family).inventory(shape)
    room = job_bytes(question.hardware)
    lossies = [policy.lossy] if policy is not None else allowed(question.lossy)
    return Task(
        shape=shape,
        dtype=question.dtype,
        hardware=question.hardware,
        packed={lossy: pack(shape, inventory, question.dtype, lossy.weights) for lossy in lossies},
        request=Request(question.prompt_len, question.gen_len),
        prompts=question.num_prompts,
        available={} if room is None else {Tier.GPU: room},
        max_latency_s=question.max_latency_s,
    )


def allowed(lossy: Lossy) -> list[Lossy]:
    """The ways of compressing that a permission covers: both weights and KV cache, or one of them."""
    some = [lossy, replace(lossy, kv_cache=None), replace(lossy, weights=None)]
    return list(dict.fromkeys(one for one in some if lossy.is_exact or not one.is_exact))


def _prediction(task: Task, policy: Policy, plan: MemoryPlan, times: Forecast, words: Mapping[str, Any]) -> Prediction:
    busy, prompts = times.busy_s(), task.count(policy)
    return Prediction(
        prefill_s=times.prefill_s,
        decode_s=times.decode_s,
        num_prompts=prompts,
        prompt_len=task.request.prompt_len,
        gen_len=task.request.gen_len,
        batch_size=policy.block_size,
        bytes=_bytes(task, plan),
        lane_busy_s={str(lane): seconds for lane, seconds in busy.items() if seconds},
        bottleneck=_bottleneck(busy, times.total_s),
        settings={"policy": policy.to_dict(), **words},
        disk_written_bytes=sum(
            count for lane, count in times.moved_bytes().items() if lane.kind is LaneKind.DISK_WRITE
        ),
        overlapped=policy.mixes_phases(prompts),
    )


def _bytes(task: Task, plan: MemoryPlan) -> dict[str, int]:
    """By tier, with what a process takes of a GPU beside its plan."""
    planned = {site.name: sum(parts.values()) for site, parts in plan.bytes.items()}
    beside = beside_bytes(task.hardware)
    return planned | ({str(Tier.GPU): plan.total(Tier.GPU) + beside} if beside else {})


def _bottleneck(busy: Mapping[Lane, float], total_s: float) -> str:
    lane = max(busy, key=lambda one: busy[one])
    return f"{lane}: busy {busy[lane] / total_s:.0%} of the job"

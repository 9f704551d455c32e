"""The offloading engine: a model under a policy, running jobs of any number of prompts block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.timeline import Timeline
from flexgen_bench.engine.block import BlockRun, Consumer, spill_bytes
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.executor import Executor, LaneUse
from flexgen_bench.engine.generation import Generation, Running, ScoreRequest, Scoring
from flexgen_bench.engine.weights import Weights
from flexgen_bench.memory.spill import SpillFile
from flexgen_bench.memory.stored_tensor import StoredTensor
from flexgen_bench.memory.weight_store import StorePlan, WeightStore
from flexgen_bench.models.family import ModelFamily
from flexgen_bench.planner.memory_plan import (
    MemoryPlan,
    Request,
    form_batches,
    plan_block,
    weight_tiers,
)
from flexgen_bench.planner.units import PackedModel
from flexgen_bench.schedule.generator import pass_steps
from flexgen_bench.schedule.job import MicroBatch, Work
from flexgen_bench.schedule.weights import WeightStream

# (phase "prefill" or "decode", tokens done in it, tokens of it in all)
Progress = Callable[[str, int, int], None]


@dataclass
class JobResult:
    """Phase times and what the lanes did in one job, and the plan of its largest block."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    plan: MemoryPlan | None = None
    lanes: dict[Lane, LaneUse] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)


class Engine:
    """Weights in place, ready for jobs. Use ``close`` when done.

    Raises DoesNotFit if the weights alone exceed a tier, UserError for a policy this machine cannot follow.
    """

    def __init__(
        self,
        family: ModelFamily,
        shape: ModelShape,
        packed: PackedModel,
        store: WeightStore,
        dtype: DType,
        policy: Policy,
        device: Device,
        offload_dir: Path,
    ) -> None:
        self.policy = policy
        self._family, self._shape, self._packed = family, shape, packed
        self._dtype, self._device, self._offload_dir = dtype, device, offload_dir
        # The smallest job there is: refuses a policy whose weights do not fit before they are read.
        self._available = device.available(make_writable(offload_dir, "offload_dir"))
        self._check(self._plan([Request(1, 1)], [0]))
        self._weights = Weights(
            store, packed, dtype, weight_tiers(packed, policy.weights), device, policy.prefetch
        )
        self.direct_io = self._weights.direct_io

    def generate(
        self, sequences: Sequence[Running], progress: Progress = lambda phase, done, total: None
    ) -> JobResult:
        """Run every sequence to its end. Results are in the sequences themselves."""
        requests = [Request(len(s.prompt), s.params.max_tokens) for s in sequences]
        generation = Generation(sequences)
        return self._run(requests, generation, generation.is_done, progress)

    def score(
        self, requests: Sequence[ScoreRequest], progress: Progress = lambda phase, done, total: None
    ) -> tuple[Scoring, JobResult]:
        """Log-likelihoods of continuations."""
        scoring = Scoring(requests)
        asked = [Request(len(r.tokens), 1) for r in requests]
        result = self._run(asked, scoring, lambda batch: True, progress, Scoring.rows_at_once)
        return scoring, result

    def plans(self, requests: Sequence[Request], scored_rows: int = 0) -> list[MemoryPlan]:
        """One plan per block of the job. Prompts of similar length share a micro-batch."""
        order = sorted(range(len(requests)), key=lambda i: requests[i].prompt_len)
        size = self.policy.block_size
        blocks = [order[start : start + size] for start in range(0, len(order), size)]
        return [self._plan(requests, block, scored_rows) for block in blocks]

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether a job of these requests can run under this engine's policy."""
        try:
            for plan in self.plans(requests):
                self._check(plan)
        except DoesNotFit:
            return False
        return True

    def close(self) -> None:
        self._weights.close()

    def _check(self, plan: MemoryPlan) -> None:
        """Against what was free before the weights were loaded: a plan counts them in."""
        plan.check(self._device.hardware, self._available)

    def _plan(
        self, requests: Sequence[Request], order: Sequence[int], scored_rows: int = 0
    ) -> MemoryPlan:
        return plan_block(
            self._shape, self._packed, self._dtype, self.policy, self._device.hardware,
            form_batches(requests, order, self.policy), scored_rows,
        )  # fmt: skip

    def _run(
        self,
        requests: Sequence[Request],
        consumer: Consumer,
        is_done: Callable[[MicroBatch], bool],
        progress: Progress,
        scored_rows: int = 0,
    ) -> JobResult:
        plans = self.plans(requests, scored_rows)
        for plan in plans:
            self._check(plan)
        executor = Executor(self._device.lane_settings(), self.policy.overlap)
        result = JobResult(
            plan=max(plans, key=lambda p: sum(p.total(t) for t in Tier), default=None)
        )
        try:
            _JobRun(self, executor, consumer, is_done, progress, requests, result).run(plans)
            executor.drain()
        finally:
            executor.close()
        result.lanes, result.timeline = executor.use(), executor.timeline()
        return result


class _JobRun:
    """One job being run: blocks one after the other, passes until every sequence of a block has ended."""

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        consumer: Consumer,
        is_done: Callable[[MicroBatch], bool],
        progress: Progress,
        requests: Sequence[Request],
        result: JobResult,
    ) -> None:
        self._engine, self._executor, self._consumer = engine, executor, consumer
        self._is_done, self._progress, self._result = is_done, progress, result
        self._prompt_total = sum(r.prompt_len for r in requests)
        self._decode_total = sum(r.gen_len - 1 for r in requests)
        self._prompt_done = self._decode_done = 0
        self._passes = 0

    def run(self, plans: Sequence[MemoryPlan]) -> None:
        if not plans:
            return
        weights = WeightStream(plans[0].job)
        for number, plan in enumerate(plans):
            self._block(plan, weights, is_last=number == len(plans) - 1)

    def _block(self, plan: MemoryPlan, weights: WeightStream, is_last: bool) -> None:
        engine, job = self._engine, plan.job
        kv, hidden = spill_bytes(job, engine._shape)
        spill = SpillFile(engine._offload_dir, kv + hidden) if kv + hidden else None
        block: BlockRun | None = None
        try:
            block = BlockRun(
                engine._family, engine._shape, engine._dtype, job, engine._weights, engine._device,
                spill, self._consumer,
            )  # fmt: skip
            longest = max(batch.gen_len for batch in job.batches)
            active, token = list(job.batches), 0
            while active:
                begin = time.perf_counter()
                self._pass(block, plan, weights, active, token, is_last and token + 1 >= longest)
                self._account(active, token, time.perf_counter() - begin)
                token += 1
                active = [b for b in active if not self._is_done(b)]
            self._executor.drain()  # the spill file is about to go
        except BaseException:
            self._executor.abort()
            raise
        finally:
            if block is not None:
                block.close()
            if spill is not None:
                spill.close()

    def _pass(
        self,
        block: BlockRun,
        plan: MemoryPlan,
        weights: WeightStream,
        active: Sequence[MicroBatch],
        token: int,
        last: bool,
    ) -> None:
        stages = plan.job.stages
        work = [Work(batch, token, place % stages) for place, batch in enumerate(active)]
        ends: dict[int, tuple[Lane, int]] = {}  # unit -> its last compute step
        for step in pass_steps(plan.job, weights, self._passes, work, last):
            ticket = self._executor.submit(step, block.act)
            if step.lane in (plan.job.compute_lane, Lane.CPU):
                ends[step.unit] = ticket
        self._passes += 1
        rows = sum(batch.tokens(token) for batch in active)
        for place, ticket in enumerate(ends.values(), start=1):
            self._executor.wait([ticket])
            self._tell(token, rows * place // len(ends))
        self._executor.collect()

    def _account(self, active: Sequence[MicroBatch], token: int, seconds: float) -> None:
        rows = sum(batch.tokens(token) for batch in active)
        if token == 0:
            self._result.prefill_s += seconds
            self._prompt_done += rows
        else:
            self._result.decode_s += seconds
            self._decode_done += rows

    def _tell(self, token: int, rows: int) -> None:
        """Progress within a pass: after each unit, its share of the pass's tokens."""
        if token == 0:
            self._progress("prefill", self._prompt_done + rows, self._prompt_total)
        else:
            self._progress("decode", self._decode_done + rows, self._decode_total)


def store_plan(
    family: ModelFamily, shape: ModelShape, packed: PackedModel, dtype: DType
) -> StorePlan:
    """What the packed store of a model must hold: tables, embedding and head together, then layer by layer."""
    stored = {
        e.offset: StoredTensor(
            e.tensor.spec.name,
            e.tensor.spec.shape,
            e.offset,
            e.num_bytes,
            e.tensor.sources,
            e.tensor.source_rows,
            e.compression,
            e.params_offset if e.compression else 0,
        )
        for e in packed.entries
    }
    layers = [tuple(stored[e.offset] for e in u.entries) for u in packed.units[1:-1]]
    in_layers = {t.offset for group in layers for t in group}
    rest = tuple((tensor,) for offset, tensor in stored.items() if offset not in in_layers)
    return StorePlan(
        groups=(*rest, *layers),
        file_bytes=packed.file_bytes,
        dtype=dtype,
        prefixes=family.prefixes,
        description=shape.to_dict(),
        compression=packed.compression,
    )


def check_prompt(shape: ModelShape, index: int, prompt: Sequence[int], new_tokens: int) -> None:
    """UserError if a prompt is empty, does not fit the model's positions, or holds ids it does not know."""
    if not prompt:
        raise UserError(f"prompts[{index}]", list(prompt), "at least one token long")
    if len(prompt) + new_tokens - 1 > shape.max_positions:
        raise UserError(
            f"prompts[{index}]",
            f"{len(prompt)} tokens, {new_tokens} to generate",
            f"at most {shape.max_positions} positions in all for {shape.name}",
            "Shorten the prompt or lower max_tokens.",
        )
    bad = [t for t in prompt if not 0 <= t < shape.vocab_size]
    if bad:
        raise UserError(
            f"prompts[{index}]",
            bad[:5],
            f"token ids from 0 to {shape.vocab_size - 1} for {shape.name}",
        )

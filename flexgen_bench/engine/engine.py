"""The offloading engine: a model under a policy, running jobs of any number of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.timeline import Timeline
from flexgen_bench.engine.actions import Actions, Consumer
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.executor import Executor, LaneUse
from flexgen_bench.engine.frames import release_frames
from flexgen_bench.engine.generation import Generation, Running, requests_of
from flexgen_bench.engine.job_run import JobRun, Progress
from flexgen_bench.engine.kept_memory import KeptMemory
from flexgen_bench.engine.scoring import Found, LogProbabilities, Scoring
from flexgen_bench.engine.weights import Weights
from flexgen_bench.memory.spill import SpillFile
from flexgen_bench.memory.stored_tensor import StoredTensor
from flexgen_bench.memory.weight_store import TORCH_DTYPES, StorePlan, WeightStore
from flexgen_bench.models.family import ModelFamily
from flexgen_bench.models.registry import family as family_named
from flexgen_bench.planner.cohorts import Request
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.planner.scoring import ScoringPlan, lay_out, plan_scoring
from flexgen_bench.planner.units import PackedModel
from flexgen_bench.schedule.forest import ScoreRequest, grow


@dataclass
class JobResult:
    """Phase times and what the lanes did in one job, its plan, and the bytes that were allocated for it.

    A pass in which prompts are computed while other sequences decode (continuous schedule) counts as decode.
    """

    prefill_s: float = 0.0
    decode_s: float = 0.0
    plan: MemoryPlan | None = None
    lanes: dict[Lane, LaneUse] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)
    allocated: dict[Tier, dict[str, int]] = field(default_factory=dict)


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
        smallest = self.plan([Request(1, 1)])
        self._check(smallest)
        self._arenas = Arenas(device)
        self._kept = KeptMemory()
        try:
            self._weights = Weights(store, packed, dtype, smallest.job, device, self._arenas)
        except BaseException as error:
            release_frames(type(error), error, error.__traceback__)
            raise
        self._closed = False
        self.direct_io = self._weights.direct_io

    def generate(
        self, sequences: Sequence[Running], progress: Progress = lambda phase, done, total: None
    ) -> JobResult:
        """Run every sequence to its end. Results are in the sequences themselves.

        After an error the engine is ready for the next job, with new sequences: what the failed job has left in these
        is no result.
        """
        used = [i for i, s in enumerate(sequences) if s.new or s.finish_reason]
        if used:
            raise UserError(
                f"sequences[{used[0]}]",
                f"{len(sequences[used[0]].new)} tokens from an earlier job",
                "new, without tokens",
                "Make it again from its prompt.",
            )
        requests = requests_of(sequences, self._family.steady_positions(self._shape))
        generation = Generation(sequences)
        row = 8 if generation.is_greedy else 4 * self._shape.vocab_size
        return self._run(self.plan(requests, row), generation, progress)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        found: Found,
        progress: Progress = lambda phase, done, total: None,
    ) -> JobResult:
        """Log-likelihoods of continuations. ``found`` gets each as soon as it is there, from a thread of the engine."""
        asked = self.scoring(requests)
        return self._run(asked.plan, Scoring(asked.forests, found), progress, asked.policy)

    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Of each sequence, the distributions of its tokens but the first: (T-1, V) float32. For few sequences: all are in memory."""
        forests = [grow([ScoreRequest(s, 1)], len(s))[0] for s in sequences]
        rows = max(forest.rows for forest in forests)
        asked = plan_scoring(self._planned, self.policy, forests, rows, 4 * self._shape.vocab_size)
        found: list[list[Tensor]] = [[] for _ in sequences]
        consumer = LogProbabilities(forests, lambda i, piece: found[i].append(piece))
        self._run(asked.plan, consumer, policy=asked.policy)
        return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in found]

    def can_score(self, requests: Sequence[ScoreRequest]) -> bool:
        """Whether these can be scored under this engine's policy."""
        try:
            self.scoring(requests)
        except DoesNotFit:
            return False
        return True

    def scoring(self, requests: Sequence[ScoreRequest]) -> ScoringPlan:
        """How requests are laid out and planned under this engine's policy. Raises DoesNotFit."""
        return lay_out(self._planned, self._check, self.policy, requests)

    def plan(
        self, requests: Sequence[Request], logits_row_bytes: int = 8, scored_rows: int = 0
    ) -> MemoryPlan:
        """The plan of a job of these requests under this engine's policy."""
        return self._planned(self.policy, requests, logits_row_bytes, scored_rows)

    def _planned(
        self,
        policy: Policy,
        requests: Sequence[Request],
        logits_row_bytes: int = 8,
        scored_rows: int = 0,
    ) -> MemoryPlan:
        return plan_job(
            self._shape, self._packed, self._dtype, policy, self._device.hardware, requests,
            logits_row_bytes, scored_rows,
        )  # fmt: skip

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether a job of these requests can run under this engine's policy."""
        try:
            self._check(self.plan(requests))
        except DoesNotFit:
            return False
        return True

    def release_kept(self) -> None:
        """Give back what the last job has left for the next one; that one will take its memory anew."""
        self._kept.release()

    def close(self) -> None:
        """Release the weights, and what the last job has left. A second time does nothing."""
        self._closed = True
        self.release_kept()
        self._weights.close()

    def _check(self, plan: MemoryPlan) -> None:
        """Against what was free before the weights were loaded: a plan counts them in."""
        plan.check(self._device.hardware, self._available)

    def _run(
        self,
        plan: MemoryPlan,
        consumer: Consumer,
        progress: Progress = lambda phase, done, total: None,
        policy: Policy | None = None,
    ) -> JobResult:
        """policy: the one that was planned for, if it is not the engine's own; it differs in the shape of blocks alone."""
        policy = policy or self.policy
        if self._closed:
            raise UserError("Engine", "closed", "open", "Make a new one.")
        self._check(plan)
        result = JobResult(plan=plan)
        spilled = sum(plan.bytes.get(Tier.DISK, {}).get(k, 0) for k in ("kv_cache", "activations"))
        arenas = Arenas(self._device, self._kept)
        # Released in reverse: no lane may be running when its memory goes.
        with ExitStack() as held:
            held.push(release_frames)
            held.push(arenas.end)
            spill = SpillFile(self._offload_dir, spilled) if spilled else None
            if spill is not None:
                held.callback(spill.close)
            actions = Actions(
                self._family, self._shape, TORCH_DTYPES[self._dtype], policy, plan,
                self._weights, self._device, arenas, spill, consumer,
            )  # fmt: skip
            held.callback(actions.close)
            executor = Executor(self._device.lane_settings(), policy.overlap)
            held.callback(executor.close)
            try:
                JobRun(policy, plan, executor, actions, consumer, progress, result).run()
                executor.drain()
            except BaseException:
                executor.abort()
                raise
        result.lanes, result.timeline = executor.use(), executor.timeline()
        result.allocated = _together(self._arenas.bytes, arenas.bytes)
        return result


def _together(*parts: Mapping[Tier, Mapping[str, int]]) -> dict[Tier, dict[str, int]]:
    found: dict[Tier, dict[str, int]] = {}
    for part in parts:
        for tier, names in part.items():
            found.setdefault(tier, {}).update(names)
    return found


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


def check_score_request(shape: ModelShape, index: int, request: ScoreRequest) -> None:
    """UserError if nothing is to be scored, or for what ``check_prompt`` refuses. The last token is not computed, so one more than the
    model has positions is allowed."""
    if not 1 <= request.start < len(request.tokens):
        raise UserError(
            f"requests[{index}].start",
            request.start,
            f"from 1 to below the number of tokens ({len(request.tokens)})",
            "The first token has nothing before it that could predict it.",
        )
    check_prompt(shape, index, request.tokens, 0)
    steady = family_named(shape.family).steady_positions(shape)
    if len(request.tokens) - 1 > steady:
        raise UserError(
            f"requests[{index}]",
            f"{len(request.tokens)} tokens",
            f"at most {steady + 1} tokens long for {shape.name}",
            "Beyond its original length this model rotates every token by the length of its sequence "
            "(rope_type dynamic or longrope), so what sequences share cannot be computed once.",
        )

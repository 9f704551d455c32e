"""Our engine behind the contract that every system under test stands behind."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.hardware import Accelerator
from flexgen_bench.core.moment import JobState
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.record import LinkUse, SystemReport
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.slices import Slice
from flexgen_bench.core.tiers import Lane
from flexgen_bench.core.timeline import Timeline
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.engine.job_run import JobResult
from flexgen_bench.llm.llm import LLM
from flexgen_bench.ranks.commands import Setup
from flexgen_bench.ranks.division import Division, divide
from flexgen_bench.ranks.engines import AnyEngine, Engines
from flexgen_bench.ranks.ranks import Ranks
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.systems.contract import Capabilities, Generation, System
from flexgen_bench.systems.engine_scorer import EngineScorer
from flexgen_bench.systems.scorer import Scorer

_stage = logging.getLogger("flexgen_bench.stage")


class FlexGenSystem(System):
    """The engine under the cell's policy, or under one that fits the cell's memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        accelerators=("none", "cuda", "emulated"),
        lossy=("weights", "kv_cache", "value_share", "activations"),
        scores=True,
        ranks=True,
    )

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._engine: AnyEngine | None = None
        self._ranks: Ranks | None = None
        self._results: list[JobResult] = []
        self._timeline = Timeline()

    def check(self) -> None:
        division, spec = self._division(), self.spec
        division.open_device()
        if division.ranks > 1:
            division.check(spec.model.shape, spec.dtype, spec.lossy.weights)

    def _division(self) -> Division:
        return divide(self.spec.hardware, self.spec.threads)

    def is_prepared(self) -> bool:
        files, spec = self.files, self.spec
        return all(
            PackedWeights.is_packed(files.checkpoint, spec.dtype, files.cache, spec.lossy.weights, part)
            for part in spec.hardware.slices
        )

    def prepare(self) -> None:
        """Pack the checkpoint's weights, once per model, dtype and compression; of ranks that share layers, each
        slice."""
        for part in self.spec.hardware.slices:
            self._pack(part)

    def _pack(self, part: Slice | None) -> PackedWeights:
        def on_packed(done: int, total: int) -> None:
            _stage.info("packing weights", extra={"progress": ("convert", done, total, "B")})

        return PackedWeights.from_checkpoint(
            self.files.checkpoint, self.spec.dtype, self.files.cache, on_packed, self.spec.lossy.weights, part
        )

    def default_batch_size(self) -> int:
        """All prompts, where the policy is searched for: how many of them share a block is then part of the search."""
        searched = self.spec.policy is None and self.spec.hardware.rates is not None
        return self.spec.workload.num_prompts if searched else super().default_batch_size()

    def load(self, batch_size: int) -> None:
        self._release()
        workload = self.spec.workload
        division = self._division()
        weights = self._pack(division.part)
        if division.ranks > 1 and self._ranks is None:
            files, own = self.files, (division.hardware, division.threads)
            setup = Setup(
                *(files.checkpoint, self.spec.dtype, files.cache, self.spec.lossy.weights, *own, files.scratch),
                gpu_cap=True,
                shared=division.shared,
            )
            self._ranks = Ranks(division, setup)
        engines = Engines(weights, division.open_device(), self.files.scratch, self._ranks)
        policy = self.spec.policy or engines.choose_policy(
            [Request(workload.prompt_len, workload.gen_len)] * workload.num_prompts,
            batch_size,
            self.spec.lossy,
            max_latency_s=self.spec.max_latency_s,
        )
        self._engine = engines.make(policy)

    def generate(self, prompts: Sequence[Sequence[int]], gen_len: int, progress: Progress) -> Generation:
        assert self._engine is not None, "load comes before generate"
        params = SamplingParams(max_tokens=gen_len, ignore_eos=True)
        sequences = to_full_length(prompts, params)
        result = self._engine.generate(sequences, progress)
        # Only the last timeline is wanted, and the memory of the others may be what the next repetition needs.
        self._timeline, result.timeline = result.timeline, Timeline()
        self._results.append(result)
        return Generation(tuple(tuple(sequence.new) for sequence in sequences), result.prefill_s, result.decode_s)

    def scorer(self, batch_size: int | None) -> Scorer:
        """Batches are cut by tokens, so no number of sequences is needed."""
        hardware = self.spec.hardware
        if hardware.ranks > 1:
            name = "count" if hardware.count > 1 else "tensor_parallel"
            raise CannotRun(f"{self.spec.system} scores on one device, not on gpu.{name}={hardware.ranks}")
        llm = LLM(
            self.files.checkpoint,
            policy=self.spec.policy,
            gpu=self.spec.hardware,
            offload_dir=self.files.scratch,
            cache_dir=self.files.cache,
            dtype=self.spec.dtype,
            threads=self.spec.threads,
            lossy=self.spec.lossy,
        )
        return EngineScorer(llm)

    def report(self) -> SystemReport:
        assert self._engine is not None
        plan = self._results[-1].plan
        assert plan is not None
        policy: Policy = self._engine.policy
        lanes: list[Lane] = sorted({lane for r in self._results for lane in r.lanes})
        notes = [] if self._engine.direct_io else ["disk reads go through the page cache: no O_DIRECT"]
        if self.spec.hardware.accelerator is Accelerator.CUDA:
            notes.append(self._results[-1].decode_path)
        return SystemReport(
            requested=to_json(policy),
            realised={
                "weights": dict(plan.realised_weights),
                "kv_cache": dict(plan.realised_kv_cache),
                "activations": dict(plan.realised_activations),
                **({} if plan.realised_experts is None else {"experts": dict(plan.realised_experts)}),
                **({"kv_moved": plan.realised_kv_moved} if policy.kv_moved else {}),
                "bytes": {site.name: dict(parts) for site, parts in plan.bytes.items()},
                "allocated": {site.name: dict(parts) for site, parts in self._results[-1].allocated.items()},
            },
            planned_bytes={site.name: sum(parts.values()) for site, parts in plan.bytes.items()},
            links={
                str(lane): LinkUse(
                    sum(r.lanes[lane].bytes for r in self._results if lane in r.lanes),
                    sum(r.lanes[lane].busy_s for r in self._results if lane in r.lanes),
                )
                for lane in lanes
                if lane.is_link
            },
            lane_busy_s={
                str(lane): sum(r.lanes[lane].busy_s for r in self._results if lane in r.lanes) for lane in lanes
            },
            lowest_tier=str(policy.lowest_tier),
            notes=tuple(notes),
        )

    def timeline(self) -> Timeline:
        return self._timeline

    def job_state(self) -> JobState | None:
        return None if self._engine is None else self._engine.job_state()

    def close(self) -> None:
        try:
            self._release()
        finally:
            if self._ranks is not None:
                self._ranks.close()
                self._ranks = None

    def _release(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._results.clear()

"""How fast the original FlexGen would be: its placement, its schedule and its memory, on the rates of a machine.

Held against the values that its paper prints in docs/notes/paper_model.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from baselines.common.constants import only_options, read_constants
from baselines.common.machine import Machine
from baselines.common.model_size import ModelSize
from baselines.common.report import bottleneck, lane_seconds
from baselines.flexgen_original import search, settings
from baselines.flexgen_original.block import Block, Constants
from baselines.flexgen_original.outcome import Outcome
from baselines.flexgen_original.placement import realised_shares
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.predictor import Predictor

_SAME = 0.02  # more than this is worth telling
_OPTIONS = ("percent", "gpu_batch_size", "num_gpu_batches", "cpu_cache_compute", "pin_weight", "overlap", "sep_layer")


class FlexGenOriginalPredictor(Predictor):
    """Options: those of ``conf/system/flexgen_original.yaml``; None takes what was published, else the best of a
    search."""

    def __init__(self, constants: Mapping[str, float], options: Mapping[str, Any]) -> None:
        super().__init__(constants, options)
        self._constants = read_constants(Constants, constants)
        only_options(options, _OPTIONS)

    def predict(self, job: Job) -> Prediction:
        machine = Machine(job.hardware)
        _check_can(job, machine)
        size = ModelSize(job.shape, job.dtype)
        block = Block(
            settings.overlaid(settings.DEFAULT, {}, job.lossy),
            *(size, machine, self._constants, job.prompt_len, job.gen_len),
            stages=job.num_gpus,
        )
        machine.rates  # noqa: B018  (says what is missing before anything is searched)
        chosen, source = search.choose(block, job, self.options)
        return _prediction(chosen, source, job, _larger(chosen, source, job))


def _larger(chosen: Outcome, source: str, job: Job) -> list[str]:
    """What was published was chosen for a machine of 2022: what the same placement would reach in batches as large as
    fit here, where that is faster."""
    if source != search.PUBLISHED:
        return []
    best = search.in_largest_batches(chosen.block, job)
    shape, gain = best.block.settings, best.tok_per_s / chosen.tok_per_s
    if gain <= 1 + _SAME:
        return []
    batches = f"{shape.gpu_batch_size}x{shape.num_gpu_batches}"
    return [f"with {batches}, the largest batches that fit, {gain:.2f} times as fast (gpu_batch_size=largest)"]


def _check_can(job: Job, machine: Machine) -> None:
    shape = job.shape
    if not machine.has_gpu:
        raise CannotRun("the original FlexGen needs a CUDA device; it has no way to run without")
    if shape.family != "opt" or not shape.options.get("norm_before", True):
        raise CannotRun(f"the original FlexGen does not know {shape.name}; it knows the OPT models but 350m")
    if job.dtype is not DType.FLOAT16:
        raise CannotRun(f"the original FlexGen computes in float16, not in {job.dtype}; add dtype=float16")
    if job.prompt_len + job.gen_len > shape.max_positions:
        raise CannotRun(f"{shape.name} knows {shape.max_positions} positions")


def _prediction(outcome: Outcome, source: str, job: Job, also: list[str]) -> Prediction:
    block, together = outcome.block, outcome.prompts
    prompts = job.num_prompts or together
    blocks = -(-prompts // together)  # a last one that is not full is filled up
    parts = Counter(outcome.prefill.parts) + Counter(outcome.decode.parts)
    shares = realised_shares(block.all_layers)
    chosen = block.settings.to_dict() | {"realised_weights": shares}
    if block.stages > 1:
        chosen |= {"stages": block.stages, "blocks_in_flight": block.stages}
    written = block.cache_bytes(Tier.DISK) * block.stages
    notes = [source, *also, f"{shares['gpu']:.1%} of the weights are really on the GPU"]
    if block.settings.is_known_wrong:
        notes.append("its tokens are known to be wrong with these settings")
    return Prediction(
        prefill_s=blocks * outcome.prefill.seconds,
        decode_s=blocks * outcome.decode.seconds,
        num_prompts=prompts,
        prompt_len=job.prompt_len,
        gen_len=job.gen_len,
        batch_size=together,
        bytes={str(tier): int(sum(named.values())) for tier, named in outcome.bytes.items()},
        lane_busy_s=lane_seconds(parts, blocks),
        bottleneck=bottleneck(parts),
        settings=chosen,
        disk_written_bytes=int(blocks * written),
        notes=tuple(notes),
    )

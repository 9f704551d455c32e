"""How fast transformers would be with everything resident where it is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baselines.common.batches import BatchTimes, passes, predict_batches
from baselines.common.constants import only_options, read_constants, read_count
from baselines.common.hf_model import HFModel, Parts
from baselines.common.machine import largest_that_fits
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.job import Job
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.predictor import Predictor

LARGEST_BATCH = 256


@dataclass(frozen=True)
class _Constants:
    """It has none of its own."""


class TransformersPredictor(Predictor):
    """Option batch_size: sequences computed together; None takes the most that fit."""

    def __init__(self, constants: Mapping[str, float], options: Mapping[str, Any]) -> None:
        super().__init__(constants, options)
        read_constants(_Constants, constants)
        only_options(options, ("batch_size",))
        self._batch = read_count(options, "batch_size")

    def predict(self, job: Job) -> Prediction:
        check_lossless(job, "transformers")
        model = HFModel.of(job)
        model.machine.rates  # noqa: B018  (refuses a machine that is not known before anything else)
        batch = self._batch or resident_batch(model, job)
        needed = check_resident(model, batch)
        return predict_batches(
            job,
            min(batch, job.num_prompts or batch),
            lambda size: resident_times(model, size),
            needed,
            {"batch_size": batch},
        )


def check_lossless(job: Job, name: str) -> None:
    """These systems compress nothing and work on one GPU."""
    if not job.lossy.is_exact:
        raise CannotRun(f"{name} has no {job.lossy} here")
    if job.num_gpus > 1:
        raise CannotRun(f"{name} with several GPUs is not modelled")


def resident_needed(model: HFModel, batch: int) -> dict[Tier, Parts]:
    """Bytes with all weights where it is computed."""
    tier = Tier.GPU if model.machine.has_gpu else Tier.CPU
    return {tier: {"weights": model.size.weight_bytes, **model.working_parts(batch)}}


def check_resident(model: HFModel, batch: int) -> dict[Tier, Parts]:
    """The same. Raises DoesNotFit."""
    needed = resident_needed(model, batch)
    for tier, parts in needed.items():
        model.machine.check(tier, parts, "Lower the batch, or take a system that offloads.")
    return needed


def resident_batch(model: HFModel, job: Job) -> int:
    """The most sequences that fit, up to the job's prompts. Raises DoesNotFit if one sequence does not."""
    limit = job.num_prompts or LARGEST_BATCH
    return largest_that_fits(lambda size: check_resident(model, size), limit)


def resident_times(model: HFModel, batch: int) -> BatchTimes:
    """One batch with nothing to load."""
    prefill, decode = model.prefill(batch), model.decode(batch)
    return passes(
        model.gen_len,
        (prefill.seconds, prefill.parts(model.lane, "prefill")),
        (decode.seconds, decode.parts(model.lane, "decode")),
    )

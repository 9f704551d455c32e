"""How fast Hugging Face Accelerate would be: its hooks bring every module's weights in before it computes, and nothing
overlaps.

Each batch and each token takes all weights anew. On disk they are memory-mapped files, read through the page cache by
one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baselines.common.batches import BatchTimes, passes, predict_batches
from baselines.common.constants import only_options, read_constants, read_count
from baselines.common.hf_model import Compute, HFModel, Parts
from baselines.common.machine import largest_that_fits
from baselines.common.page_cache import cached_share, mapped_rate
from baselines.transformers.predictor import LARGEST_BATCH, check_lossless, check_resident, resident_times
from flexgen_bench.core.errors import DoesNotFit, unknown_choice
from flexgen_bench.core.job import Job
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.predictor import Predictor

MODES = ("auto", "cpu", "disk")
RESIDENT = "none"
_REMEDY = "Lower system.options.batch_size, or offload further down."


@dataclass(frozen=True)
class Constants:
    """Of conf/system/accelerate.yaml, where each is explained."""

    copy_share: float


class AcceleratePredictor(Predictor):
    """Options: offload (auto: nothing if the model fits beside a batch, else to the host's memory, else to disk);
    batch_size, None for the most that fit."""

    def __init__(self, constants: Mapping[str, float], options: Mapping[str, Any]) -> None:
        super().__init__(constants, options)
        self._constants = read_constants(Constants, constants)
        only_options(options, ("offload", "batch_size"))
        self._offload = str(options.get("offload") or "auto")
        if self._offload not in MODES:
            raise unknown_choice("system.options.offload", self._offload, MODES)
        self._batch = read_count(options, "batch_size")

    def predict(self, job: Job) -> Prediction:
        check_lossless(job, "accelerate")
        model = HFModel.of(job)
        model.machine.rates  # noqa: B018  (refuses a machine that is not known before anything else)
        modes = (RESIDENT, "cpu", "disk") if self._offload == "auto" else (self._offload,)
        for mode in modes:
            try:
                batch, needed = self._fitting(model, mode, job)
            except DoesNotFit:
                if mode == modes[-1]:
                    raise
                continue
            break
        return predict_batches(
            job,
            min(batch, job.num_prompts or batch),
            lambda size: self._times(model, mode, size),
            needed,
            {"offload": mode, "batch_size": batch},
        )

    def _fitting(self, model: HFModel, mode: str, job: Job) -> tuple[int, dict[Tier, Parts]]:
        def check(size: int) -> dict[Tier, Parts]:
            return check_resident(model, size) if mode == RESIDENT else _check(model, mode, size)

        batch = self._batch
        if batch is None:
            batch = largest_that_fits(check, job.num_prompts or LARGEST_BATCH)
        return batch, check(batch)

    def _times(self, model: HFModel, mode: str, batch: int) -> BatchTimes:
        if mode == RESIDENT:
            return resident_times(model, batch)
        loads = self._loads(model, mode)

        def one(compute: Compute, phase: str) -> tuple[float, Parts]:
            parts = loads | compute.parts(model.lane, phase)
            return sum(loads.values()) + compute.seconds, parts

        return passes(model.gen_len, one(model.prefill(batch), "prefill"), one(model.decode(batch), "decode"))

    def _loads(self, model: HFModel, mode: str) -> Parts:
        """Seconds of bringing all weights in once."""
        machine, size = model.machine, model.size.weight_bytes
        loads = {"h2d: weights": size / (self._constants.copy_share * machine.h2d)}
        if mode == "disk":
            spare = None if machine.host_bytes is None else machine.host_bytes - machine.host_process_bytes
            share = cached_share(size, spare)
            rate = mapped_rate(machine.disk_read, machine.disk_read_cached, share)
            loads["disk_read: weights"] = size / rate
        return loads


def _check(model: HFModel, mode: str, batch: int) -> dict[Tier, Parts]:
    """Bytes with weights below where it is computed. Raises DoesNotFit."""
    size = model.size
    here = Tier.GPU if model.machine.has_gpu else Tier.CPU
    # The matrix in use, and the token table, which the embedding and the head share.
    buffers = size.largest_matrix_bytes + size.bytes_of(size.table_values)
    needed: dict[Tier, Parts] = {here: {"buffers": buffers, **model.working_parts(batch)}}
    host: Parts = needed.setdefault(Tier.CPU, {})
    host["process"] = model.machine.host_process_bytes
    if mode == "cpu":
        host["weights"] = size.weight_bytes
    else:
        needed[Tier.DISK] = {"weights": size.weight_bytes}
    for tier, parts in needed.items():
        model.machine.check(tier, parts, _REMEDY)
    return needed

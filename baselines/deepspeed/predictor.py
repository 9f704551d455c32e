"""How fast DeepSpeed ZeRO-Inference would be, as of 2022: the KV cache on the GPU, the next weights on their way while
these are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baselines.common.batches import BatchTimes, passes, predict_batches
from baselines.common.constants import only_options, read_constants, read_count
from baselines.common.hf_model import Compute, HFModel, Parts
from baselines.common.machine import largest_that_fits
from baselines.deepspeed.loading import Loading
from flexgen_bench.core.errors import CannotRun, DoesNotFit, unknown_choice
from flexgen_bench.core.job import Job
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.predictor import Predictor

MODES = ("cpu", "nvme")
LARGEST_BATCH = 256


@dataclass(frozen=True)
class Constants:
    """Of conf/system/deepspeed.yaml, where each is explained."""

    link_share: float
    disk_share: float
    network: float
    fragmentation: float


class DeepSpeedPredictor(Predictor):
    """Options: offload (cpu goes on to nvme where the host's memory is too small; None the same); batch_size, of all
    GPUs together, None for the most sequences that fit on each."""

    def __init__(self, constants: Mapping[str, float], options: Mapping[str, Any]) -> None:
        super().__init__(constants, options)
        self._constants = read_constants(Constants, constants)
        only_options(options, ("offload", "batch_size"))
        self._offload = str(options.get("offload") or "cpu")
        if self._offload not in MODES:
            raise unknown_choice("system.options.offload", self._offload, MODES)
        self._batch = read_count(options, "batch_size")

    def predict(self, job: Job) -> Prediction:
        if not job.lossy.is_exact:
            raise CannotRun(f"DeepSpeed ZeRO-Inference of 2022 has no {job.lossy}")
        model = HFModel.of(job)
        model.machine.rates  # noqa: B018  (refuses a machine that is not known before anything else)
        notes: tuple[str, ...] = ()
        try:
            loading, each, needed = self._fitting(model, self._offload, job)
        except DoesNotFit as error:
            if self._offload == "nvme" or error.tier != Tier.CPU:
                raise
            loading, each, needed = self._fitting(model, "nvme", job)
            notes = ("the host's memory is too small for offload=cpu: predicted with offload=nvme",)
        batch = self._batch or each * job.num_gpus
        return predict_batches(
            job,
            min(batch, job.num_prompts or batch),
            lambda size: _times(loading, -(-size // job.num_gpus)),
            needed,
            {"offload": loading.mode, "batch_size": batch},
            notes,
        )

    def _fitting(self, model: HFModel, mode: str, job: Job) -> tuple[Loading, int, dict[Tier, Parts]]:
        """Where the weights lie, sequences on each GPU, and bytes. Raises DoesNotFit."""
        gpus = job.num_gpus
        constants, machine = self._constants, model.machine
        loading = Loading(
            model,
            mode,
            model.size.weight_bytes,
            gpus,
            link=constants.link_share * machine.h2d,
            disk=constants.disk_share * machine.disk_read,
            network=constants.network,
            fragmentation=constants.fragmentation,
        )
        check = loading.check
        if self._batch is not None:
            each = -(-self._batch // gpus)
        else:
            limit = max(1, (job.num_prompts or LARGEST_BATCH * gpus) // gpus)
            each = largest_that_fits(check, limit)
        return loading, each, check(each)


def _times(loading: Loading, batch: int) -> BatchTimes:
    """One batch on each GPU."""
    model, load_s, loads = loading.model, loading.seconds(), loading.parts()

    def one(compute: Compute, phase: str) -> tuple[float, Parts]:
        return max(load_s, compute.seconds), loads | compute.parts(model.lane, phase)

    return passes(model.gen_len, one(model.prefill(batch), "prefill"), one(model.decode(batch), "decode"))

"""How fast ZeRO-Inference of 2023 would be: weights in 4 bits with fused kernels that unpack them, the KV cache in the
host's memory if that is better, with attention computed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baselines.common.batches import BatchTimes, passes, predict_batches
from baselines.common.constants import only_options, read_constants, read_count
from baselines.common.hf_model import FRAGMENTATION, HFModel, Parts
from baselines.common.machine import largest_that_fits
from baselines.deepspeed.loading import Loading
from baselines.deepspeed.predictor import LARGEST_BATCH, MODES
from flexgen_bench.core.errors import CannotRun, DoesNotFit, UserError, unknown_choice
from flexgen_bench.core.job import Job
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.predictor import Predictor


@dataclass(frozen=True)
class Constants:
    """Of conf/system/zero_inference_2023.yaml, where each is explained."""

    link_share: float
    pageable_share: float
    network: float
    cpu_attention_share: float
    unpack_share: float


class ZeroInference2023Predictor(Predictor):
    """Options: offload (None: cpu or nvme, what is faster); batch_size (None: the most that fit); kv_offload (None:
    what is faster); pin_memory, whether weights in the host's memory are page-locked."""

    def __init__(self, constants: Mapping[str, float], options: Mapping[str, Any]) -> None:
        super().__init__(constants, options)
        self._constants = read_constants(Constants, constants)
        only_options(options, ("offload", "batch_size", "kv_offload", "pin_memory"))
        offload = options.get("offload")
        if offload is not None and offload not in MODES:
            raise unknown_choice("system.options.offload", str(offload), MODES)
        for name in ("kv_offload", "pin_memory"):
            if options.get(name) not in (None, True, False):
                raise UserError(f"system.options.{name}", options[name], "true, false or null")
        self._modes: tuple[str, ...] = MODES if offload is None else (str(offload),)
        self._batch = read_count(options, "batch_size")
        kept = options.get("kv_offload")
        self._kv_offload: tuple[bool, ...] = (False, True) if kept is None else (bool(kept),)
        self._pinned = options.get("pin_memory") is not False

    def predict(self, job: Job) -> Prediction:
        _check_can(job)
        model = HFModel.of(job)
        model.machine.rates  # noqa: B018  (refuses a machine that is not known before anything else)
        predictions: list[Prediction] = []
        refusal: DoesNotFit | None = None
        for mode in self._modes:
            for kv_offload in self._kv_offload:
                try:
                    predictions.append(self._one(model, job, mode, kv_offload))
                except DoesNotFit as error:
                    refusal = error
        if not predictions:
            assert refusal is not None
            raise refusal
        return max(predictions, key=lambda prediction: prediction.tok_per_s)

    def _one(self, model: HFModel, job: Job, mode: str, kv_offload: bool) -> Prediction:
        constants, packed = self._constants, job.lossy.weights
        group = packed.group_size if packed else 1
        shrunk = packed.row_bytes(group) / (group * model.size.dtype.bytes) if packed else 1.0
        share = constants.link_share if self._pinned else constants.pageable_share
        loading = Loading(
            model,
            mode,
            shrunk * model.size.weight_bytes,
            1,
            link=share * model.machine.h2d,
            disk=model.machine.disk_read,
            network=constants.network,
            fragmentation=FRAGMENTATION,
        )
        unpacked = model.size.largest_matrix_bytes if packed else 0.0

        def check(size: int) -> dict[Tier, Parts]:
            return loading.check(size, unpacked, cache_here=not kv_offload)

        batch = self._batch or largest_that_fits(check, job.num_prompts or LARGEST_BATCH)
        needed = check(batch)
        chosen = {"offload": mode, "batch_size": batch, "kv_offload": kv_offload, "pin_memory": self._pinned}
        unpack_s = 0.0
        if packed:
            rate = constants.unpack_share * model.machine.compute.memory
            unpack_s = model.size.weight_bytes / rate
        work = _Work(loading, unpack_s, kv_offload, constants.cpu_attention_share)
        return predict_batches(job, min(batch, job.num_prompts or batch), work.times, needed, chosen)


def _check_can(job: Job) -> None:
    lossy = job.lossy
    if lossy.kv_cache is not None or lossy.value_share != 1:
        raise CannotRun("ZeRO-Inference of 2023 compresses weights only")
    if lossy.weights is not None and lossy.weights.bits not in (4, 8):
        raise CannotRun("ZeRO-Inference of 2023 compresses weights to 4 or 8 bits")
    if job.num_gpus > 1:
        raise CannotRun("ZeRO-Inference of 2023 with several GPUs is not modelled")


@dataclass(frozen=True)
class _Work:
    """What a batch takes; unpack_s: seconds of unpacking all weights once."""

    loading: Loading
    unpack_s: float
    kv_offload: bool
    cpu_attention_share: float

    def times(self, batch: int) -> BatchTimes:
        model = self.loading.model
        prefill, decode = model.prefill(batch), model.decode(batch)
        parts = prefill.parts(model.lane, "prefill"), decode.parts(model.lane, "decode")
        extra: tuple[Parts, Parts] = {}, {}
        if self.kv_offload:
            decode = model.decode(batch, attention_s=0.0)
            parts = parts[0], decode.parts(model.lane, "decode")
            stored = model.cache_bytes(batch, model.prompt_len) / model.machine.d2h
            tokens = int(model.decode_context)
            rate = self.cpu_attention_share * model.machine.cpu.memory
            attention = model.cache_bytes(batch, tokens) / rate
            extra = {"d2h: KV cache": stored}, {"cpu: decode attention": attention}
        load_s, loads = self.loading.seconds(), self.loading.parts()
        unpacking = {"gpu: unpacking of weights": self.unpack_s} if self.unpack_s else {}

        def one(busy_s: float, own: Parts, added: Parts) -> tuple[float, Parts]:
            # A layer's attention on the cpu holds up both its computation and the fetching of the layer after the next.
            seconds = max(load_s, busy_s + self.unpack_s) + sum(added.values())
            return seconds, {**loads, **own, **added, **unpacking}

        return passes(model.gen_len, one(prefill.seconds, parts[0], extra[0]), one(decode.seconds, parts[1], extra[1]))

"""How fast llama.cpp would be: passes over all weights, bound by arithmetic or by reading them.

A prompt is computed ``ubatch`` tokens at a time, then each step computes one token of every sequence; every such pass
reads all weights once. Resident weights are read from memory. Mapped ones that are larger than what memory is left are
read from the disk again on every pass (``common/page_cache.py``), by the threads that compute, which wait meanwhile.
On a GPU, as many layers as fit are computed there; of the others, passes of 32 rows and more copy the weights over the
link and compute there, too (``op_offload``), smaller ones are computed by the cpu. Layers come one after the other, so
times add.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from baselines.common.batches import BatchTimes, passes, predict_batches
from baselines.common.constants import read_constants, read_count
from baselines.common.machine import Machine
from baselines.common.page_cache import cached_share, read_rate
from baselines.llama_cpp.layout import check_family
from baselines.llama_cpp.library import MAX_SEQUENCES
from baselines.llama_cpp.metadata import check_expressible
from baselines.llama_cpp.placement import Divided, Weights, divided, gpu_layers
from baselines.llama_cpp.settings import Footprint, Load, Settings, chosen_load, footprint
from flexgen_bench.core.compression import EXACT
from flexgen_bench.core.errors import CannotRun, DoesNotFit
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.rates import SiteRates
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.predictor import Predictor

# Rows at which ggml's CUDA backend takes over products of weights in host memory (ggml-cuda.cu: offload_op).
OFFLOADED_ROWS = 32
# Below, a table of rates by rows holds that of reading the matrix, which is counted in bytes here.
_ARITHMETIC_ROWS = 32
_REMEDY = "Lower system.options.batch_size, or take system.options.load=mmap."


@dataclass(frozen=True)
class Constants:
    """Of conf/system/llama_cpp.yaml, where each is explained."""

    compute_share: float
    memory_share: float
    mapped_share: float
    gpu_compute_share: float
    gpu_memory_share: float


class LlamaCppPredictor(Predictor):
    """Options: the system's own; batch_size, None for the one that is fastest among powers of two and all prompts."""

    def __init__(self, constants: Mapping[str, float], options: Mapping[str, Any]) -> None:
        super().__init__(constants, options)
        self._constants = read_constants(Constants, constants)
        self._batch = read_count(options, "batch_size")
        Settings.of(options, DType.FLOAT16, EXACT)

    def predict(self, job: Job) -> Prediction:
        if replace(job.lossy, weights=None) != EXACT:
            raise CannotRun(f"llama.cpp has no {job.lossy} here")
        if job.num_gpus > 1:
            raise CannotRun("llama.cpp with several GPUs is not modelled")
        check_family(job.shape)
        check_expressible(job.shape, job.prompt_len + job.gen_len)
        settings = Settings.of(self.options, job.dtype, job.lossy)
        settings.check_declared(job.lossy)
        machine = Machine(job.hardware)
        machine.rates  # noqa: B018  (refuses a machine that is not known before anything else)
        most = min(MAX_SEQUENCES, job.num_prompts or MAX_SEQUENCES)
        sizes = [min(self._batch, most)] if self._batch else _candidates(most)
        found: list[Prediction] = []
        for size in sizes:
            try:
                found.append(self._predict(job, settings, machine, size))
            except DoesNotFit:
                if not found:
                    raise
                break
        return max(found, key=lambda prediction: prediction.tok_per_s)

    def _predict(self, job: Job, settings: Settings, machine: Machine, batch: int) -> Prediction:
        model = _Placed.of(job, settings, machine, batch, self._constants)
        needed = model.needed()
        for tier, parts in needed.items():
            machine.check(tier, parts, _REMEDY)
        chosen = {
            "format": settings.format.value,
            "load": model.load.value,
            "gpu_layers": model.on_gpu,
            "batch_size": batch,
        }
        return predict_batches(job, batch, model.times, needed, chosen)


def _candidates(most: int) -> list[int]:
    powers = [2**n for n in range(most.bit_length())]
    return sorted({*powers, most})


Parts = dict[str, float]


@dataclass(frozen=True)
class _Placed:
    """A model whose weights have their place. on_gpu: layers there, the head counting as one more."""

    job: Job
    settings: Settings
    machine: Machine
    load: Load
    on_gpu: int
    footprint: Footprint
    constants: Constants

    @staticmethod
    def of(job: Job, settings: Settings, machine: Machine, batch: int, constants: Constants) -> _Placed:
        shape, tokens = job.shape, job.prompt_len + job.gen_len
        memory = machine.host_bytes
        if machine.has_gpu and memory is not None:
            # What the GPU holds is no part of the host's memory (a mapped file's pages are let go).
            memory += int(job.hardware.gpu_memory_bytes or 0)
        load = chosen_load(shape, settings, batch, tokens, memory)
        on_gpu = 0
        if machine.has_gpu:
            whole = job.hardware.gpu_memory_bytes
            free = None if whole is None else whole - machine.process_bytes
            on_gpu = gpu_layers(shape, settings, load, batch, tokens, free)
        return _Placed(job, settings, machine, load, on_gpu, footprint(shape, settings, load, batch, tokens), constants)

    @property
    def shape(self) -> ModelShape:
        return self.job.shape

    @cached_property
    def _divided(self) -> Divided:
        return divided(self.shape, self.settings)

    @cached_property
    def _there(self) -> Weights:
        """Layers on the GPU: the last ones. The head is the first to go there."""
        return sum(self._divided.layers[self.shape.num_layers - self._num_above :], Weights())

    @cached_property
    def _below(self) -> Weights:
        """Layers with the cpu."""
        return sum(self._divided.layers[: self.shape.num_layers - self._num_above], Weights())

    @property
    def _num_above(self) -> int:
        return max(0, self.on_gpu - 1)

    @property
    def _above(self) -> float:
        """The share of layers on the GPU."""
        return self._num_above / self.shape.num_layers

    def needed(self) -> dict[Tier, Parts]:
        """Bytes by tier and part. Mapped weights need no memory; they are read as often as memory is short."""
        host_weights = self._below.bytes + self._divided.table.bytes
        if not self.on_gpu and not self.shape.tied_embeddings:
            host_weights += self._divided.head.bytes
        host = {
            "weights": 0.0 if self.load is Load.MMAP else float(host_weights),
            "kv_cache": self.footprint.kv_cache * (1 - self._above),
            "workspace": float(self.footprint.workspace),
            "process": max(float(self.footprint.process), self.machine.host_process_bytes),
        }
        needed: dict[Tier, Parts] = {Tier.CPU: host, Tier.DISK: {"weights": float(self.footprint.weights)}}
        if self.machine.has_gpu:
            needed[Tier.GPU] = {
                "weights": float(self._there.bytes + (self._divided.head.bytes if self.on_gpu else 0)),
                "kv_cache": self.footprint.kv_cache * self._above,
                "workspace": float(self.footprint.workspace),
                "driver and context": self.machine.process_bytes,
            }
        return needed

    def times(self, batch: int) -> BatchTimes:
        """Of one batch."""
        job, ubatch = self.job, self.settings.ubatch_of(self.load)
        whole, rest = divmod(batch * job.prompt_len, ubatch)
        prompt = [(whole, self._layers(ubatch)), (1, self._layers(rest))]
        prefill = _sum([*prompt, (1, self._head(batch)), (1, self._prompt_attention(batch))])
        decode = _sum([(1, self._layers(batch)), (1, self._head(batch)), (1, self._step_attention(batch))])
        return passes(job.gen_len, (sum(prefill.values()), prefill), (sum(decode.values()), decode))

    def _layers(self, rows: int) -> Iterator[tuple[str, float]]:
        """Seconds of all layers over ``rows`` tokens, by part; nothing of none."""
        if rows and self._there.bytes:
            yield "gpu: matrix products", self._products(self._there, rows, on_gpu=True)
        if rows and self._below.bytes:
            yield from self._of_the_cpu(self._below, rows)

    def _head(self, rows: int) -> Iterator[tuple[str, float]]:
        if self.on_gpu:
            yield "gpu: matrix products", self._products(self._divided.head, rows, on_gpu=True)
        else:
            yield from self._of_the_cpu(self._divided.head, rows)

    def _of_the_cpu(self, weights: Weights, rows: int) -> Iterator[tuple[str, float]]:
        """Of weights that are with the cpu."""
        if self.load is Load.MMAP and (seconds := weights.bytes / self._mapped_rate):
            yield "disk_read: weights", seconds
        if self.machine.has_gpu and rows >= OFFLOADED_ROWS:
            # A mapped file is not page-locked.
            link = self.machine.h2d_pageable if self.load is Load.MMAP else self.machine.h2d
            yield "h2d: weights", weights.bytes / link
            yield "gpu: matrix products", self._products(weights, rows, on_gpu=True)
        else:
            yield "cpu: matrix products", self._products(weights, rows, on_gpu=False)

    @cached_property
    def _mapped_rate(self) -> float:
        """Bytes/s of a pass over mapped weights; without end for those that stay in memory after the first pass."""
        size = self._below.bytes + (0 if self.on_gpu else self._divided.head.bytes)
        memory = self.machine.host_bytes
        left = None if memory is None else memory - sum(self.needed()[Tier.CPU].values())
        share = cached_share(size, left)
        if share == 1.0:
            return math.inf
        return read_rate(self.constants.mapped_share * self.machine.disk_read, self.machine.disk_read_cached, share)

    def _products(self, weights: Weights, rows: int, on_gpu: bool) -> float:
        """Seconds of ``rows`` rows times these matrices."""
        site, constants = self._site(on_gpu), self.constants
        compute = constants.gpu_compute_share if on_gpu else constants.compute_share
        memory = constants.gpu_memory_share if on_gpu else constants.memory_share
        width = math.sqrt(self.shape.hidden_size * self.shape.ffn_size)
        rate = compute * site.matrix_rate(str(self.job.dtype), max(rows, _ARITHMETIC_ROWS), width)
        experts = self.shape.options.get("experts")
        met = float(self.shape.options["experts_per_token"]) / float(experts) if experts else 1.0
        read = 1 - (1 - met) ** rows
        return max(2 * rows * weights.values * met / rate, read * weights.bytes / (memory * site.memory))

    def _prompt_attention(self, batch: int) -> Iterator[tuple[str, float]]:
        """Causal: half the square of a prompt's scores, twice."""
        shape, tokens = self.shape, self.job.prompt_len
        flops = batch * 2 * shape.num_heads * shape.head_dim * tokens * tokens * shape.num_layers
        for lane, share, on_gpu in self._lanes():
            yield f"{lane}: prefill attention", share * flops / self._site(on_gpu).prefill_attention_rate(tokens)

    def _step_attention(self, batch: int) -> Iterator[tuple[str, float]]:
        """One token for each sequence, in the middle of decoding."""
        context = self.job.prompt_len + self.job.gen_len / 2
        heads = self.shape.num_heads // self.shape.num_kv_heads
        values = batch * context * self.shape.kv_values_per_token_layer
        for lane, share, on_gpu in self._lanes():
            site = self._site(on_gpu)
            read = 2 * values * share * self.shape.num_layers
            yield f"{lane}: decode attention", site.decode_attention_s(0, read, "float16", heads)

    def _lanes(self) -> Iterator[tuple[str, float, bool]]:
        """Lane, share of layers, whether it is the GPU's."""
        for lane, share, on_gpu in (("gpu", self._above, True), ("cpu", 1 - self._above, False)):
            if share:
                yield lane, share, on_gpu

    def _site(self, on_gpu: bool) -> SiteRates:
        return self.machine.compute if on_gpu else self.machine.cpu


def _sum(parts: Iterable[tuple[int, Iterable[tuple[str, float]]]]) -> Parts:
    """Seconds by part, each so many times."""
    total: Parts = {}
    for count, seconds_of in parts:
        for name, seconds in seconds_of:
            total[name] = total.get(name, 0.0) + count * seconds
    return total

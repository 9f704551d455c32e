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
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from baselines.common.batches import BatchTimes, passes, predict_batches
from baselines.common.constants import read_constants, read_count
from baselines.common.machine import Machine
from baselines.common.page_cache import cached_share, read_rate
from baselines.llama_cpp.layout import check_family
from baselines.llama_cpp.library import MAX_SEQUENCES
from baselines.llama_cpp.metadata import check_expressible
from baselines.llama_cpp.placement import gpu_layers, layer_bytes
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

    def _bytes(self) -> tuple[float, float, float]:
        """Weights of layers on the GPU, of layers with the cpu, and of the head."""
        layers, head, _ = layer_bytes(self.shape, self.settings)
        above = max(0, self.on_gpu - 1)  # the head is the first to go there
        return sum(layers[len(layers) - above :]), sum(layers[: len(layers) - above]), head

    @property
    def _above(self) -> float:
        """The share of layers on the GPU."""
        return max(0, self.on_gpu - 1) / self.shape.num_layers

    def needed(self) -> dict[Tier, Parts]:
        """Bytes by tier and part. Mapped weights need no memory; they are read as often as memory is short."""
        there, below, head = self._bytes()
        table = float(layer_bytes(self.shape, self.settings)[2])
        if self.on_gpu:
            there += head
        elif not self.shape.tied_embeddings:
            table += head  # a tied head without a GPU is the table itself
        host = {
            "weights": 0.0 if self.load is Load.MMAP else below + table,
            "kv_cache": self.footprint.kv_cache * (1 - self._above),
            "workspace": float(self.footprint.workspace),
            "process": max(float(self.footprint.process), self.machine.host_process_bytes),
        }
        needed: dict[Tier, Parts] = {Tier.CPU: host, Tier.DISK: {"weights": float(self.footprint.weights)}}
        if self.machine.has_gpu:
            needed[Tier.GPU] = {
                "weights": there,
                "kv_cache": self.footprint.kv_cache * self._above,
                "workspace": float(self.footprint.workspace),
                "driver and context": self.machine.process_bytes,
            }
        return needed

    def times(self, batch: int) -> BatchTimes:
        """Of one batch."""
        job, ubatch = self.job, self.settings.ubatch_of(self.load)
        rows = batch * job.prompt_len
        prefill: Counter[str] = Counter()
        whole, rest = divmod(rows, ubatch)
        for count, size in ((whole, ubatch), (1 if rest else 0, rest)):
            if count:
                for name, seconds in self._pass(size, batch if size == (rest or ubatch) else 0):
                    prefill[name] += count * seconds  # type: ignore[assignment]
        for name, seconds in self._prompt_attention(batch):
            prefill[name] += seconds  # type: ignore[assignment]
        decode: Counter[str] = Counter()
        for name, seconds in [*self._pass(batch, batch), *self._step_attention(batch)]:
            decode[name] += seconds  # type: ignore[assignment]
        return passes(job.gen_len, (sum(prefill.values()), prefill), (sum(decode.values()), decode))

    def _pass(self, rows: int, outputs: int) -> Iterator[tuple[str, float]]:
        """Seconds of all layers over ``rows`` tokens, and of the head over ``outputs`` of them, by part."""
        there, below, head = self._bytes()
        if there:
            yield "gpu: matrix products", self._products(there, rows, on_gpu=True)
        if below:
            yield from self._below(below, rows)
        if outputs:
            lane = "gpu" if self.on_gpu else "cpu"
            yield f"{lane}: matrix products", self._products(head, outputs, on_gpu=bool(self.on_gpu))

    def _below(self, size: float, rows: int) -> Iterator[tuple[str, float]]:
        """Of the layers whose weights are with the cpu."""
        if self.load is Load.MMAP:
            yield "disk_read: weights", size / self._mapped_rate(size)
        if self.machine.has_gpu and rows >= OFFLOADED_ROWS:
            # A mapped file is not page-locked.
            link = self.machine.h2d_pageable if self.load is Load.MMAP else self.machine.h2d
            yield "h2d: weights", size / link
            yield "gpu: matrix products", self._products(size, rows, on_gpu=True)
        else:
            yield "cpu: matrix products", self._products(size, rows, on_gpu=False)

    def _mapped_rate(self, size: float) -> float:
        """Bytes/s of a pass over mapped weights."""
        spare = self.machine.host_bytes
        parts = self.needed()[Tier.CPU]
        left = None if spare is None else spare - sum(parts.values())
        share = cached_share(size, left)
        if share == 1.0:
            return math.inf  # in memory after the first pass
        return read_rate(self.constants.mapped_share * self.machine.disk_read, self.machine.disk_read_cached, share)

    def _products(self, size: float, rows: int, on_gpu: bool) -> float:
        """Seconds of ``rows`` rows times matrices of ``size`` bytes."""
        site, constants = self._site(on_gpu), self.constants
        compute = constants.gpu_compute_share if on_gpu else constants.compute_share
        memory = constants.gpu_memory_share if on_gpu else constants.memory_share
        values = size * self.settings.format.usual.values / self.settings.format.usual.bytes
        width = math.sqrt(self.shape.hidden_size * self.shape.ffn_size)
        rate = compute * site.matrix_rate(str(self.job.dtype), max(rows, _ARITHMETIC_ROWS), width)
        experts = self.shape.options.get("experts")
        met = 1.0 if not experts else float(self.shape.options["experts_per_token"]) / float(experts)
        read = 1.0 if not experts else 1 - (1 - met) ** rows
        return max(2 * rows * values * met / rate, read * size / (memory * site.memory))

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

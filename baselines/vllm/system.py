"""vLLM with part of its weights in host memory. Prepared against its documentation; never run here (README.md)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from baselines.common.constants import only_options, read_count
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.record import SystemReport
from flexgen_bench.core.units import GIB
from flexgen_bench.models.registry import weight_bytes
from flexgen_bench.systems.contract import Capabilities, Generation, System

BACKENDS = ("uva", "prefetch")
# Of the GPU's memory, what vLLM takes for weights and cache unless told otherwise (its gpu_memory_utilization).
GPU_SHARE = 0.9
# Of that, what its activations, graphs and the cache of one batch must find beside weights, where it is computed here
# how much is offloaded. Assumed.
CACHE_SHARE = 0.3


@dataclass(frozen=True)
class Settings:
    """backend: how weights come back: read over the link where they are used (uva), or copied ahead (prefetch).
    cpu_offload_gb: GiB of weights in host memory (uva); None: what the GPU has no room for. group_size, num_in_group:
    of each group of so many layers, so many are offloaded (prefetch)."""

    backend: str = "uva"
    cpu_offload_gb: float | None = None
    group_size: int = 2
    num_in_group: int = 1

    @staticmethod
    def of(options: Mapping[str, Any]) -> Settings:
        """Raises UserError naming an option."""
        only_options(options, ("backend", "cpu_offload_gb", "group_size", "num_in_group"))
        backend = str(options.get("backend") or "uva")
        if backend not in BACKENDS:
            raise unknown_choice("system.options.backend", backend, BACKENDS)
        size = options.get("cpu_offload_gb")
        is_number = isinstance(size, int | float) and not isinstance(size, bool)
        if size is not None and not (is_number and 0 <= size < math.inf):
            raise UserError("system.options.cpu_offload_gb", size, "GiB of at least 0, or null")
        group, num = read_count(options, "group_size") or 2, read_count(options, "num_in_group") or 1
        if num > group:
            raise UserError("system.options.num_in_group", num, f"at most group_size = {group}")
        return Settings(backend, None if size is None else float(size), group, num)

    def arguments(self, weights: int, gpu_bytes: int | None) -> dict[str, Any]:
        """Engine arguments (vllm.config.offload). weights: bytes of the model."""
        if self.backend == "prefetch":
            return {
                "offload_backend": "prefetch",
                "offload_group_size": self.group_size,
                "offload_num_in_group": self.num_in_group,
            }
        return {"offload_backend": "uva", "cpu_offload_gb": self.offloaded(weights, gpu_bytes) / GIB}

    def offloaded(self, weights: int, gpu_bytes: int | None) -> float:
        """Bytes of weights in host memory."""
        if self.backend == "prefetch":
            return weights * self.num_in_group / self.group_size
        if self.cpu_offload_gb is not None:
            return min(self.cpu_offload_gb * GIB, weights)
        if gpu_bytes is None:
            return 0.0
        return max(0.0, weights - GPU_SHARE * (1 - CACHE_SHARE) * gpu_bytes)


class VLLMSystem(System):
    """Options: ``Settings``. Its scheduler decides which sequences are computed together; batch_size bounds them."""

    capabilities: ClassVar[Capabilities] = Capabilities(accelerators=("cuda",), needs=("torch", "vllm"), gpu_cap=False)
    _engine: Any = None

    def check(self) -> None:
        self._settings = Settings.of(self.spec.system_options)

    def load(self, batch_size: int) -> None:
        self.close()
        import vllm

        spec = self.spec
        self._params = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=str(self.files.checkpoint),
            dtype=spec.dtype.value,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            enable_prefix_caching=False,
            max_num_seqs=batch_size,
            max_model_len=spec.workload.prompt_len + spec.workload.gen_len,
            gpu_memory_utilization=GPU_SHARE * self._share_of_card,
            seed=0,
            **self._settings.arguments(self._weights, spec.hardware.gpu_memory_bytes),
        ).llm_engine

    @property
    def _share_of_card(self) -> float:
        """Of the card's memory, what the cell may have."""
        import torch

        cap = self.spec.hardware.gpu_memory_bytes
        return 1.0 if cap is None else min(1.0, cap / torch.cuda.get_device_properties(0).total_memory)

    @property
    def _weights(self) -> int:
        return weight_bytes(self.spec.model.shape, self.spec.dtype)

    def generate(self, prompts: Sequence[Sequence[int]], gen_len: int, progress: Progress) -> Generation:
        """All at once. The prefill ends when every prompt has its first token: where vLLM starts some later than
        others have begun to decode, decoding between is counted as prefill."""
        params = self._params(
            temperature=0.0, max_tokens=gen_len, min_tokens=gen_len, ignore_eos=True, detokenize=False
        )
        engine, begin = self._engine, time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, params)
        found: dict[str, tuple[int, ...]] = {}
        first_s: float | None = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                found[output.request_id] = tuple(output.outputs[0].token_ids)
            if first_s is None and len(found) == len(prompts):
                first_s = time.perf_counter() - begin
            done = sum(map(len, found.values()))
            progress("decode", max(0, done - len(found)), len(prompts) * (gen_len - 1))
        wall = time.perf_counter() - begin
        first = wall if first_s is None else first_s
        return Generation(tuple(found[str(n)] for n in range(len(prompts))), first, wall - first)

    def report(self) -> SystemReport:
        share = self._settings.offloaded(self._weights, self.spec.hardware.gpu_memory_bytes) / self._weights
        shares = {tier: part for tier, part in (("gpu", 1 - share), ("cpu", share)) if part}
        return SystemReport(
            requested=dict(self.spec.system_options),
            realised={"weights": shares},
            lowest_tier="cpu" if share else "gpu",
            notes=("vLLM schedules by itself: prefill ends with the last prompt's first token",),
        )

    def close(self) -> None:
        self._engine = None

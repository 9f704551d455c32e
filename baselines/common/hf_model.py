"""A transformers model on a machine, as its eager implementation computes it: seconds of a forward pass and memory that
it takes.

A KV cache grows by joining: each layer's new cache is written beside its old one, and all old ones are there until the
pass has ended. So a cache takes twice its size on the GPU, and that, not the weights, is what limits the batch of an
offloading system.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from baselines.common.eager import EagerCompute
from baselines.common.machine import Machine
from baselines.common.model_size import ModelSize
from flexgen_bench.core.job import Job

# Passes over a prompt's scores: written, masked (read, written), softmax to float32 (read 1, written 2), to the model's
# dtype (read 2, written 1), read; where the mask is also bounded from below (OPT) read and written once more.
SCORE_PASSES = 11
# What a prompt's attention holds of its scores: in the model's dtype, and the float32 weights made of them.
SCORE_TENSORS = 4
# Old and new cache are joined (read, written), then read: a third of the memory rate.
DECODE_ATTENTION_SHARE = 1 / 3
# Growing tensors leave holes behind: of what torch sets aside some 6 % are lost.
FRAGMENTATION = 1.06
HIDDEN_TENSORS = 6
# Launches of one layer from Python, in the machine's own step overhead; they run ahead of a GPU that has more to do.
STEPS_PER_LAYER = 8

Parts = dict[str, float]


@dataclass(frozen=True)
class Compute:
    """Seconds of a pass by what takes them."""

    products_s: float
    attention_s: float
    elementwise_s: float
    launches_s: float

    @property
    def seconds(self) -> float:
        """Launches hide behind work, or work behind launches."""
        return max(self.products_s + self.attention_s + self.elementwise_s, self.launches_s)

    def parts(self, lane: str, phase: str) -> Parts:
        return {
            f"{lane}: matrix products": self.products_s,
            f"{lane}: {phase} attention": self.attention_s,
            f"{lane}: elementwise": self.elementwise_s,
        }


@dataclass(frozen=True)
class HFModel:
    """A model and a job's lengths on a machine."""

    size: ModelSize
    machine: Machine
    prompt_len: int
    gen_len: int

    @staticmethod
    def of(job: Job) -> HFModel:
        size = ModelSize(job.shape, job.dtype)
        return HFModel(size, Machine(job.hardware), job.prompt_len, job.gen_len)

    @property
    def lane(self) -> str:
        return "gpu" if self.machine.has_gpu else "cpu"

    @cached_property
    def eager(self) -> EagerCompute:
        return EagerCompute(self.size, self.machine.compute, SCORE_PASSES, DECODE_ATTENTION_SHARE)

    @property
    def decode_context(self) -> float:
        """Tokens in the cache in the middle of decoding."""
        return self.prompt_len + self.gen_len / 2

    def prefill(self, batch: int) -> Compute:
        rows, layers = batch * self.prompt_len, self.size.shape.num_layers
        # Logits of all positions were computed until 2024.
        attention = layers * self.eager.prefill_attention(batch, self.prompt_len)
        return self._compute(rows, attention)

    def decode(self, batch: int, attention_s: float | None = None) -> Compute:
        """attention_s: seconds in one layer, if it is computed elsewhere."""
        if attention_s is None:
            attention_s = self.eager.decode_attention(batch, self.decode_context)
        return self._compute(batch, self.size.shape.num_layers * attention_s)

    def _compute(self, rows: int, attention: float) -> Compute:
        layers, eager = self.size.shape.num_layers, self.eager
        products = eager.attention_products(rows) + eager.mlp_products(rows)
        elementwise = eager.attention_elementwise(rows) + eager.mlp_elementwise(rows)
        return Compute(
            layers * products + eager.head_products(rows),
            attention,
            layers * elementwise,
            layers * STEPS_PER_LAYER * self.machine.compute.step,
        )

    def cache_bytes(self, batch: int, tokens: int) -> float:
        return batch * tokens * self.size.kv_bytes_per_token

    def working_parts(self, batch: int, *, cache_here: bool = True, fragmentation: float = FRAGMENTATION) -> Parts:
        """Bytes beside the weights where it is computed, at the worst moment: the end of the prompt, or of decoding.
        fragmentation: what growing caches take over their size."""
        size, shape = self.size, self.size.shape
        tokens = batch * self.prompt_len
        hidden = size.bytes_of(tokens * shape.hidden_size)
        scores = size.bytes_of(SCORE_TENSORS * batch * shape.num_heads * self.prompt_len**2)
        logits = size.bytes_of(tokens * shape.vocab_size)
        up = size.bytes_of(tokens * size.inner_width)
        prompt = max(scores + HIDDEN_TENSORS * hidden, logits + 2 * hidden, 2 * up + 3 * hidden)
        first = self.cache_bytes(batch, self.prompt_len) * fragmentation
        last = 2 * self.cache_bytes(batch, self.prompt_len + self.gen_len) * fragmentation
        if not cache_here:
            first = last = 0.0
        end_of_prompt = {"kv_cache": first, "workspace": prompt}
        end = {"kv_cache": last, "workspace": 2 * size.bytes_of(batch * shape.vocab_size)}
        worst = max(end_of_prompt, end, key=lambda parts: sum(parts.values()))
        return worst | {"driver and context": self.machine.process_bytes}

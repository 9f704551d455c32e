"""Llama (Touvron et al. 2023; 3.x with all kinds of scaled rotary positions) and its relatives of exactly this form.

Options of ``ModelShape``: rope_theta, rope_scaling (None or a mapping, ``models/rope.py``), norm_eps,
attention_bias, mlp_bias, activation.
"""

from __future__ import annotations

from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.llama_like import LlamaLike


class Llama(LlamaLike):
    name = "llama"
    architecture = "LlamaForCausalLM"
    model_type = "llama"
    bias_keys = ("attention_bias", "mlp_bias")

    def eps_of(self, shape: ModelShape) -> float:
        return float(shape.options.get("norm_eps", 1e-5))  # of every published Llama


FAMILIES = (Llama(),)

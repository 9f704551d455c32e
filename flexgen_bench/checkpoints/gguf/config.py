"""What a GGUF file says about its model, as the config of transformers.

Keys: llama.cpp's (gguf-py/gguf/constants.py, src/llama-model.cpp). Whatever a file states in the namespace of its
architecture and the model here would not compute is refused, so every key must be known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flexgen_bench.checkpoints.gguf.header import GGUFHeader
from flexgen_bench.checkpoints.gguf.names import ROPE_FACTORS, Architecture, architecture_of
from flexgen_bench.checkpoints.gguf.rope import rope_parameters
from flexgen_bench.core.errors import StoreError

# Understood below, or told by the others.
_KNOWN = frozenset(
    (
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.scale",
        "attention.sliding_window",
        "attention.causal",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "tensor_data_layout",
    )
)
# Harmless with these values, and not computed with others.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
}


def config_from_gguf(header: GGUFHeader) -> dict[str, Any]:
    """The ``config.json`` of the model in a GGUF file, without tokens' ids.

    Raises StoreError naming the key and its value for another architecture, for what is missing, and for what would
    change the results and is not computed here.
    """
    architecture = architecture_of(header)
    get = _Getter(header, architecture)
    _check_keys(header, architecture)
    hidden, heads = get.count("embedding_length"), get.count("attention.head_count")
    head_dim = get.count("attention.key_length", hidden // heads)
    get.must_be("attention.value_length", head_dim)
    get.must_be("rope.dimension_count", head_dim)
    positions = get.count("context_length")
    scale = get.number("attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise get.refused("attention.scale", f"0 or {head_dim**-0.5:g}, one over the root of the head size")
    rope = rope_parameters(header, head_dim, positions)
    window, reach = get.count("attention.sliding_window", 0), positions * rope.get("factor", 1.0)
    if 0 < window < reach:
        raise get.refused("attention.sliding_window", f"0, or at least the {reach:g} positions that the model can see")
    return {
        "architectures": [architecture.model],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": get.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": get.count("feed_forward_length"),
        "vocab_size": get.count("vocab_size", _num_tokens(header)),
        "max_position_embeddings": positions,
        # Stored in single precision; the decimal number that was meant.
        "rms_norm_eps": float(f"{get.number('attention.layer_norm_rms_epsilon'):.6g}"),
        "hidden_act": "silu",
        "attention_bias": _any_tensor(header, "attn", "bias"),
        "mlp_bias": _any_tensor(header, "ffn", "bias"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": rope,
    }


def _check_keys(header: GGUFHeader, architecture: Architecture) -> None:
    for key, value in header.metadata.items():
        prefix, _, rest = key.partition(".")
        if prefix != architecture.name:
            continue
        if rest in _NEUTRAL:
            if value not in _NEUTRAL[rest]:
                kind = (
                    "a mixture of experts is not supported"
                    if rest.startswith("expert")
                    else ("the model here would be computed without it")
                )
                allowed = " or ".join(repr(v) for v in _NEUTRAL[rest])
                raise StoreError(f"{header.path}: {key} is {value!r}; {allowed} can be read: {kind}.")
        elif rest not in _KNOWN:
            raise StoreError(
                f"{header.path}: {key} is {value!r}. What it does to the model is not known here, so it is refused."
            )


def _num_tokens(header: GGUFHeader) -> int | None:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None


def _any_tensor(header: GGUFHeader, part: str, ending: str) -> bool:
    return any(
        name.startswith("blk.") and name.split(".")[2].startswith(part) and name.endswith(f".{ending}")
        for name in header.tensors
        if name != ROPE_FACTORS
    )


class _Getter:
    """Values of the architecture's namespace. A default of None: the key must be there."""

    def __init__(self, header: GGUFHeader, architecture: Architecture) -> None:
        self._header, self._space = header, architecture.name

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number; a list with one for every layer must hold the same number everywhere."""
        value = self._find(key, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if type(value) is not int or value < 0 or (value == 0 and default != 0):
            raise self.refused(key, "one whole number above 0, the same for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._find(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refused(key, "a number")
        return float(value)

    def must_be(self, key: str, value: int) -> None:
        if self.count(key, value) != value:
            raise self.refused(key, f"{value}, the size of a head")

    def refused(self, key: str, allowed: str) -> StoreError:
        value = self._header.metadata.get(f"{self._space}.{key}")
        return StoreError(f"{self._header.path}: {self._space}.{key} is {value!r}; what can be read is {allowed}.")

    def _find(self, key: str, default: Any) -> Any:
        value = self._header.metadata.get(f"{self._space}.{key}", default)
        if value is None:
            raise StoreError(f"{self._header.path} does not state {self._space}.{key}. Fetch or convert it again.")
        return value

"""What a GGUF file says about its model: the keys that llama.cpp reads (gguf-py/gguf/constants.py, src/models/).

Only what llama.cpp computes is written: an option of the model that no key can say, or that llama.cpp would compute
otherwise, is refused by ``check_expressible``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.activations import activation_of
from flexgen_bench.models.registry import family
from flexgen_bench.models.rope import positions_of

# Layers of the models whose scores llama.cpp divides by another number (src/models/gemma2.cpp, gemma3.cpp).
_LARGEST = {"gemma2": 46, "gemma3": 62}
# Every so many layers, llama.cpp has one without a window.
_PERIOD = {"gemma2": 2, "gemma3": 6}
_YARN = {"rope_type", "factor", "original_max_position_embeddings"}


def keys_of(shape: ModelShape, architecture: str) -> Iterator[tuple[str, int | float | str]]:
    """Key and value of all that the architecture's namespace states."""
    options = shape.options
    eps = family(shape.family).config_from_shape(shape)["rms_norm_eps"]
    yield from (
        ("block_count", shape.num_layers),
        ("context_length", positions_of(options.get("rope_scaling"), shape.max_positions)),
        ("embedding_length", shape.hidden_size),
        ("feed_forward_length", shape.ffn_size),
        ("attention.head_count", shape.num_heads),
        ("attention.head_count_kv", shape.num_kv_heads),
        ("attention.key_length", shape.head_dim),
        ("attention.value_length", shape.head_dim),
        ("attention.layer_norm_rms_epsilon", float(eps)),
        ("vocab_size", shape.vocab_size),
        ("rope.dimension_count", shape.head_dim),
        ("rope.freq_base", float(options.get("rope_theta", 10000.0))),
    )
    yield from _scaling(options.get("rope_scaling"))
    if shape.family == "mixtral":
        yield "expert_count", int(options["experts"])
        yield "expert_used_count", int(options["experts_per_token"])
    if shape.family in _PERIOD:
        yield from _gemma(shape)


def _gemma(shape: ModelShape) -> Iterator[tuple[str, int | float | str]]:
    options = shape.options
    yield "attention.sliding_window", int(options.get("window") or 0)
    if options.get("attention_soft_cap"):
        yield "attn_logit_softcapping", float(options["attention_soft_cap"])
    if options.get("logit_soft_cap"):
        yield "final_logit_softcapping", float(options["logit_soft_cap"])
    if shape.family == "gemma3":
        yield "rope.freq_base_swa", float(options.get("rope_local_theta", 10000.0))


def _scaling(scaling: Mapping[str, Any] | None) -> Iterator[tuple[str, int | float | str]]:
    if scaling is None or scaling["rope_type"] == "llama3":  # which is a tensor of factors
        return
    yield "rope.scaling.type", str(scaling["rope_type"])
    yield "rope.scaling.factor", float(scaling["factor"])
    if scaling["rope_type"] == "yarn":
        yield "rope.scaling.original_context_length", int(scaling["original_max_position_embeddings"])


def rope_factors(shape: ModelShape) -> list[float]:
    """What Llama 3.1's scaling divides each frequency by: long wavelengths by the factor, short ones by one, between
    them a ramp (conversion/llama.py: ``generate_extra_tensors``)."""
    scaling = shape.options["rope_scaling"]
    theta, dim, factor = float(shape.options["rope_theta"]), shape.head_dim, float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    factors = []
    for pair in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (pair / dim)
        ramp = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
        ramp = min(1.0, max(0.0, ramp))
        factors.append(1 / ((1 - ramp) / factor + ramp))
    return factors


def check_expressible(shape: ModelShape, tokens: int) -> None:
    """Raise CannotRun naming an option that llama.cpp would not follow. tokens: of the longest sequence."""
    for option, allowed, is_followed in _rules(shape, tokens):
        if not is_followed(shape.options.get(option)):
            raise CannotRun(
                f"llama.cpp would not compute model.options.{option}={shape.options.get(option)!r} of "
                f"{shape.name}: it has {allowed}. Take another model, or another system for this one"
            )


_Rule = tuple[str, str, Callable[[Any], bool]]


def _rules(shape: ModelShape, tokens: int) -> Iterator[_Rule]:
    is_gemma = shape.family in _PERIOD
    activation = activation_of("activation", "gelu_pytorch_tanh" if is_gemma else "silu")
    yield "activation", activation, lambda value: value is None or activation_of("activation", value) == activation
    yield "rope_scaling", _scalings(shape), lambda value: _is_known(value, shape)
    if not is_gemma:
        # Not read for these architectures: every token sees all others.
        within = f"no window (one of at least the {tokens} tokens of a sequence here is none)"
        yield "window", within, lambda value: value is None or value >= tokens
        return
    yield "attention_bias", "no biases there", lambda value: not value
    heads = shape.num_heads
    scalar = shape.hidden_size // heads if shape.num_layers == _LARGEST[shape.family] else shape.head_dim
    yield "query_scalar", str(scalar), lambda value: (256 if value is None else value) == scalar
    full = [n for n in range(shape.num_layers) if (n + 1) % _PERIOD[shape.family] == 0]
    has_window = shape.options.get("window") is not None
    yield "full_layers", str(full), lambda value: not has_window or list(value or ()) == full


def _scalings(shape: ModelShape) -> str:
    known = "none, linear, yarn with its usual numbers"
    return known + (", llama3" if shape.family == "llama" else "")


def _is_known(scaling: Mapping[str, Any] | None, shape: ModelShape) -> bool:
    if scaling is None:
        return True
    kind = scaling["rope_type"]
    if kind == "llama3":
        return shape.family == "llama"
    return kind == "linear" or (kind == "yarn" and set(scaling) == _YARN)

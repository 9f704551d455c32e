"""The rotary positions that a GGUF file asks for, as ``rope_parameters`` of transformers.

How llama.cpp reads the keys (src/llama-model.cpp, src/llama-context.cpp): without a type, a factor scales linearly; the
old key ``rope.scale_linear`` stands in for a missing factor; YaRN extrapolates fully (ext_factor 1) between 32 and 1
rotations.
"""

from __future__ import annotations

import math
from typing import Any

from flexgen_bench.checkpoints.gguf.header import GGUFHeader
from flexgen_bench.checkpoints.gguf.names import ROPE_FACTORS, architecture_of
from flexgen_bench.checkpoints.gguf.tensors import check_readable, single_precision
from flexgen_bench.core.errors import StoreError

_KINDS = ("none", "linear", "yarn")


def rope_parameters(header: GGUFHeader, head_dim: int, positions: int) -> dict[str, Any]:
    """Base and scaling. head_dim: values of a head, all of which are rotated. positions: the model's context length."""
    theta = _number(header, "freq_base", 10000.0)
    kind = header.metadata.get(_key(header, "scaling.type"), "linear")
    if kind not in _KINDS:
        raise _refused(header, "scaling.type", f"one of {', '.join(_KINDS)}")
    factor = _number(header, "scaling.factor", 0.0) or _number(header, "scale_linear", 0.0) or 1.0
    if kind == "none":
        factor = 1.0
    divided = _stored_factors(header, head_dim)
    if kind == "yarn" and factor != 1.0:
        if divided is not None:
            raise _refused(header, "scaling.type", f"none or linear beside {ROPE_FACTORS}")
        return _yarn(header, factor, positions) | {"rope_theta": theta}
    if divided is not None:
        return _divided([each * factor for each in divided], positions) | {"rope_theta": theta}
    if factor != 1.0:
        return {"rope_type": "linear", "factor": factor, "rope_theta": theta}
    return {"rope_type": "default", "rope_theta": theta}


def _yarn(header: GGUFHeader, factor: float, positions: int) -> dict[str, Any]:
    """YaRN (Peng et al. 2023). llama.cpp scales attention by 0.1 ln(factor) + 1, transformers' own default."""
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        value = _number(header, f"scaling.{key}", 1.0)
        if value != 1.0 and value >= 0:  # a negative one stands for "as usual"
            raise _refused(header, f"scaling.{key}", "1, or left out")
    original = header.metadata.get(_key(header, "scaling.original_context_length"), positions)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(original),
        "beta_fast": _number(header, "scaling.yarn_beta_fast", 32.0),
        "beta_slow": _number(header, "scaling.yarn_beta_slow", 1.0),
    }


def _divided(factors: list[float], positions: int) -> dict[str, Any]:
    """Every frequency divided by its own number, at every length: transformers' "longrope" with one list for all."""
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
        "short_factor": factors,
        "long_factor": factors,
    }


def _stored_factors(header: GGUFHeader, head_dim: int) -> list[float] | None:
    """What ``rope_freqs.weight`` divides the frequencies by (llama 3.1 and later have it); None if all are 1."""
    info = header.tensors.get(ROPE_FACTORS)
    if info is None:
        return None
    if info.shape != (head_dim // 2,):
        raise StoreError(
            f"{header.path}: tensor {ROPE_FACTORS} has shape {info.shape}, the model needs {(head_dim // 2,)}."
        )
    check_readable(header)
    factors = [float(value) for value in single_precision(info)]
    if not all(math.isfinite(value) and value > 0 for value in factors):
        raise StoreError(f"{header.path}: tensor {ROPE_FACTORS} holds values that are not above 0.")
    return None if all(value == 1.0 for value in factors) else factors


def _key(header: GGUFHeader, key: str) -> str:
    return f"{architecture_of(header).name}.rope.{key}"


def _number(header: GGUFHeader, key: str, default: float) -> float:
    value = header.metadata.get(_key(header, key), default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refused(header, key, "a number")
    return float(value)


def _refused(header: GGUFHeader, key: str, allowed: str) -> StoreError:
    return StoreError(
        f"{header.path}: {_key(header, key)} is {header.metadata.get(_key(header, key))!r}; "
        f"what can be read is {allowed}."
    )

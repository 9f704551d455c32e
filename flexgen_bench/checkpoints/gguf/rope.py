"""The rotary positions that a GGUF file asks for, as ``rope_parameters`` of transformers.

How llama.cpp reads the keys (src/llama-model.cpp, src/llama-context.cpp): without a type, a factor scales linearly; the
old key ``rope.scale_linear`` stands in for a missing factor; YaRN extrapolates fully (ext_factor 1) between 32 and 1
rotations.
"""

from __future__ import annotations

import math
from typing import Any

from flexgen_bench.checkpoints.gguf.header import GGUFHeader
from flexgen_bench.checkpoints.gguf.names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, architecture_of
from flexgen_bench.checkpoints.gguf.tensors import check_readable, single_precision
from flexgen_bench.core.errors import StoreError

_KINDS = ("none", "linear", "yarn")


def rope_parameters(header: GGUFHeader, head_dim: int, positions: int, theta: float = 10000.0) -> dict[str, Any]:
    """Base and scaling. head_dim: values of a head, all of which are rotated. positions: the model's context length.
    theta: the base where the file states none."""
    theta = _number(header, "freq_base", theta)
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


def longrope_parameters(header: GGUFHeader, rotated: int, positions: int, original: int) -> dict[str, Any] | None:
    """Scaling of Phi's files: LongRoPE (Ding et al. 2024) where they have its two lists of factors, else none.

    rotated: values of a head that are. positions, original: the model's context length, and that before it was
    extended."""
    for key in ("scaling.type", "scaling.factor", "scale_linear", "scaling.yarn_attn_factor"):
        if header.metadata.get(_key(header, key), "none") not in ("none", "longrope", 0.0, 1.0):
            raise _refused(header, key, "longrope, which follows from the tensors of factors")
    long, short = (_factors(header, name, rotated // 2) for name in (LONG_FACTORS, SHORT_FACTORS))
    if long is None and short is None:
        return None
    if long is None or short is None:
        raise StoreError(f"{header.path} has one of {LONG_FACTORS} and {SHORT_FACTORS}, not both. Convert it again.")
    scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    extended = positions / original
    usual = math.sqrt(1 + math.log(extended) / math.log(original)) if extended > 1 else 1.0
    stated = _number(header, "scaling.attn_factor", usual)
    return scaling if math.isclose(stated, usual, rel_tol=1e-6) else scaling | {"attention_factor": stated}


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
    factors = _factors(header, ROPE_FACTORS, head_dim // 2)
    return None if factors is None or all(value == 1.0 for value in factors) else factors


def _factors(header: GGUFHeader, name: str, count: int) -> list[float] | None:
    """The numbers that a tensor divides ``count`` frequencies by; None if it is not there, or not of this
    architecture."""
    info = header.tensors.get(name)
    if info is None or name not in architecture_of(header).of_config:
        return None
    if info.shape != (count,):
        raise StoreError(f"{header.path}: tensor {name} has shape {info.shape}, the model needs {(count,)}.")
    check_readable(header)
    factors = [float(value) for value in single_precision(info)]
    if not all(math.isfinite(value) and value > 0 for value in factors):
        raise StoreError(f"{header.path}: tensor {name} holds values that are not above 0.")
    return factors


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

"""Rotary positions in a checkpoint's config: their base, how they are scaled, and how far they reach.

Kinds and defaults are those of transformers 5 (``modeling_rope_utils``): old configs have ``rope_theta`` and
``rope_scaling`` (with ``type`` or
``rope_type``), newer ones ``rope_parameters``; where both are, ``rope_scaling`` counts. The formulas are in
``kernels/rotary.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flexgen_bench.core.errors import UserError

DEFAULT_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"

# Of each kind, the numbers it needs and those it may have beside them.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL),
    "longrope": ("factor", _ORIGINAL),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor",),
}
_LISTS: Mapping[str, tuple[str, ...]] = {"longrope": ("short_factor", "long_factor")}


@dataclass(frozen=True)
class Rope:
    """theta: the base. scaling: None, or its kind (``rope_type``) and numbers. reach: the positions it is made for.
    share: of a head's values that are rotated, the first ones."""

    theta: float
    scaling: dict[str, Any] | None
    reach: int
    share: float = 1.0


def rotated(head_dim: int, share: float) -> int:
    """How many values of a head are rotated."""
    return int(head_dim * share)


def rope_of(
    config: Mapping[str, Any], positions: int, head_dim: int, share: float | None = None, theta: float = DEFAULT_THETA
) -> Rope:
    """positions: ``max_position_embeddings``. share, theta: where the config says nothing; share None: all, and no
    config may say otherwise. UserError names what is not known or not of the right type."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(
            f"config.json: {nested[0]} of rope_parameters", given[nested[0]], "left out: one rope for all layers"
        )
    theta = float(given.pop("rope_theta", None) or config.get("rope_theta") or theta)
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share is None and partial is not None and float(partial) != 1.0:
        raise UserError("config.json: partial_rotary_factor", partial, "1, or left out")
    share = 1.0 if share is None else float(share if partial is None else partial)
    dim = rotated(head_dim, share)
    if not 0 < dim <= head_dim:
        raise UserError("config.json: partial_rotary_factor", share, "above 0 and at most 1")
    if dim % 2 or head_dim % 2:
        name, value = ("head_dim", head_dim) if share == 1 else ("partial_rotary_factor", share)
        raise UserError(f"config.json: {name}", value, "even: values are rotated in pairs")
    kind = str(given.get("rope_type") or given.get("type") or "default")
    if kind not in _NEEDED:
        raise UserError("config.json: rope_type", kind, f"one of {', '.join(_NEEDED)}")
    if kind == "default":
        return Rope(theta, None, positions, share)
    scaling = _scaling(kind, given, config, positions, dim)
    return Rope(theta, scaling, _reach(kind, scaling, positions), share)


def positions_of(scaling: Mapping[str, Any] | None, reach: int) -> int:
    """The ``max_position_embeddings`` of a config with this scaling and reach: the inverse of what ``rope_of`` does."""
    kind = (scaling or {}).get("rope_type")
    if scaling is None or kind not in ("linear", "dynamic"):
        return reach
    return math.ceil(reach / max(1.0, float(scaling["factor"])) - 1e-9)


def steady_positions(scaling: Mapping[str, Any] | None) -> int | None:
    """Up to which length of its sequence a token's rotation depends on its position alone; None: always."""
    if scaling is None or scaling["rope_type"] not in ("dynamic", "longrope"):
        return None
    return int(scaling[_ORIGINAL])


def _scaling(
    kind: str, given: Mapping[str, Any], config: Mapping[str, Any], positions: int, dim: int
) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": kind}
    values = dict(given)
    if kind == "dynamic":  # transformers looks at nothing else
        values[_ORIGINAL] = positions
    elif _ORIGINAL in _NEEDED[kind]:
        outside = config.get(_ORIGINAL)
        values[_ORIGINAL] = outside or values.get(_ORIGINAL) or positions
    if kind in ("yarn", "longrope") and values.get("factor") is None:
        values["factor"] = positions / values[_ORIGINAL]
    for key in _NEEDED[kind]:
        scaling[key] = _checked(kind, key, values.get(key), lambda v: _is_number(v) and v > 0)
    for key in _OPTIONAL.get(kind, ()):
        if values.get(key) is not None:
            scaling[key] = _checked(kind, key, values[key], lambda v: _is_number(v) and v >= 0)
    for key in _LISTS.get(kind, ()):
        scaling[key] = _checked(kind, key, values.get(key), lambda v: _is_list(v, dim // 2))
    if kind == "yarn" and values.get("truncate") is not None:
        scaling["truncate"] = bool(values["truncate"])
    if kind == "dynamic" and dim < 4:
        raise UserError("config.json: head_dim", dim, "at least 4 with rope_type dynamic")
    return scaling


def _reach(kind: str, scaling: Mapping[str, Any], positions: int) -> int:
    """Old configs of linear and dynamic scaling state the positions before it; yarn's may state either."""
    factor = max(1.0, float(scaling["factor"]))
    if kind in ("linear", "dynamic"):
        return math.floor(positions * factor + 1e-9)
    if kind == "yarn":
        return max(positions, math.floor(scaling[_ORIGINAL] * factor + 1e-9))
    return positions


def _checked(kind: str, key: str, value: Any, is_right: Callable[[Any], bool]) -> Any:
    if not is_right(value):
        what = "a list of head_dim / 2 numbers" if key in _LISTS.get(kind, ()) else "a number above 0"
        raise UserError(f"config.json: {key} of rope_type {kind}", value, what)
    return list(value) if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(map(_is_number, value))

"""What a prediction chose, in words short enough for a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.codec import as_mapping
from flexgen_bench.core.digits import significant

# Told elsewhere on a card, or too long for a cell.
_ELSEWHERE = ("policy", "why", "binding", "gains")
_PLACED = (("weights", "weights"), ("experts", "experts"), ("kv_cache", "KV cache"), ("activations", "hidden"))
_SHAPE = ("gpu_batch_size", "num_gpu_batches")


def settings_text(settings: Mapping[str, Any]) -> str:
    """``48x3; weights gpu 20 %, cpu 80 %; KV cache cpu; ...``, then a system's own settings: ``name=value``, ``name``,
    ``no name``."""
    own = {k: v for k, v in settings.items() if k not in _ELSEWHERE and v is not None}
    parts = [policy_text(settings["policy"])] if settings.get("policy") else []
    shape = [own.pop(key) for key in _SHAPE] if set(_SHAPE) <= set(own) else []
    parts += ["x".join(map(str, shape))] if shape else []
    return "; ".join([*filter(None, parts), *(_setting(key, own[key]) for key in own)])


def policy_text(policy: Any) -> str:
    """A ``to_json(Policy)`` in words; what is as usual is left out."""
    if not isinstance(policy, Mapping):
        return str(policy)
    parts = [f"{policy.get('gpu_batch_size')}x{policy.get('num_gpu_batches')}"]
    for key, name in _PLACED:
        if isinstance(policy.get(key), Mapping):
            parts.append(f"{name} {placement_text(policy[key])}")
    # Of a cache that is on the gpu altogether it says nothing.
    if policy.get("attention") == "cpu" and as_mapping(policy.get("kv_cache")).get("gpu") != 1:
        moved = policy.get("kv_moved")
        parts.append("attention on the cpu" + (f", {_percent(moved)} of the cache there moved" if moved else ""))
    if policy.get("offloaded") == "in_place":
        parts.append("offloaded layers computed in place")
    if policy.get("expert_loads") == "touched":
        parts.append("touched experts loaded")
    if policy.get("schedule") not in (None, "block"):
        parts.append(str(policy["schedule"]))
    if policy.get("prefill_chunk"):
        parts.append(f"prompts in chunks of {policy['prefill_chunk']}")
    if policy.get("overlap") is False:
        parts.append("no overlap")
    if policy.get("prefetch"):
        parts.append(f"prefetch {policy['prefetch']}")
    return "; ".join(parts)


def placement_text(shares: Mapping[str, float]) -> str:
    """``gpu 20 %, cpu 80 %``; the tier alone where it has everything."""
    used = {tier: share for tier, share in shares.items() if share}
    if len(used) == 1:
        return next(iter(used))
    return ", ".join(f"{tier} {_percent(share)}" for tier, share in used.items())


def _percent(share: float) -> str:
    return f"{significant(100 * share, 3)} %"


def _setting(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return f"{key}={_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return " ".join(map(_short, value))
    return significant(value, 3) if isinstance(value, float) else str(value)

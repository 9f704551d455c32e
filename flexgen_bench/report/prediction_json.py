"""Predicted rows as JSON values, for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.simulated import Simulated
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.registry import family
from flexgen_bench.published.comparison import published_for
from flexgen_bench.report.prediction_table import model_error, speed_up


def row_json(row: Simulated, tables: Path) -> dict[str, Any]:
    """The row as JSON values; figures unrounded, units in their names."""
    job, quoted = row.job, published_for(row, tables)
    policy = row.spec.policy
    data: dict[str, Any] = {
        "evidence": Evidence.SIMULATED.value,
        "system": row.system,
        "lossy": "" if row.lossy.is_exact else str(row.lossy),
        "model": job.shape.name,
        "dtype": job.dtype.value,
        "hardware": row.hardware.name,
        "count": row.hardware.count,
        "tensor_parallel": row.hardware.tensor_parallel,
        "layers_per_rank": row.hardware.layers_per_rank,
        "capacity_bytes_by_tier": {tier.value: row.hardware.capacity_bytes(tier) for tier in Tier},
        "price_per_hour": None if row.hardware.rates is None else row.hardware.rates.price_per_hour,
        "weight_bytes": family(job.shape.family).inventory(job.shape).num_bytes(job.dtype),
        "workload": row.spec.workload.name,
        "prompt_len": job.prompt_len,
        "gen_len": job.gen_len,
        "prompts_asked_for": job.num_prompts,
        "policy_asked_for": None if policy is None else to_json(policy),
        "spec_hash": row.spec.spec_hash,
        "status": row.status.value,
        "reason": row.reason,
    }
    if row.tier:
        data |= {"tier": row.tier, "need_bytes": row.need_bytes, "capacity_bytes": row.capacity_bytes}
    if row.prediction is not None:
        data |= _figures(row.prediction)
    if quoted is not None:
        data["quoted"] = {
            "evidence": Evidence.QUOTED.value,
            "printed_as": row.model.printed_as + ("" if row.lossy.is_exact else "(c)"),
            "tok_per_s": "OOM" if quoted.out_of_memory else quoted.tok_per_s,
            "decode_tok_per_s": quoted.decode_tok_per_s,
            "policy": quoted.policy,
        }
        data |= {"model_error": model_error(row, tables), "speed_up_over_paper": speed_up(row, tables)}
    plain: dict[str, Any] = json.loads(json.dumps(data, default=str))
    return plain


def _figures(done: Prediction) -> dict[str, Any]:
    prefill_s, decode_s = done.phases_s
    return {
        "num_prompts": done.num_prompts,
        "batch_size": done.batch_size,
        "tok_per_s": done.tok_per_s,
        "decode_tok_per_s": done.decode_tok_per_s,
        "prefill_tok_per_s": done.prefill_tok_per_s,
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "total_s": done.total_s,
        "overlapped": done.overlapped,
        "block_latency_s": done.block_latency_s,
        "bytes": to_json(done.bytes),
        "lane_busy_s": to_json(done.lane_busy_s),
        "bottleneck": done.bottleneck,
        "disk_written_bytes": done.disk_written_bytes,
        "settings": to_json(done.settings),
        "notes": list(done.notes),
    }

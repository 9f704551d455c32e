"""A predicted row, as ``report.prediction_json`` writes it, as a ``Run``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.pictures.picture import Source
from flexgen_bench.pictures.run import Quantity, Run, Setting
from flexgen_bench.report.devices import devices


def run_of_prediction(row: Mapping[str, Any], file: str, prices: Mapping[str, float]) -> Run:
    """file: which holds the row. Raises KeyError, TypeError or ValueError for what is no such row."""
    name = devices({**row, "name": row["hardware"]})
    capacity = row["capacity_bytes_by_tier"]
    asked = row["prompts_asked_for"]
    many = "as many prompts as a block holds" if asked is None else f"{asked} prompts"
    lengths = f"of {row['prompt_len']} tokens, {row['gen_len']} generated each"
    price = prices.get(name, row["price_per_hour"])
    return Run(
        source=Source("", str(row["spec_hash"]), file),
        system=str(row["system"]),
        lossy=str(row["lossy"]),
        evidence=Evidence(row["evidence"]),
        status=Status(row["status"]),
        reason=str(row["reason"]),
        setting=Setting(
            machine="",
            hardware=name,
            model=str(row["model"]),
            weights="",
            dtype=str(row["dtype"]),
            workload=f"{row['workload']}: {many} {lengths}",
            threads="",
            shape="",
        ),
        hardware=name,
        workload=str(row["workload"]),
        batch_size=row.get("batch_size"),
        cpu_cap=capacity.get("cpu"),
        gpu_cap=capacity.get("gpu"),
        weight_bytes=row["weight_bytes"],
        price_per_hour=price,
        price_source="given" if name in prices else "as the machine's profile states it",
        **(_figures(row) if row["status"] == Status.OK else {}),
    )


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    prompts, new, batch = int(row["num_prompts"]), int(row["gen_len"]), int(row["batch_size"])
    blocks = max(1, -(-prompts // batch))
    prefill_s, decode_s = row["prefill_s"], row["decode_s"]  # None where phases overlap
    figures = {"throughput": Quantity(float(row["tok_per_s"])), "block_s": Quantity(float(row["block_latency_s"]))}
    if prefill_s:
        figures["first_token_s"] = Quantity(prefill_s / blocks)
        figures["input_s"] = Quantity(prefill_s / (prompts * int(row["prompt_len"])))
    if decode_s and new > 1:
        figures["later_token_s"] = Quantity(decode_s / (blocks * (new - 1)))
        figures["output_s"] = Quantity(decode_s / (prompts * new))
    return figures

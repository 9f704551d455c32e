"""What the paper prints beside a predicted row, and whether the two may be divided."""

from __future__ import annotations

from pathlib import Path

from flexgen_bench.core.simulated import Simulated
from flexgen_bench.published.lookup import Published, is_published_machine, published_values


def published_for(row: Simulated, tables: Path) -> Published | None:
    """The paper's row of this system and job; of compressed ones, the one that compresses the same. A system that was
    free to compress less, as the paper's authors were, stands beside it whatever it chose."""
    job, name = row.job, row.model.printed_as
    compressed = not row.lossy.is_exact
    values = published_values(tables, name, compressed, job.shape.name, job.prompt_len, job.gen_len)
    if values is None or values.lossy == row.lossy:
        return values
    free = row.model.follows_policy and row.spec.policy is None and not values.lossy.is_exact
    within = all(getattr(row.job.lossy, name) is not None for name in values.lossy.changed)
    return values if free and within else None


def ratio_to_published(row: Simulated, tables: Path) -> float | None:
    """Predicted / printed; None where there is nothing to divide, or no sense in it."""
    quoted = published_for(row, tables)
    if row.prediction is None or quoted is None or not quoted.tok_per_s:
        return None
    return None if why_no_ratio(row, tables) else row.prediction.tok_per_s / quoted.tok_per_s


def why_no_ratio(row: Simulated, tables: Path) -> str:
    """Why the prediction and the printed number beside it must not be divided; "" if they may be, or one of them is not
    there."""
    quoted = published_for(row, tables)
    if row.prediction is None or quoted is None or not quoted.tok_per_s:
        return ""
    if not is_published_machine(tables, row.hardware):
        return "No ratio: this is another machine than the paper's."
    if row.job.num_prompts is not None:
        return (
            "No ratio: the paper's job is another, one block of each system's own; leave out workload.num_prompts to "
            "compare."
        )
    if quoted.is_coarse:
        return f"No ratio beside {quoted.generation.value}: it is rounded to one digit."
    other = quoted.block_size not in (None, row.prediction.batch_size)
    if other and not row.model.follows_policy:
        return (
            f"No model error of {row.spec.system}: the paper ran {quoted.block_size} prompts at once, the model finds "
            "room for "
            f"{row.prediction.batch_size}. system={row.spec.system} system.options.batch_size={quoted.block_size} "
            "compares."
        )
    return ""

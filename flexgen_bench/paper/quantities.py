"""What of a run a printed quantity is: each table says which of these its metrics are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flexgen_bench.core.errors import unknown_choice
from flexgen_bench.core.prediction import Prediction

_QUANTITIES: Mapping[str, Callable[[Prediction, int], float | None]] = {
    "generation_tok_per_s": lambda run, _: run.tok_per_s,
    "generation_tok_per_s_per_gpu": lambda run, gpus: run.tok_per_s / gpus,
    "decode_tok_per_s": lambda run, _: run.decode_tok_per_s,
    "prefill_tok_per_s": lambda run, _: run.prefill_tok_per_s,
    # Prompt tokens count, too: as the paper has it for data wrangling.
    "input_output_tok_per_s": lambda run, _: run.num_prompts * (run.prompt_len + run.gen_len) / run.total_s,
    "prefill_s": lambda run, _: run.phases_s[0],
    "decode_s": lambda run, _: run.phases_s[1],
    "total_s": lambda run, _: run.total_s,
    "total_min": lambda run, _: run.total_s / 60,
    "block_latency_s": lambda run, _: run.block_latency_s,
    # From the start of what is simulated to its last token: of the row's prompts, or of a block where it says no
    # number.
    "latency_s": lambda run, _: run.total_s,
    "batch_size": lambda run, _: float(run.batch_size),
}
# These are of all prompts of a job, so they say nothing beside a printed value unless both have as many.
_OF_A_JOB = ("prefill_s", "decode_s", "total_s", "total_min")


def is_of_a_job(name: str) -> bool:
    """Whether the quantity depends on how many prompts the job has."""
    return name in _OF_A_JOB


def quantity(name: str, run: Prediction, gpus: int) -> float | None:
    """``name`` of ``run`` on ``gpus`` GPUs; None where the run does not define it (decoding of one token, a phase that
    overlaps the other)."""
    return _QUANTITIES[name](run, gpus)


def check_quantity(name: str, field: str) -> str:
    """``name`` if there is such a quantity; UserError naming ``field`` if not."""
    if name not in _QUANTITIES:
        raise unknown_choice(field, name, _QUANTITIES)
    return name

"""What a run ran with, in a line."""

from __future__ import annotations

from flexgen_bench.core.prediction import Prediction
from flexgen_bench.report.settings_text import settings_text


def run_text(run: Prediction) -> str:
    """``144 prompts in blocks of 48; bound by the link to the gpu; percent=20 80 0 100 0 100; ...``: what the run says
    of itself."""
    parts = [f"{run.num_prompts} prompts in blocks of {run.batch_size}"]
    parts += [f"bound by {run.bottleneck}"] if run.bottleneck else []
    return "; ".join([*parts, *filter(None, [settings_text(run.settings)])])

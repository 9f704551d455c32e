"""What a run ran with, in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.prediction import Prediction


def settings_text(run: Prediction) -> str:
    """``144 prompts, blocks of 48, bound by h2d, ...``: what the run says of itself."""
    parts = [f"{run.num_prompts} prompts", f"blocks of {run.batch_size}"]
    parts += [f"bound by {run.bottleneck}"] if run.bottleneck else []
    parts += [f"{k} {_short(v)}" for k, v in run.settings.items() if v not in (None, "", {})]
    return ", ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{k} {_short(v)}" for k, v in value.items() if v is not None) + ")"
    if isinstance(value, list | tuple):
        return " ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)

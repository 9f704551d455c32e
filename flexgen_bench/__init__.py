"""Large-language-model inference beyond GPU memory, inside a reproducible benchmark.

``from flexgen_bench import LLM, SamplingParams, Policy, Placement``
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from flexgen_bench.llm import LLM, Output, Score

__all__ = ["LLM", "Output", "Placement", "Policy", "SamplingParams", "Score"]


def __getattr__(name: str) -> Any:
    """LLM and its results are loaded on first use: planning and tables must not wait for torch."""
    if name in ("LLM", "Output", "Score"):
        from flexgen_bench import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

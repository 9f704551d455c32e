"""Large-language-model inference beyond GPU memory, inside a reproducible benchmark.

``from flexgen_bench import LLM, SamplingParams, Policy, Placement, Lossy, Compression``
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Read when torch is loaded, so it has to be set before. Lanes are threads: OpenMP threads that spin while they wait for
# work take the cores from the others, which makes a run on two cores several times slower. A value set outside wins.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from flexgen_bench.engine.outputs import Output, Piece, Score
    from flexgen_bench.llm.llm import LLM

__all__ = ["LLM", "Compression", "Lossy", "Output", "Piece", "Placement", "Policy", "SamplingParams", "Score"]


def __getattr__(name: str) -> Any:
    """LLM and its results are loaded on first use: planning and tables must not wait for torch. ``__version__`` is that
    of the installed package, as pyproject.toml states it."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("flexgen-bench")
        except PackageNotFoundError:  # a checkout on the path, as on a machine that has no network
            return "0+unknown"
    if name in ("LLM", "Output", "Piece", "Score"):
        from flexgen_bench.llm import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

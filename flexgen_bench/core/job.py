"""A job as it is asked of a system: like requests to one model on one machine, and what the answer must keep to."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexgen_bench.core.codec import OMITTED
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.slices import Slice


@dataclass(frozen=True)
class Job:
    """What a system, its predictor or the planner is asked for.

    num_prompts None: as many as one of the system's blocks holds, as in the FlexGen paper. lossy: what the system may
    change of the results. num_gpus: GPUs that work together, one machine of the profile each. max_latency_s: of a
    block, from its start to its last token, for systems that choose within it. part: of several ranks that share
    every layer, the slice of the one whose machine this is; ``shape`` is that of the whole model.
    """

    shape: ModelShape
    dtype: DType
    hardware: HardwareProfile
    prompt_len: int
    gen_len: int
    num_prompts: int | None = None
    lossy: Lossy = EXACT
    num_gpus: int = 1
    max_latency_s: float | None = None
    part: Slice | None = field(default=None, metadata=OMITTED)

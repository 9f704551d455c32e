"""An error inside a step or an allocation, in words: which one it was, and what to do if memory ran out."""

from __future__ import annotations

import torch

from flexgen_bench.core.errors import OutOfMemory
from flexgen_bench.core.tiers import Tier
from flexgen_bench.schedule.steps import Step


def explain(error: BaseException, step: Step) -> None:
    """Raise OutOfMemory in place of an error that means it; note the step on any other."""
    explain_memory(error, describe(step))
    error.add_note(f"in {describe(step)}")


def explain_memory(error: BaseException, doing: str) -> None:
    """Raise OutOfMemory, telling what was being done, in place of an error that means it."""
    tier = _exhausted(error)
    if tier is not None:
        cause = _first_line(error).rstrip(".")
        raise OutOfMemory(str(tier), doing, cause, _REMEDY[tier]) from error


def describe(step: Step) -> str:
    """``step load_weights of unit 3 (lane h2d)``, with micro-batch, part and token where the step has them."""
    words = [f"step {step.kind} of unit {step.unit} (lane {step.lane}"]
    if step.micro_batch_index >= 0:
        words.append(f", micro-batch {step.micro_batch_index}, token {step.token}")
    if step.part >= 0:
        words.append(f", part {step.part}")
    return "".join(words) + ")"


def _exhausted(error: BaseException) -> Tier | None:
    """The tier whose memory an error says is used up; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return Tier.GPU
    if isinstance(error, MemoryError):
        return Tier.CPU
    # torch's host allocator has no exception type of its own.
    return Tier.CPU if isinstance(error, RuntimeError) and _HOST_REFUSED in str(error) else None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


_HOST_REFUSED = "can't allocate memory"
_REMEDY = {
    Tier.GPU: "free it, or lower policy.gpu_batch_size, or move shares of weights, kv_cache or activations to cpu.",
    Tier.CPU: "free it, or lower the block size, or move shares of weights or kv_cache to disk.",
}

"""What goes wrong, in words the person at the keyboard can act on."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from flexgen_bench.core.status import Status
from flexgen_bench.core.units import format_bytes


class UserError(ValueError):
    """A value the user gave cannot be used: names the field, the value, what is allowed and the next step."""

    def __init__(self, field: str, value: Any, allowed: str, action: str = "") -> None:
        self.field, self.value, self.allowed, self.action = field, value, allowed, action
        shown = value if len(repr(value)) <= 200 else f"{repr(value)[:200]}..."
        message = f"{field} = {shown!r}: must be {allowed}."
        super().__init__(f"{message} {action}" if action else message)


def unknown_choice(field: str, value: str, choices: Iterable[str]) -> UserError:
    """The error for a name that is not in a closed list; says which ones are, and the nearest."""
    names = sorted(choices)
    near = get_close_matches(str(value), names, n=1)
    return UserError(field, value, f"one of {', '.join(names)}", f"Did you mean {near[0]!r}?" if near else "")


class DoesNotFit(UserError):
    """A plan asks for more than a tier has. Raised before any work is done."""

    def __init__(self, tier: str, need_bytes: int, capacity_bytes: int, parts: str, action: str) -> None:
        self.tier, self.need_bytes, self.capacity_bytes = tier, need_bytes, capacity_bytes
        super().__init__(
            f"policy on tier {tier}",
            f"needs {format_bytes(need_bytes)} ({parts})",
            f"within the capacity of {format_bytes(capacity_bytes)}",
            action,
        )


class StoreError(RuntimeError):
    """A weight store or checkpoint on disk is missing, damaged, incomplete or of the wrong shape."""


class CannotRun(RuntimeError):
    """A system cannot do this cell here. Becomes a record with this status and reason, never a crash."""

    def __init__(self, reason: str, status: Status = Status.UNAVAILABLE) -> None:
        super().__init__(reason)
        self.status = status


class OutOfMemory(CannotRun):
    """A tier's memory ran out in the middle of a step, although the plan fitted. Ends a cell as ``oom``."""

    def __init__(self, tier: str, doing: str, cause: str, action: str) -> None:
        self.tier, self.doing = tier, doing
        super().__init__(
            f"out of memory on tier {tier} in {doing}: {cause}. "
            f"The plan fitted; another process may have taken the memory: {action}",
            Status.OOM,
        )


class RankLost(CannotRun):
    """One of several ranks has ended before its time, or says nothing any more: the job is over on all of them. What
    had its answer keeps it."""

    def __init__(self, rank: int, reason: str) -> None:
        self.rank, self.reason = rank, reason
        super().__init__(f"rank {rank} is lost: {reason}. The job has ended on all ranks", Status.FAILED)


class NotFinite(RuntimeError):
    """A layer (None: the head) has produced NaN or infinite values: nothing after it means anything."""

    def __init__(self, layer: int | None, tensor: str) -> None:
        who = "the head" if layer is None else f"layer {layer}"
        weights = "the head" if layer is None else f"layers 0 to {layer}"
        super().__init__(
            f"{who} has produced {tensor} that are NaN or infinite. The weights of {weights} or the dtype are "
            "to blame: float16 overflows above 65504; try dtype=bfloat16 or float32, and check the checkpoint."
        )

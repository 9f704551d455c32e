"""What an error says about a cell: the status and the reason of its record."""

from __future__ import annotations

import traceback

from flexgen_bench.core.errors import CannotRun, DoesNotFit, NotFinite, StoreError
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.core.status import Status

TRACEBACK_LINES, LINE_LENGTH = 12, 300


def ending(error: Exception) -> tuple[Status, str]:
    """Status and reason of a cell that ended with this error."""
    if isinstance(error, CannotRun):
        return error.status, str(error)
    if isinstance(error, DoesNotFit):
        return Status.OOM, str(error)
    if isinstance(error, StoreError | NotFinite):  # they say it all, and what to do at their end
        return Status.FAILED, "\n".join([str(error), *getattr(error, "__notes__", ())])
    if isinstance(error, ModuleNotFoundError):
        return Status.UNAVAILABLE, how_to_install(error.name or str(error))
    if is_out_of_memory(error):
        return Status.OOM, first_line(error)
    return Status.FAILED, short_traceback(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: Python's, the GPU's, or torch's host allocator."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def short_traceback(error: BaseException) -> str:
    """The error and its last few frames: enough to find the place, short enough for a record."""
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return "\n".join(line[:LINE_LENGTH] for line in lines[-TRACEBACK_LINES:])


def first_line(error: BaseException) -> str:
    """The first line of its message; its type if it says nothing."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__

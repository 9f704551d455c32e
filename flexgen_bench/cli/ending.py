"""How a command ends: its exit status, and one line on standard error for what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from flexgen_bench.core.errors import UserError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def status_of(run: Callable[[], int], failures: tuple[type[Exception], ...], interrupted: str | None = None) -> int:
    """The status that ``run`` returns; BAD_INPUT for a UserError, FAILED for one of the ``failures``.

    interrupted: what is said at Ctrl-C ("": nothing) before INTERRUPTED is returned; None lets it pass.
    """
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # who reads has seen enough (``| head``)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be written at the exit
        return FAILED
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        if interrupted:
            print(interrupted, file=sys.stderr)
        return INTERRUPTED

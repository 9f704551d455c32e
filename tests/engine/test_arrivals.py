"""Results on their way: what a caller gets after a failure."""

from __future__ import annotations

import pytest

from flexgen_bench.core.progress import quiet
from flexgen_bench.engine.arrivals import Arrivals


def test_who_fails_to_take_a_result_is_not_given_others() -> None:
    """What had ended is delivered when a job fails, also where it failed by the caller's own ``on_output``."""
    came = []

    def take(index: int, result: str) -> None:
        came.append((index, result))
        if index == 1:
            raise OSError("disk full")

    arrivals = Arrivals(quiet, take)
    for index in range(3):
        arrivals.put(index, "answer")
    with pytest.raises(OSError, match="disk full"):
        arrivals.deliver()
    arrivals.deliver()
    assert came == [(0, "answer"), (1, "answer")]

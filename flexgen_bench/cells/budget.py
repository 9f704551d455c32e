"""How much of a cell's workload is run where one of its systems would take too long for all of it: the same for every
system.

The rule: while the slowest system is predicted to exceed the budget, the generated tokens are halved (to the next lower
power of two), down to ``LEAST_TOKENS``; then the prompts, down to ``LEAST_PROMPTS``. Tokens go first, since every one
of them is a pass over all weights, which is what streaming systems spend their time on. What the command line states
itself is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from flexgen_bench.core.units import format_seconds
from flexgen_bench.core.workload import Workload

LEAST_TOKENS = LEAST_PROMPTS = 4
# Seconds by system that a workload is expected to take; of those only that are named.
Expectation = Callable[[Workload, Collection[str]], Mapping[str, float]]


@dataclass(frozen=True)
class Fitted:
    """changes: fields of the workload with their new values. note: why, for people; "" if nothing had to be done."""

    changes: Mapping[str, int]
    note: str


def fitted(
    workload: Workload, budget_s: float, systems: Collection[str], expected: Expectation, stated: Collection[str] = ()
) -> Fitted:
    """The workload that keeps all ``systems`` within ``budget_s`` seconds each, or the least one.

    stated: fields of the workload that must stay.
    """
    slow = _over(expected(workload, systems), budget_s)
    if not slow:
        return Fitted({}, "")
    first, now, left = slow, workload, slow
    for smaller in _smaller(workload, stated):
        now = smaller
        left = _over(expected(now, list(left)), budget_s)
        if not left:
            break
    names = ("num_prompts", "gen_len")
    changes = {n: getattr(now, n) for n in names if getattr(now, n) != getattr(workload, n)}
    return Fitted(changes, _note(workload, now, budget_s, first, left))


def _over(seconds: Mapping[str, float], budget_s: float) -> dict[str, float]:
    return {name: s for name, s in seconds.items() if s > budget_s}


def _smaller(workload: Workload, stated: Collection[str]) -> Iterator[Workload]:
    """Ever smaller ones."""
    now = workload
    while "gen_len" not in stated and now.gen_len > LEAST_TOKENS:
        now = replace(now, gen_len=max(LEAST_TOKENS, _half(now.gen_len)))
        yield now
    while "num_prompts" not in stated and now.num_prompts > LEAST_PROMPTS:
        now = replace(now, num_prompts=max(LEAST_PROMPTS, _half(now.num_prompts)))
        yield now


def _half(count: int) -> int:
    """The largest power of two below."""
    return 1 << ((count - 1).bit_length() - 1)


def _note(
    requested: Workload, ran: Workload, budget_s: float, first: Mapping[str, float], left: Mapping[str, float]
) -> str:
    slowest = max(first, key=lambda name: first[name])
    why = (
        f"{slowest} is predicted to take {format_seconds(first[slowest])} for {_size(requested)}, "
        f"more than the {format_seconds(budget_s)} of measure.budget_s"
    )
    what = f"reduced to {_size(ran)} for every system" if ran != requested else "not reduced"
    still = ", ".join(f"{name} about {format_seconds(seconds)}" for name, seconds in left.items())
    return f"{what}: {why}" + (f"; still more than that: {still}" if still else "")


def _size(workload: Workload) -> str:
    return f"{workload.num_prompts} prompts and {workload.gen_len} generated tokens each"

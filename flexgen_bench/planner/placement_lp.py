"""The placement of weights (experts apart), KV cache and activations as a linear program, solved by HiGHS.

For one shape of the batches everything that a share of a tensor kind on a tier costs is linear: seconds on each lane in
a prefill and in a decode pass, and bytes on each tier. The paper's program (section 4.3), with costs summed from the
engine's own steps instead of written down again, and with the schedule's overlap: a block's phases follow each other,
so each is as long as its longest lane; in the continuous schedule both phases share the lanes, so the whole is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from flexgen_bench.core.policy import AttentionSite, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane, LaneKind, Tier

# Of placements that take about as long, the one that works least waits least; so much longer than the best counts
# as the same.
SLACK = 1.01
Share = tuple[str, Tier]  # of a kind on a tier
# Where the cpu attends: of the cache in host memory, as much as is moved to the accelerator all the same. It is a share
# of all of the cache, like the one that it is a part of.
MOVED: Share = ("kv_moved", Tier.CPU)
Seconds = Mapping[Lane, float]


@dataclass(frozen=True)
class PhaseCost:
    """Seconds per lane of one pass: ``fixed``, and what each share adds if all of its kind is there."""

    fixed: Seconds
    by_share: Mapping[Share, Seconds]


@dataclass(frozen=True)
class PlacementProblem:
    """A batch shape to place.

    prefill, decode: costs of the two kinds of pass; decode_passes: how many of the latter a block has. sizes: bytes of
    each kind (weights, kv_cache, activations, and experts where these are placed apart), all of it; room: bytes that
    each tier has for them. max_latency_s: of a block; None: any. held: kinds that are on one tier whatever it costs.
    """

    schedule: Schedule
    prefill: PhaseCost
    decode: PhaseCost
    decode_passes: int
    sizes: Mapping[str, float]
    room: Mapping[Tier, float]
    max_latency_s: float | None = None
    held: Mapping[str, Tier] = field(default_factory=dict)

    @property
    def share_names(self) -> list[Share]:
        """The shares, in the order of the program's first variables."""
        placed = [(kind, tier) for kind in self.kinds for tier in Tier if tier in self.room]
        return [*placed, MOVED] if self.may_divide else placed

    @property
    def may_divide(self) -> bool:
        """Whether some of the cache in host memory may be moved and the cpu attend to the rest."""
        return MOVED in self.decode.by_share

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is placed: the names of a policy's placements."""
        return tuple(self.sizes)

    @cached_property
    def lanes(self) -> tuple[Lane, ...]:
        """All that the costs name, in order."""
        phases = (self.prefill, self.decode)
        named = (seconds for phase in phases for seconds in (phase.fixed, *phase.by_share.values()))
        return _in_order(frozenset().union(*named))

    @property
    def resources(self) -> tuple[Lane, ...]:
        """The links and processors that the costs are of: lanes that share a link are one, named after one of them."""
        return _links_of(self.lanes)

    def work_s(self, share: Share) -> float:
        """Seconds of all lanes together, in a block, for what a share is of."""
        return sum(
            self.prefill.by_share.get(share, {}).get(lane, 0.0)
            + self.decode_passes * self.decode.by_share.get(share, {}).get(lane, 0.0)
            for lane in self.lanes
        )


@dataclass(frozen=True)
class LinearProgram:
    """minimise ``objective`` x, with ``upper`` x <= ``limits``, ``equal`` x = ``values``, x >= 0. names: of the
    variables; rows: of the limits."""

    names: tuple[str, ...]
    objective: tuple[float, ...]
    upper: tuple[tuple[float, ...], ...]
    limits: tuple[float, ...]
    rows: tuple[str, ...]
    equal: tuple[tuple[float, ...], ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class PlacementSolution:
    """seconds of a block (of as many sequences as a block holds, for the continuous schedule). tight: names of the
    limits that bind, with the seconds that one more unit (byte, or second of lane time) would save."""

    seconds: float
    shares: Mapping[Share, float]
    tight: Mapping[str, float]

    def placement(self, kind: str) -> Placement:
        """Shares of one kind, rid of what the solver leaves of rounding."""
        shares = {tier: self.shares.get((kind, tier), 0.0) for tier in Tier}
        clean = {tier: round(share, 6) if share > 1e-6 else 0.0 for tier, share in shares.items()}
        total = sum(clean.values())
        return Placement(**{str(tier): share / total for tier, share in clean.items()})

    def applied_to(self, policy: Policy) -> Policy:
        """The policy with its tensors placed like this."""
        placed = replace(policy, **{kind: self.placement(kind) for kind in policy.placements})  # type: ignore[arg-type]
        return placed if MOVED not in self.shares else self._divided(placed)

    def _divided(self, policy: Policy) -> Policy:
        on_host = policy.kv_cache.share(Tier.CPU)
        moved = round(self.shares[MOVED] / on_host, 6) if on_host else 0.0
        if moved < 1:
            return replace(policy, kv_moved=max(0.0, moved))
        return replace(policy, kv_moved=0.0, attention=AttentionSite.COMPUTE)


def linear_program(problem: PlacementProblem) -> LinearProgram:
    """Variables are the shares, and the seconds of the phases (``T_prefill``, ``T_decode``) or of both together
    (``T``)."""
    shares = problem.share_names
    block = problem.schedule is Schedule.BLOCK
    times = ["T_prefill", "T_decode"] if block else ["T"]
    passes = float(problem.decode_passes)
    weights = [1.0, passes] if block else [1.0]
    upper: list[tuple[float, ...]] = []
    limits: list[float] = []
    rows: list[str] = []

    def limit(name: str, of_shares: Sequence[float], of_times: Sequence[float], most: float) -> None:
        upper.append((*of_shares, *of_times))
        limits.append(most)
        rows.append(name)

    def seconds(phase: PhaseCost, resource: Lane) -> list[float]:
        return [on_resource(phase.by_share.get(share, {}), resource) for share in shares]

    for lane in problem.resources:
        before, after = seconds(problem.prefill, lane), seconds(problem.decode, lane)
        fixed = on_resource(problem.prefill.fixed, lane), on_resource(problem.decode.fixed, lane)
        if block:
            limit(f"{lane} in prefill", before, (-1.0, 0.0), -fixed[0])
            limit(f"{lane} in decode", after, (0.0, -1.0), -fixed[1])
        else:
            both = [a + passes * b for a, b in zip(before, after, strict=True)]
            limit(str(lane), both, (-1.0,), -fixed[0] - passes * fixed[1])
    for tier in (tier for tier in Tier if tier in problem.room):
        needs = [problem.sizes.get(kind, 0.0) if tier is where else 0.0 for kind, where in shares]
        limit(f"memory of {tier}", needs, [0.0] * len(times), problem.room[tier])
    if problem.may_divide:
        lies = {MOVED: 1.0, ("kv_cache", Tier.CPU): -1.0}
        limit("cache in host memory", [lies.get(share, 0.0) for share in shares], [0.0] * len(times), 0.0)
    if problem.max_latency_s is not None:
        limit("latency", [0.0] * len(shares), weights, problem.max_latency_s)
    none = (0.0,) * len(times)
    equal = [tuple(float(kind == of) for of, _ in shares) + none for kind in problem.kinds]
    equal += [tuple(float(share == one) for share in shares) + none for one in problem.held.items()]
    return LinearProgram(
        names=(*(f"{kind} on {tier}" for kind, tier in shares), *times),
        objective=(*[0.0] * len(shares), *weights),
        upper=tuple(upper),
        limits=tuple(limits),
        rows=tuple(rows),
        equal=tuple(equal),
        values=(1.0,) * len(equal),
    )


def solve(problem: PlacementProblem) -> PlacementSolution | None:
    """The best placement; None if nothing fits."""
    return _solved(problem, linear_program(problem))


def least_work(problem: PlacementProblem, best: PlacementSolution) -> PlacementSolution:
    """The placement that works least of those that take (nearly) no longer than the best."""
    program = linear_program(problem)
    shares = problem.share_names
    times = program.objective[len(shares) :]
    work = tuple(problem.work_s(share) for share in shares)
    bound = (*[0.0] * len(shares), *times)
    patient = replace(
        program,
        objective=(*work, *[0.0] * len(times)),
        upper=(*program.upper, bound),
        limits=(*program.limits, SLACK * best.seconds),
        rows=(*program.rows, "seconds"),
    )
    least = _solved(problem, patient)
    return best if least is None else replace(least, seconds=best.seconds, tight=best.tight)


def on_resource(seconds: Seconds, resource: Lane) -> float:
    """Seconds of all lanes that work on a link (or processor), which is named after one of them."""
    return sum(seconds.get(lane, 0.0) for lane in _lanes_on(resource))


@cache
def _lanes_on(resource: Lane) -> tuple[Lane, ...]:
    every = (Lane(kind, resource.device) for kind in LaneKind)
    return tuple(lane for lane in every if lane.link is resource)


@cache
def _in_order(lanes: frozenset[Lane]) -> tuple[Lane, ...]:
    return tuple(sorted(lanes))


@cache
def _links_of(lanes: tuple[Lane, ...]) -> tuple[Lane, ...]:
    return tuple(dict.fromkeys(lane.link for lane in lanes))


def _solved(problem: PlacementProblem, program: LinearProgram) -> PlacementSolution | None:
    from scipy.optimize import linprog  # half a second to import

    shares = problem.share_names
    rows, limits, scales = _scaled(program, len(shares))
    result: Any = linprog(
        program.objective, A_ub=rows, b_ub=limits, A_eq=program.equal, b_eq=program.values, method="highs"
    )
    if result.status != 0:
        return None
    unit = _unit_s(program, len(shares))
    saved = {
        name: -float(marginal) * unit / by
        for name, marginal, by in zip(program.rows, result.ineqlin.marginals, scales, strict=True)
        if marginal < -1e-9
    }
    values = map(float, result.x)
    return PlacementSolution(float(result.fun) * unit, dict(zip(shares, values, strict=False)), saved)


def _unit_s(program: LinearProgram, shares: int) -> float:
    """The largest time in the program."""
    timed = [row for row in zip(program.upper, program.limits, strict=True) if any(row[0][shares:])]
    return max((abs(x) for row, most in timed for x in (*row[:shares], most)), default=0.0) or 1.0


def _scaled(program: LinearProgram, shares: int) -> tuple[list[list[float]], list[float], list[float]]:
    """Rows and limits with seconds in units of the largest, and bytes of each tier in units of its room: the solver's
    tolerances are absolute. Third: what each row was divided by."""
    unit = _unit_s(program, shares)
    rows, limits, scales = [], [], []
    for row, most in zip(program.upper, program.limits, strict=True):
        timed = any(row[shares:])
        by = unit if timed else max(map(abs, (*row, most))) or 1.0
        rows.append([value / by for value in row[:shares]] + list(row[shares:]))
        limits.append(most / by)
        scales.append(by)
    return rows, limits, scales

"""The placement's linear program: held against the best of all its corners, found in fractions, and against what is
known by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.policy import AttentionSite, Policy, Schedule
from flexgen_bench.core.tiers import Lane, Site, Tier
from flexgen_bench.planner.placement_lp import MOVED, LinearProgram, PhaseCost, PlacementProblem, linear_program, solve

NEAR = 1e-6
KINDS = ("weights", "experts", "kv_cache", "activations")


def eliminated(rows: list[list[Fraction]]) -> list[Fraction] | None:
    """The solution of a square system, each row with its right side last; None if there is not exactly one."""
    rows = [row[:] for row in rows]
    for column in range(len(rows)):
        pivot = next((r for r in range(column, len(rows)) if rows[r][column]), None)
        if pivot is None:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        head = rows[column]
        for r, row in enumerate(rows):
            if r != column and row[column]:
                factor = row[column] / head[column]
                rows[r] = [a - factor * b for a, b in zip(row, head, strict=True)]
    return [row[-1] / row[column] for column, row in enumerate(rows)]


def simplex(program: LinearProgram) -> Fraction | None:
    """A textbook's two-phase simplex with Bland's rule, in fractions."""
    names, exact = len(program.names), Fraction
    rows = [
        [exact(x) for x in row] + [exact(int(n == m)) for n in range(len(program.upper))] + [exact(most)]
        for m, (row, most) in enumerate(zip(program.upper, program.limits, strict=True))
    ]
    rows += [
        [exact(x) for x in row] + [exact(0)] * len(program.upper) + [exact(value)]
        for row, value in zip(program.equal, program.values, strict=True)
    ]
    width = names + len(program.upper)
    rows = [[-x for x in row] if row[-1] < 0 else row for row in rows]
    count = len(rows)
    table = [[*row[:-1], *(exact(int(n == m)) for n in range(count)), row[-1]] for m, row in enumerate(rows)]
    basis = list(range(width, width + count))

    def pivot(cost: list[Fraction], allowed: int) -> None:
        while True:
            reduced = [
                cost[c] - sum((cost[b] * row[c] for b, row in zip(basis, table, strict=True)), exact(0))
                for c in range(allowed)
            ]
            entering = next((c for c, value in enumerate(reduced) if value < 0), None)
            if entering is None:
                return
            ratios = [(row[-1] / row[entering], basis[r], r) for r, row in enumerate(table) if row[entering] > 0]
            assert ratios, "times are bounded from below"
            _, _, leaving = min(ratios)
            head = [x / table[leaving][entering] for x in table[leaving]]
            for r, row in enumerate(table):
                if r != leaving and row[entering]:
                    table[r] = [a - row[entering] * b for a, b in zip(row, head, strict=True)]
            table[leaving], basis[leaving] = head, entering

    def value(cost: list[Fraction]) -> Fraction:
        return sum((cost[b] * row[-1] for b, row in zip(basis, table, strict=True)), exact(0))

    first = [exact(0)] * width + [exact(1)] * count
    pivot(first, width + count)
    if value(first) > 0:
        return None
    # What is left of the artificial variables is zero and stays so: no row may trade it.
    for r, b in enumerate(basis):
        if b >= width:
            column = next((c for c in range(width) if table[r][c]), None)
            if column is not None:
                head = [x / table[r][column] for x in table[r]]
                for other, row in enumerate(table):
                    if other != r and row[column]:
                        table[other] = [a - row[column] * x for a, x in zip(row, head, strict=True)]
                table[r], basis[r] = head, column
    second = [exact(x) for x in program.objective] + [exact(0)] * (len(program.upper) + count)
    pivot(second, width)
    return value(second)


def corners(program: LinearProgram) -> Iterator[list[Fraction]]:
    """Every point where as many limits meet as there are variables, and that breaks none."""
    size = len(program.names)
    limits = [[Fraction(x) for x in (*row, most)] for row, most in zip(program.upper, program.limits, strict=True)]
    limits += [[Fraction(-int(n == m)) for n in range(size)] + [Fraction(0)] for m in range(size)]
    equal = [[Fraction(x) for x in (*row, value)] for row, value in zip(program.equal, program.values, strict=True)]
    for chosen in combinations(limits, size - len(equal)):
        point = eliminated([*equal, *chosen])
        if point is not None and all(sum(a * x for a, x in zip(row, point, strict=False)) <= row[-1] for row in limits):
            yield point


def test_the_oracle_agrees_with_all_corners() -> None:
    """min -x - 2y with x + y <= 4, y <= 3, x + 3z = 2: the simplex of these tests against trying every corner."""
    program = LinearProgram(
        ("x", "y", "z"),
        (-1.0, -2.0, 0.5),
        ((1.0, 1.0, 0.0), (0.0, 1.0, 0.0)),
        (4.0, 3.0),
        ("a", "b"),
        ((1.0, 0.0, 3.0),),
        (2.0,),
    )
    best = min(
        sum(Fraction(c) * x for c, x in zip(program.objective, point, strict=True)) for point in corners(program)
    )
    assert simplex(program) == best == Fraction(-1) - 6 + Fraction(1, 6)
    assert simplex(replace(program, limits=(4.0, -1.0))) is None
    assert list(corners(replace(program, limits=(4.0, -1.0)))) == []


@st.composite
def phases(draw: st.DrawFn, tiers: Sequence[Tier], lanes: Sequence[Lane]) -> PhaseCost:
    seconds = st.fixed_dictionaries({lane: st.integers(0, 9).map(float) for lane in lanes})
    shares = {(kind, tier): draw(seconds) for kind in KINDS for tier in tiers}
    return PhaseCost(draw(seconds), shares)


@st.composite
def problems(draw: st.DrawFn) -> PlacementProblem:
    tiers = draw(st.sampled_from([tuple(Tier), (Tier.CPU, Tier.DISK)]))
    lanes = draw(st.lists(st.sampled_from(Site.GPU.lanes), min_size=1, max_size=3, unique=True))
    held = st.dictionaries(st.sampled_from(KINDS), st.sampled_from(tiers), max_size=2)
    return PlacementProblem(
        schedule=draw(st.sampled_from(Schedule)),
        prefill=draw(phases(tiers, lanes)),
        decode=draw(phases(tiers, lanes)),
        decode_passes=draw(st.integers(0, 5)),
        sizes={kind: float(draw(st.integers(0, 9))) for kind in KINDS},
        room={tier: float(draw(st.integers(0, 20))) for tier in tiers},
        max_latency_s=draw(st.none() | st.integers(1, 60).map(float)),
        held=draw(held),
    )


@given(problems())
@settings(max_examples=60, deadline=None)
def test_the_optimum_is_the_one_of_an_exact_simplex(problem: PlacementProblem) -> None:
    """And what comes out is a placement that keeps to every limit and takes the seconds that are said."""
    expected, found = simplex(linear_program(problem)), solve(problem)
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    assert found.seconds == pytest.approx(float(expected), rel=NEAR, abs=NEAR)
    check(problem, found.shares)
    assert seconds_of(problem, found.shares) == pytest.approx(found.seconds, rel=NEAR, abs=NEAR)
    for kind in KINDS:
        placement = found.placement(kind)
        assert all(placement.share(t) == pytest.approx(found.shares.get((kind, t), 0.0), abs=1e-5) for t in Tier)


def seconds_of(problem: PlacementProblem, shares: Mapping[tuple[str, Tier], float]) -> float:
    """Of a block, from the definition; lanes that share a link take turns on it."""

    def lanes(phase: PhaseCost) -> list[float]:
        together = dict.fromkeys(Site.GPU.lanes, 0.0)
        for lane in Site.GPU.lanes:
            together[lane.link] += phase.fixed.get(lane, 0.0)
            for key, share in shares.items():
                together[lane.link] += share * phase.by_share[key].get(lane, 0.0)
        return list(together.values())

    prefill, decode = lanes(problem.prefill), lanes(problem.decode)
    passes = problem.decode_passes
    if problem.schedule is Schedule.BLOCK:
        return max(prefill) + passes * max(decode)
    return max(a + passes * b for a, b in zip(prefill, decode, strict=True))


def check(problem: PlacementProblem, shares: Mapping[tuple[str, Tier], float]) -> None:
    assert all(share >= -NEAR for share in shares.values())
    for kind in KINDS:
        assert sum(share for (of, _), share in shares.items() if of == kind) == pytest.approx(1)
    for tier, room in problem.room.items():
        need = sum(share * problem.sizes[kind] for (kind, on), share in shares.items() if on is tier)
        assert need <= room * (1 + NEAR) + NEAR
    for kind, tier in problem.held.items():
        assert shares[kind, tier] == pytest.approx(1)
    if problem.max_latency_s is not None:
        assert seconds_of(problem, shares) <= problem.max_latency_s * (1 + NEAR)


def cost(fixed: dict[Lane, float], **weights: dict[Lane, float]) -> PhaseCost:
    """Only weights cost anything, by tier."""
    free: dict[tuple[str, Tier], dict[Lane, float]] = {(k, t): {} for k in KINDS for t in Tier}
    return PhaseCost(fixed, free | {("weights", Tier(tier)): lanes for tier, lanes in weights.items()})


# Weights of 10 bytes: resident ones take 1 s of the accelerator, those below 1 s of it and 4 s of the link. Prefill is
# 6 s of computing.
LINK = {Lane.GPU: 1.0, Lane.H2D: 4.0}
SIMPLE = PlacementProblem(
    schedule=Schedule.BLOCK,
    prefill=cost({Lane.GPU: 5.0}, gpu={Lane.GPU: 1.0}, cpu=LINK, disk=LINK | {Lane.DISK_READ: 40.0}),
    decode=cost({}, gpu={Lane.GPU: 1.0}, cpu=LINK, disk=LINK | {Lane.DISK_READ: 40.0}),
    decode_passes=10,
    sizes={"weights": 10.0, "kv_cache": 0.0, "activations": 0.0},
    room={Tier.GPU: 5.0, Tier.CPU: 100.0, Tier.DISK: 1000.0},
)


def test_half_of_the_weights_resident() -> None:
    """Prefill hides the link, decode waits for 2 s of it in each of 10 passes."""
    found = solve(SIMPLE)
    assert found is not None
    assert found.seconds == pytest.approx(6 + 10 * 2)
    assert to_json(found.placement("weights")) == pytest.approx({"gpu": 0.5, "cpu": 0.5, "disk": 0.0})
    # A byte more is a tenth of 4 s less in each of 10 passes.
    assert found.tight["memory of gpu"] == pytest.approx(4.0)
    # A second of the link is 10 passes' worth of a second; of the accelerator in prefill, one.
    assert found.tight["h2d in decode"] == pytest.approx(10)
    assert found.tight["gpu in prefill"] == pytest.approx(1)
    assert set(found.tight) == {"memory of gpu", "h2d in decode", "gpu in prefill"}


def test_the_continuous_schedule_hides_one_phase_in_the_other() -> None:
    """11 passes of the link, 4 s each for what is not resident, beside 16 s of computing: with half resident it is 22
    s."""
    found = solve(replace(SIMPLE, schedule=Schedule.CONTINUOUS))
    assert found is not None
    assert found.seconds == pytest.approx(max(5 + 11, 11 * 4 * 0.5))
    roomy = solve(replace(SIMPLE, schedule=Schedule.CONTINUOUS, room={**SIMPLE.room, Tier.GPU: 9.0}))
    assert roomy is not None
    assert roomy.seconds == pytest.approx(16)
    assert set(roomy.tight) == {"gpu"}


def test_what_is_held_stays() -> None:
    below = solve(replace(SIMPLE, held={"weights": Tier.CPU}))
    assert below is not None
    assert below.seconds == pytest.approx(6 + 10 * 4)
    assert below.placement("weights").cpu == 1
    assert solve(replace(SIMPLE, held={"weights": Tier.GPU})) is None  # 10 bytes into 5


def test_a_latency_that_cannot_be_kept_has_no_placement() -> None:
    assert solve(replace(SIMPLE, max_latency_s=25.9)) is None
    kept = solve(replace(SIMPLE, max_latency_s=26.1))
    assert kept is not None
    assert kept.seconds == pytest.approx(26)


def test_nothing_fits() -> None:
    none = replace(SIMPLE, room={Tier.GPU: 1.0, Tier.CPU: 1.0, Tier.DISK: 1.0})
    assert solve(none) is None
    assert simplex(linear_program(none)) is None


@given(problems(), st.data())
@settings(max_examples=80, deadline=None)
def test_what_binds_says_what_more_of_it_brings(problem: PlacementProblem, data: st.DataObject) -> None:
    """A little more room saves its marginal times that: never more, and as much unless the optimum is at a corner
    there."""
    found = solve(problem)
    assume(found is not None and found.tight)
    assert found is not None
    for name, saved in found.tight.items():
        assert saved > 0
        assert not name.startswith("memory") or Tier(name.split()[-1]) in problem.room
    tier = data.draw(st.sampled_from(list(problem.room)))
    small = 1e-3
    wider = solve(replace(problem, room={**problem.room, tier: problem.room[tier] + small}))
    assert wider is not None
    won, promised = found.seconds - wider.seconds, small * found.tight.get(f"memory of {tier}", 0.0)
    near = 1e-7 * max(1.0, found.seconds)
    assert -near <= won <= promised + near
    narrower = solve(replace(problem, room={**problem.room, tier: problem.room[tier] - small}))
    if narrower is not None:  # a convex function: what a little less costs is no less than what a little more brings
        assert narrower.seconds - found.seconds >= promised - near


def scaled(problem: PlacementProblem, times: float, sizes: float) -> PlacementProblem:
    def phase(one: PhaseCost) -> PhaseCost:
        return PhaseCost(
            {lane: s * times for lane, s in one.fixed.items()},
            {share: {lane: s * times for lane, s in seconds.items()} for share, seconds in one.by_share.items()},
        )

    latest = problem.max_latency_s
    return replace(
        problem,
        prefill=phase(problem.prefill),
        decode=phase(problem.decode),
        sizes={kind: size * sizes for kind, size in problem.sizes.items()},
        room={tier: room * sizes for tier, room in problem.room.items()},
        max_latency_s=None if latest is None else latest * times,
    )


@given(problems(), st.sampled_from([1e-9, 1e-6, 1e4]), st.sampled_from([1.0, 1e9, 1e13]))
@settings(max_examples=80, deadline=None)
def test_units_do_not_matter(problem: PlacementProblem, times: float, sizes: float) -> None:
    """The solver's tolerances are absolute: microseconds beside terabytes were all the same to it."""
    plain, other = solve(problem), solve(scaled(problem, times, sizes))
    assert (plain is None) == (other is None)
    if plain is not None and other is not None:
        assert other.seconds == pytest.approx(plain.seconds * times, rel=1e-5, abs=1e-7 * times)


def test_small_times_beside_huge_memories() -> None:
    """Half of 10 TB of weights resident, at a microsecond a pass."""
    found = solve(scaled(SIMPLE, 1e-6, 1e12))
    assert found is not None
    assert found.seconds == pytest.approx(26e-6, rel=1e-5)
    assert found.placement("weights").gpu == pytest.approx(0.5, abs=1e-5)
    assert found.tight["memory of gpu"] == pytest.approx(4e-18, rel=1e-4)


# A cache that has no room on the accelerator: the cpu attends to all of it in 6 s, the link moves all of it in 3 s.
CACHE = PlacementProblem(
    schedule=Schedule.BLOCK,
    prefill=cost({Lane.GPU: 5.0}),
    decode=replace(
        cost({Lane.GPU: 0.5}),
        by_share={**cost({}).by_share, ("kv_cache", Tier.CPU): {Lane.CPU: 6.0}, MOVED: {Lane.CPU: -6.0, Lane.H2D: 3.0}},
    ),
    decode_passes=10,
    sizes={"weights": 0.0, "kv_cache": 100.0, "activations": 0.0},
    room={Tier.GPU: 5.0, Tier.CPU: 100.0},
)


def test_a_cache_is_divided_so_that_the_link_and_the_cpu_are_busy_alike() -> None:
    """Of 100 bytes 5 have room, and are attended to for nothing; of the others two thirds are moved."""
    found = solve(CACHE)
    assert found is not None
    assert found.seconds == pytest.approx(5 + 10 * 0.95 * 2)
    assert found.shares[MOVED] == pytest.approx(0.95 * 2 / 3)
    policy = found.applied_to(Policy(attention=AttentionSite.CPU))
    assert policy.kv_moved == pytest.approx(2 / 3, abs=1e-5)
    assert policy.kv_cache.cpu == pytest.approx(0.95)


def test_no_more_is_moved_than_lies_in_host_memory() -> None:
    """A link that costs nothing moves all of it: then the cpu has nothing to attend to."""
    free = replace(CACHE.decode, by_share={**CACHE.decode.by_share, MOVED: {Lane.CPU: -6.0}})
    found = solve(replace(CACHE, decode=free))
    assert found is not None
    assert found.shares[MOVED] == pytest.approx(found.shares["kv_cache", Tier.CPU])
    policy = found.applied_to(Policy(attention=AttentionSite.CPU))
    assert (policy.attention, policy.kv_moved) == (AttentionSite.COMPUTE, 0.0)

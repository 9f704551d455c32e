"""The search for a policy: held against many policies simulated one by one, and against what any answer must keep
to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.config.build import hardware_profile, model_spec
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.device_memory import process_bytes, reserved_bytes
from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.auto_policy import auto_policy
from flexgen_bench.planner.choice import Choice
from flexgen_bench.planner.engine_predictor import EnginePredictor
from flexgen_bench.planner.forecast import forecast
from flexgen_bench.planner.memory_plan import plan_job
from flexgen_bench.planner.neighbours import neighbours
from flexgen_bench.planner.search import Search
from flexgen_bench.planner.search_space import OPEN_BLOCKS, SearchSpace, permitted
from flexgen_bench.schedule.sequence_groups import Request, worst_of
from tests.support.planner_machines import DTYPE, FOUR_BITS, MIB, PlannedJob, accelerator, host, model_of, site
from tests.support.shapes import opt_shape

GPU, CPU, DISK = (Placement.all_on(tier) for tier in Tier)
REQUEST = Request(32, 4)


def model(layers: int = 4) -> ModelShape:
    """1.6 MB of weights in 4 layers."""
    return opt_shape(
        num_layers=layers,
        hidden_size=128,
        embed_dim=128,
        num_heads=8,
        num_kv_heads=8,
        head_dim=16,
        ffn_size=512,
        vocab_size=256,
        max_positions=128,
    )


def space_of(
    hardware: HardwareProfile,
    prompts: int | None = 8,
    request: Request = REQUEST,
    lossies: tuple[Lossy, ...] = (EXACT,),
    max_latency_s: float | None = None,
    **more: object,
) -> SearchSpace:
    job = Job(model(), DTYPE, hardware, request.prompt_len, request.gen_len, prompts, max_latency_s=max_latency_s)
    return SearchSpace(job, lossies, **more)  # type: ignore[arg-type]


def machine(gpu_mib: float, cpu_mib: float = 64, **more: object) -> HardwareProfile:
    settings = {"gpu": site(1e11, 1e11), "cpu": site(1e10, 2e10)} | more
    return accelerator(int(gpu_mib * MIB), int(cpu_mib * MIB), **settings)  # type: ignore[arg-type]


MACHINES = {
    "computing": machine(3.5, gpu=site(2e10, 1e11), cpu=site(2e9, 2e10)),
    "link": machine(3.5, gpu=site(1e13, 1e12), h2d=2e8, d2h=1e8),
    "tight": machine(2.9, 3, disk_read=5e8, disk_write=2.5e8),
    "disk": machine(3.2, 1.4, disk_read=5e7, disk_write=2e7),
    "host": host(4 * MIB, cpu=site(1e11, 2e10)),
    "host with a slow disk": host(3 * MIB, cpu=site(1e11, 2e10), disk_read=5e7, disk_write=2e7),
    "emulated": machine(3.5, kind=Accelerator.EMULATED, gpu=site(1e11, 2e10), cpu=site(1e11, 2e10), h2d=1e9, d2h=1e9),
}


def simulated(of: SearchSpace, policy: Policy) -> float:
    """Tokens/s with every pass simulated; 0 if it does not fit."""
    try:
        plan = of.plan(policy)
    except DoesNotFit:
        return 0.0
    return of.count(policy) * of.job.gen_len / forecast(plan, points=None).total_s


@cache
def choice(name: str) -> Choice:
    return Search(space_of(MACHINES[name])).run()


def placements(tiers: tuple[Tier, ...]) -> list[Placement]:
    """In steps of an eighth."""
    eighths = (parts for parts in product(range(9), repeat=len(tiers)) if sum(parts) == 8)
    return [Placement(**{str(t): n / 8 for t, n in zip(tiers, parts, strict=True)}) for parts in eighths]


def grid(of: SearchSpace) -> Iterator[Policy]:
    """Batch shapes, schedules, sites and slots, without their placements."""
    has_gpu = of.job.hardware.compute_tier is Tier.GPU
    sites = list(AttentionSite) if has_gpu else [AttentionSite.COMPUTE]
    offloaded = list(Offloaded) if has_gpu else [Offloaded.MOVE]
    assert of.job.num_prompts is not None
    for size, count in product((1, 2, 3, 4, 8), (1, 2, 3, 4, 8)):
        for schedule, slots, at, where in product(Schedule, (1, 2, 3), sites, offloaded):
            whole = schedule is Schedule.CONTINUOUS and size * count >= of.job.num_prompts
            if size * count <= of.job.num_prompts and not whole:
                yield Policy(size, count, schedule=schedule, prefetch=slots, attention=at, offloaded=where)


def explored(of: SearchSpace, rng: random.Random, tries: int, rounds: int) -> tuple[Policy, float]:
    """The best of random policies of the grid, and of all that differ from the best of those in one placement or in the
    rest."""
    shapes, places = list(grid(of)), placements(of.job.hardware.tiers)
    known: dict[Policy, float] = {}

    def look(policy: Policy) -> None:
        if policy not in known:
            known[policy] = simulated(of, policy)

    for _ in range(tries):
        weights, caches, hidden = (rng.choice(places) for _ in range(3))
        look(replace(rng.choice(shapes), weights=weights, kv_cache=caches, activations=hidden))
    done: set[Policy] = set()
    for _ in range(rounds):
        best = max((p for p in known if p not in done), key=lambda p: known[p])
        done.add(best)
        kept = {"weights": best.weights, "kv_cache": best.kv_cache, "activations": best.activations}
        for shape in rng.sample(shapes, min(len(shapes), 60)):
            look(replace(shape, **kept))  # type: ignore[arg-type]
        for kind in kept:
            for place in places:
                look(replace(best, **{kind: place}))  # type: ignore[arg-type]
    best = max(known, key=lambda p: known[p])
    return best, known[best]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", MACHINES)
def test_no_policy_of_many_is_better_than_the_one_found(name: str) -> None:
    """Within 2 %: the engine's own rounding of shares to whole layers and sequences moves as much."""
    of = space_of(MACHINES[name])
    found = choice(name)
    assert simulated(of, found.policy) == pytest.approx(found.tok_per_s, rel=0.01)
    best, speed = explored(of, random.Random(name), tries=40, rounds=1)
    assert found.tok_per_s >= 0.98 * speed, best


def test_one_staging_slot_is_considered() -> None:
    """Candidates had two. With one there is nothing left on this slow disk, but no single change led there from the
    best with two, whose layers were computed in place: a third of what random policies reached."""
    of = space_of(MACHINES["disk"])
    rival = Policy(
        4,
        1,
        Placement(gpu=0.625, cpu=0.375),
        CPU,
        GPU,
        prefetch=1,
        attention=AttentionSite.CPU,
        schedule=Schedule.CONTINUOUS,
    )
    assert simulated(of, rival) > 0
    assert choice("disk").tok_per_s >= 0.98 * simulated(of, rival)


# Accelerators with room for little more than one layer: two staging buffers leave no place for large batches.
SMALL_CARDS = {
    "fast link": machine(
        2.4,
        6,
        gpu=site(8e10, 1.2e11, step=5e-6),
        cpu=site(4e9, 1.5e10),
        h2d=1.2e9,
        d2h=1.1e9,
        disk_read=3e8,
        disk_write=1e8,
    ),
    "slow cpu": machine(2.0, 6, gpu=site(8e10, 1.2e11), cpu=site(4e9, 1.5e10), h2d=1.2e9, d2h=1.1e9),
    "fast gpu": machine(2.3, 64, gpu=site(1e12, 3e11), cpu=site(5e9, 2e10), h2d=2e9, d2h=2e9),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SMALL_CARDS)
def test_where_two_staging_slots_have_no_room(name: str) -> None:
    """Only policies with two slots were made into programs: on the first of these a fifth of what random policies reach
    was found."""
    of = space_of(SMALL_CARDS[name])
    found = Search(of).run()
    best, speed = explored(of, random.Random(name), tries=200, rounds=2)
    assert simulated(of, found.policy) >= 0.98 * speed, best


@pytest.mark.parametrize("gen_len", [pytest.param(n, marks=pytest.mark.slow) for n in (24, 33)])
def test_answers_of_any_length(gen_len: int) -> None:
    """What a continuous block holds was a whole number of sequences per pass for 32 tokens and 192 sequences; for
    others it was a sixth below policies like these. Simulated, OPT-30B on a T4."""
    shape = model_spec("opt-30b").shape
    search = Search(SearchSpace(Job(shape, DType.FLOAT16, hardware_profile("t4"), 512, gen_len), (EXACT,)))
    found = search.run()
    rival = Policy(
        192,
        1,
        Placement(gpu=0.12, cpu=0.88),
        CPU,
        GPU,
        attention=AttentionSite.CPU,
        schedule=Schedule.CONTINUOUS,
        prefill_chunk=4096,
    )
    assert search.tok_per_s(found.policy) >= 0.98 * search.tok_per_s(rival) > 0


@pytest.mark.slow
def test_a_deep_models_block_is_divided_as_is_best_on_all_layers() -> None:
    """OPT-66B ended as 48x2 on the T4, judged by 12 of its layers; on all 64, 96x1 is 3 % faster."""
    spec = model_spec("opt-66b")
    t4 = hardware_profile("t4")
    predictor = EnginePredictor({}, {"policy": None})
    asked = Job(spec.shape, DType.FLOAT16, t4, prompt_len=512, gen_len=32, num_prompts=None)
    found = predictor.predict(asked)
    policy = from_json(Policy, found.settings["policy"], "policy")
    for size, count in ((2, 1), (1, 2)):
        other = replace(
            policy,
            gpu_batch_size=policy.gpu_batch_size * size // count,
            num_gpu_batches=max(1, policy.num_gpu_batches * count // size),
        )
        if other.block_size != policy.block_size:
            continue
        given = EnginePredictor({}, {"policy": other}).predict(asked)
        assert given.tok_per_s < 1.01 * found.tok_per_s, "what a search that takes seconds overlooks"


def test_the_same_job_has_the_same_answer() -> None:
    again = Search(space_of(MACHINES["tight"])).run()
    assert (again.policy, again.tok_per_s) == (choice("tight").policy, choice("tight").tok_per_s)


@st.composite
def machines(draw: st.DrawFn) -> HardwareProfile:
    """Some of them too small for anything."""
    rates = st.sampled_from([1e8, 1e9, 1e10])
    disks = {"disk_read": draw(rates), "disk_write": draw(rates)}
    sizes = st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 8.0])
    disk = draw(st.sampled_from([1, 2**40]))
    if draw(st.booleans()):
        return host(int(draw(sizes) * MIB), disk, site(1e11, 2e10), **disks)
    kind = draw(st.sampled_from([Accelerator.CUDA, Accelerator.EMULATED]))
    return machine(draw(sizes), draw(sizes), disk=disk, kind=kind, h2d=draw(rates), d2h=draw(rates), **disks)


def outcome(of: SearchSpace) -> tuple[Choice | None, DoesNotFit | None]:
    try:
        return Search(of).run(), None
    except DoesNotFit as refusal:
        return None, refusal


@given(machines(), st.sampled_from([1, 3, 8]), st.sampled_from([1, 4]))
@settings(max_examples=12, deadline=None)
def test_what_is_found_fits(hardware: HardwareProfile, prompts: int, gen_len: int) -> None:
    """Or nothing does, and it is said which tier is too small."""
    of = space_of(hardware, prompts, Request(32, gen_len))
    found, refusal = outcome(of)
    if found is None:
        assert refusal is not None
        assert refusal.tier in hardware.tiers
        assert refusal.need_bytes > refusal.capacity_bytes
        return
    found.plan.check({})
    assert found.plan.bytes == of.plan(found.policy).bytes
    assert found.policy.block_size < prompts + found.policy.gpu_batch_size
    assert found.tok_per_s > 0


@pytest.mark.parametrize(("hardware", "tier"), [(machine(0.1), Tier.GPU), (host(MIB // 8), Tier.CPU)])
def test_what_fits_nowhere_is_refused_by_tier(hardware: HardwareProfile, tier: Tier) -> None:
    with pytest.raises(DoesNotFit) as error:
        Search(space_of(hardware)).run()
    assert error.value.tier == tier


def test_what_only_fits_without_a_share_on_the_accelerator_is_found() -> None:
    """A first compressed layer there brings room to unpack it along, which programs do not know: taking what was short
    from the accelerator's room left less than nothing, and a job that fits was refused."""
    lossy = Lossy(weights=FOUR_BITS)
    of = space_of(machine(1.2, 6), prompts=4, request=Request(64, 1), lossies=(lossy,))
    by_hand = Policy(1, 4, CPU, CPU, CPU, attention=AttentionSite.CPU, offloaded=Offloaded.IN_PLACE, lossy=lossy)
    assert Search(of).run().tok_per_s >= 0.98 * simulated(of, by_hand) > 0


def test_what_needs_no_host_memory_gets_none() -> None:
    """A large accelerator beside next to no host memory: everything is on it."""
    policy = Search(space_of(machine(64, cpu_mib=0.01, disk=1))).run().policy
    assert policy.weights == policy.kv_cache == policy.activations == GPU


def test_less_is_available_than_the_machine_has() -> None:
    free = space_of(MACHINES["host"], available={Tier.CPU: 3 * MIB})
    found = Search(free).run()
    assert found.plan.total(Tier.CPU) <= 3 * MIB
    assert choice("host").plan.total(Tier.CPU) > 3 * MIB


def test_a_latency_bound_is_kept() -> None:
    """Of a block: smaller ones, at some cost; one that nothing keeps to is refused with what could be had."""
    free = choice("tight")
    blocks = max(1.0, 8 / free.policy.block_size)
    latency = 0.6 * free.forecast.total_s / blocks
    bound = Search(space_of(MACHINES["tight"], max_latency_s=latency)).run()
    assert bound.forecast.total_s / max(1.0, 8 / bound.policy.block_size) <= latency
    assert bound.tok_per_s <= free.tok_per_s * 1.02
    with pytest.raises(UserError, match=r"policy.max_latency_s.*single sequence takes"):
        Search(space_of(MACHINES["tight"], max_latency_s=1e-6)).run()


@pytest.mark.parametrize("name", ["tight", *(pytest.param(n, marks=pytest.mark.slow) for n in ("link", "host"))])
def test_more_never_makes_it_slower(name: str) -> None:
    """Twice a memory or a bandwidth: no more than 2 % lost."""
    hardware, base = MACHINES[name], choice(name).tok_per_s
    assert hardware.cpu_memory_bytes is not None
    larger = [replace(hardware, cpu_memory_bytes=2 * hardware.cpu_memory_bytes)]
    if hardware.gpu_memory_bytes is not None:
        larger.append(replace(hardware, gpu_memory_bytes=int(1.3 * hardware.gpu_memory_bytes)))
    larger += [replace(hardware, links={**hardware.links, lane: 2 * rate}) for lane, rate in hardware.links.items()][:2]
    for better in larger:
        assert Search(space_of(better)).run().tok_per_s >= 0.98 * base


def test_a_block_is_no_larger_than_wanted() -> None:
    found = Search(space_of(MACHINES["host"], block_size=2)).run()
    assert found.policy.block_size <= 2
    one = Search(space_of(MACHINES["host"], prompts=1)).run()
    assert one.policy.block_size == 1
    open_ended = Search(space_of(MACHINES["host"], prompts=None)).run()
    plan = open_ended.plan
    assert len(plan.groups.requests) == OPEN_BLOCKS * open_ended.policy.block_size


def test_compression_only_where_it_is_permitted() -> None:
    """What may be compressed is, where that is faster; what may not never is."""
    weights, caches = Lossy(weights=FOUR_BITS), Lossy(kv_cache=FOUR_BITS)
    both = Lossy(FOUR_BITS, FOUR_BITS)
    assert permitted(EXACT) == (EXACT,)
    assert set(permitted(weights)) == {weights}
    assert set(permitted(both)) == {both, weights, caches}
    slow = machine(2.9, h2d=2e7, d2h=2e7)
    assert Search(space_of(slow)).run().policy.lossy == EXACT
    for lossies in ((weights,), (both, weights, caches)):
        assert Search(space_of(slow, lossies=lossies)).run().policy.lossy in lossies


def test_neighbours_are_other_policies_with_whole_shares() -> None:
    for name in ("tight", "host"):
        of, policy = space_of(MACHINES[name]), choice(name).policy
        found = list(neighbours(of, policy))
        assert policy not in found
        assert len(set(found)) > 10
        has_gpu = of.job.hardware.compute_tier is Tier.GPU
        for other in found:
            assert other.block_size < 8 + other.gpu_batch_size
            assert has_gpu or not other.weights.gpu + other.kv_cache.gpu + other.activations.gpu


def test_a_job_of_unlike_requests_is_planned_for_its_worst() -> None:
    """The longest prompts with the longest answers, whoever has them."""
    weights, hardware = model_of(model()), MACHINES["tight"]
    requests = [Request(5, 6), Request(60, 2), Request(17, 3), Request(60, 1), Request(8, 8)]
    worst = worst_of(requests)
    assert worst == Request(60, 8)
    policy = auto_policy(space_of(hardware, 5, worst))
    plan_job(weights, policy, hardware, requests).check({})
    plan_job(weights, policy, hardware, [worst] * 5).check({})
    unknown = replace(hardware, rates=None)
    heuristic = auto_policy(space_of(unknown, 5, worst))
    plan_job(weights, heuristic, unknown, requests).check({})
    with pytest.raises(DoesNotFit):
        auto_policy(space_of(hardware, 5, worst, available={Tier.GPU: MIB}))


def card(hardware: HardwareProfile) -> HardwareProfile:
    """The machine with a card of which a job gets what ``hardware`` has: a process takes some of a real one, and torch
    an eighth of a small one."""
    assert hardware.gpu_memory_bytes is not None
    free = -(-hardware.gpu_memory_bytes * 8 // 7)
    return replace(hardware, gpu_memory_bytes=free + process_bytes(hardware))


def job_on(hardware: HardwareProfile, prompts: int | None, lossy: Lossy = EXACT) -> Job:
    return Job(model(), DTYPE, hardware, 32, 4, prompts, lossy)


@pytest.mark.parametrize("prompts", [None, 6])
def test_a_prediction_for_a_policy_that_is_given(prompts: int | None) -> None:
    """Its times are those of the job, simulated; with no number of prompts, of some blocks."""
    policy = Policy(2, 2, CPU, GPU, GPU)
    hardware = machine(8)
    asked = job_on(card(hardware), prompts)
    told = EnginePredictor({}, {"policy": policy}).predict(asked)
    count = prompts or OPEN_BLOCKS * 4
    job = PlannedJob(model(), policy, hardware, (Request(32, 4),) * count)
    times = job.forecast()
    assert (told.num_prompts, told.batch_size, told.gen_len) == (count, 4, 4)
    assert told.prefill_s == pytest.approx(times.prefill_s, rel=0.01)
    assert told.decode_s == pytest.approx(times.decode_s, rel=0.01)
    assert told.tok_per_s == pytest.approx(count * 4 / times.total_s, rel=0.01)
    assert told.settings["policy"] == to_json(policy)
    planned = {tier: job.plan.total(tier) for tier in Tier}
    planned[Tier.GPU] += reserved_bytes(asked.hardware)
    assert told.bytes == {str(tier): count for tier, count in planned.items()}
    assert told.disk_written_bytes == 0
    with pytest.raises(DoesNotFit):
        EnginePredictor({}, {"policy": policy}).predict(job_on(card(machine(1)), prompts))


@pytest.mark.parametrize("prompts", [None, 6])
def test_a_prediction_with_a_search(prompts: int | None) -> None:
    """Bytes within capacity, gains that are gains, and the policy that policy=auto would come to."""
    hardware = MACHINES["tight"]
    sold = card(hardware)
    told = EnginePredictor({}, {}).predict(job_on(sold, prompts))
    capacity = {"gpu": sold.gpu_memory_bytes, "cpu": hardware.cpu_memory_bytes, "disk": hardware.disk_bytes}
    for tier, need in told.bytes.items():
        limit = capacity[tier]
        assert limit is not None
        assert need <= limit
    gains = told.settings["gains"]
    assert all(won > 0 for won in gains.values())
    assert all(0 < busy <= told.total_s * 1.01 for busy in told.lane_busy_s.values())
    policy = from_json(Policy, told.settings["policy"], "policy")
    assert told.batch_size == policy.block_size
    assert told.num_prompts == (prompts or OPEN_BLOCKS * policy.block_size)
    if prompts is not None:
        assert policy == auto_policy(space_of(hardware, prompts))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lossy", "least"),
    [
        ("opt-6.7b", EXACT, 80),
        ("opt-30b", EXACT, 14),
        ("opt-30b", Lossy(FOUR_BITS, FOUR_BITS), 18),
        ("opt-175b", Lossy(FOUR_BITS, FOUR_BITS), 2.5),
    ],
)
def test_what_is_claimed_for_the_machine_of_the_paper(name: str, lossy: Lossy, least: float) -> None:
    """Tokens/s with prompts of 512 tokens and 32 new ones on a T4."""
    asked = Job(model_spec(name).shape, DType.FLOAT16, hardware_profile("t4"), 512, 32, None, lossy)
    assert EnginePredictor({}, {}).predict(asked).tok_per_s >= least

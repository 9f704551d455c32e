"""Placement and memory plans: whole items, honest sums, refusals that name tier, need and capacity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexgen_bench.core.compression import EXACT
from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.tiers import Site, Tier
from flexgen_bench.models.model import Model
from flexgen_bench.models.packing import pack
from flexgen_bench.models.registry import family
from flexgen_bench.planner.default_policy import _candidates as candidates
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.planner.memory_plan import plan_job
from flexgen_bench.planner.search_space import SearchSpace
from flexgen_bench.schedule.placement import ShareSpreader, place_sequences, place_units
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.sequence_groups import Request, worst_of
from tests.support.shapes import opt_shape

HOST = HardwareProfile("cpu", Accelerator.NONE)
shares = st.tuples(*[st.integers(0, 20)] * 3).filter(any).map(lambda t: Placement(*(x / sum(t) for x in t)))


@given(shares, st.integers(1, 60))
def test_layers_of_equal_size_spread_evenly(placement: Placement, layers: int) -> None:
    """In every prefix of the model, each tier holds its share to within one layer."""
    tiers = place_units([10] * layers, placement)
    for end in range(1, layers + 1):
        for tier in Tier:
            assert abs(tiers[:end].count(tier) - placement.share(tier) * end) <= 1 + 1e-6


@given(shares, st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_sequences_are_placed_once_and_in_order(placement: Placement, sizes: list[int]) -> None:
    spreader = ShareSpreader(placement)
    total = dict.fromkeys(Tier, 0)
    for size in sizes:
        spans = place_sequences(size, spreader)
        assert [i for s in spans for i in range(s.start, s.stop)] == list(range(size))
        assert [list(Tier).index(s.tier) for s in spans] == sorted({list(Tier).index(s.tier) for s in spans})
        for span in spans:
            total[span.tier] += span.count
    for tier in Tier:
        assert abs(total[tier] - placement.share(tier) * sum(sizes)) <= 1 + 1e-6


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_packed_tensors_do_not_overlap_and_extents_are_aligned(name: str) -> None:
    from tests.support.shapes import llama_shape

    for tied in (True, False):
        shape = (opt_shape if name == "opt" else llama_shape)(tied_embeddings=tied)
        packed = pack(shape, family(name).inventory(shape), DType.BFLOAT16)
        ends = 0
        for entry in packed.entries:
            assert entry.offset >= ends
            assert entry.offset % 64 == 0
            ends = entry.offset + entry.num_bytes
        assert ends <= packed.file_bytes
        for unit in packed.units:
            assert unit.offset % 4096 == 0
            assert unit.num_bytes % 4096 == 0
            for entry in unit.entries:
                assert unit.offset <= entry.offset
                assert entry.offset + entry.num_bytes <= unit.offset + unit.num_bytes
        names = {e.tensor.spec.name for e in packed.head.entries}
        assert ("tokens" in names) == tied


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("opt-125m", 125_239_296),
        ("opt-1.3b", 1_315_758_080),
        ("opt-30b", 29_974_540_288),
        ("opt-175b", 174_604_468_224),
        ("opt-350m", 331_196_416),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    """What transformers counts for the same configurations (175b: 174,604,468,224)."""
    from flexgen_bench.config.build import model_spec

    shape = model_spec(name).shape
    assert family(shape.family).inventory(shape).num_values == parameters


def space_of(model: Model, requests: list[Request], machine: HardwareProfile = HOST, **more: Any) -> SearchSpace:
    worst = worst_of(requests)
    job = Job(model.shape, model.dtype, machine, worst.prompt_len, worst.gen_len, len(requests))
    return SearchSpace(job, (EXACT,), **more)


def test_a_plan_names_tier_need_and_capacity() -> None:
    model = Model.of(opt_shape(), DType.FLOAT32)
    policy = Policy(4, 2)
    plan = plan_job(model, policy, HOST, [Request(8, 4)] * 8)
    # In memory a unit is an extent of whole pages; the file begins with the embedding, which includes a tied head.
    assert plan.bytes[Site.CPU]["weights"] == model.packed.file_bytes
    per_region = -(-4 * 8 * 2 * 24 * 4 // 4096) * 4096 + -(-4 * 3 * 2 * 24 * 4 // 4096) * 4096
    assert plan.bytes[Site.CPU]["kv_cache"] == 2 * model.shape.num_layers * per_region
    plan.check({})
    capped = HardwareProfile("cpu", Accelerator.NONE, cpu_memory_bytes=1000)
    with pytest.raises(DoesNotFit, match=r"tier cpu = 'needs .* KiB .*capacity of 1000 B.*disk"):
        replace(plan, hardware=capped).check({})


def test_weights_count_where_they_are_placed() -> None:
    model = Model.of(opt_shape(num_layers=4), DType.FLOAT32)
    policy = Policy(weights=Placement(cpu=0.5, disk=0.5), prefetch=3)
    plan = plan_job(model, policy, HOST, [Request(2, 2)])
    home = plan.bytes[Site.CPU]["weights"] + plan.bytes[Site.DISK]["weights"]
    assert home == model.packed.file_bytes
    layer = max(u.load_bytes for u in plan.job.streamed if u.kind is UnitKind.LAYER)
    head = sum(u.load_bytes for u in plan.job.streamed if u.kind is UnitKind.HEAD)
    assert plan.bytes[Site.CPU]["weight slots"] == 3 * layer + head


def test_default_policy_prefers_memory_and_falls_back_to_disk() -> None:
    model = Model.of(opt_shape(num_layers=8), DType.FLOAT32)
    requests = [Request(8, 8)] * 16
    ample = default_policy(space_of(model, requests, available={Tier.CPU: 2**30}))
    assert ample.weights == Placement(cpu=1.0)
    assert ample.block_size == 16
    all_in_memory = plan_job(model, ample, HOST, requests)
    less = all_in_memory.total(Tier.CPU) - model.packed.file_bytes // 3
    tight = default_policy(space_of(model, requests, available={Tier.CPU: less}))
    assert 0 < tight.weights.disk < 1
    with pytest.raises(DoesNotFit):
        default_policy(space_of(model, requests, available={Tier.CPU: 1000}))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12), st.integers(60_000, 1_200_000)
)
@settings(deadline=None)
def test_the_default_policy_fits_the_job_it_was_chosen_for(lengths: list[tuple[int, int]], memory: int) -> None:
    """A micro-batch pads to its longest prompt and runs to its longest answer, which may be another sequence's."""
    model = Model.of(opt_shape(num_layers=3), DType.FLOAT32)
    requests = [Request(p, g) for p, g in lengths]
    available = {Tier.CPU: memory}
    try:
        policy = default_policy(space_of(model, requests, available=available))
    except DoesNotFit:
        return
    plan_job(model, policy, HOST, requests).check(available)


@given(st.integers(1, 12), st.integers(1, 60), st.booleans(), st.floats(0.1, 4), st.floats(0.2, 6), st.floats(0.3, 20))
@example(layers=7, prompts=11, has_gpu=False, gpu=1.0, cpu=3.0, disk=1.0)
@settings(max_examples=40, deadline=None)
def test_halving_finds_the_first_policy_that_fits(
    layers: int, prompts: int, has_gpu: bool, gpu: float, cpu: float, disk: float
) -> None:
    """It had looked at every share of the weights, in two of the ten seconds of OPT-175B's search.

    Units are whole, so a smaller share may need more memory than a larger one; halving may then pass over a share that
    fits by itself.
    """
    model = Model.of(opt_shape(num_layers=layers), DType.FLOAT32)
    sizes = [int(part * model.packed.file_bytes) for part in (gpu, cpu, disk)]
    machine = HardwareProfile(
        "m", Accelerator.CUDA if has_gpu else Accelerator.NONE, sizes[0] if has_gpu else None, *sizes[1:]
    )
    requests = [Request(9, 5)] * prompts

    def fits(policy: Policy) -> bool:
        try:
            plan_job(model, policy, machine, requests).check({})
        except DoesNotFit:
            return False
        return True

    lists = list(candidates(machine, prompts))
    first = next((policy for alike in lists for policy in alike if fits(policy)), None)
    try:
        found = default_policy(space_of(model, requests, machine))
        assert fits(found)
        if found != first:
            alike = next(alike for alike in lists if found in alike)
            passed = alike[alike.index(first) : alike.index(found)]
            assert not all(fits(policy) for policy in passed)
    except DoesNotFit:
        assert first is None

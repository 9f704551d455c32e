"""What a step costs, worked out by hand on machines with round rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings

from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.rates import Rates, SiteRates
from flexgen_bench.core.tiers import LINKS, Lane, Tier
from flexgen_bench.planner.cost import StepCost, rates_of
from flexgen_bench.schedule.steps import Step, StepKind
from tests.support.planner_machines import (
    ACCELERATOR,
    CPU_SITE,
    EMULATED,
    FOUR_BITS,
    GPU_SITE,
    HOST,
    PlannedJob,
    a_job,
    jobs,
    small_llama,
)

GPU, CPU, DISK = (Placement.all_on(tier) for tier in Tier)
US = 1e-6  # what a step costs the host beside its work, on its own lanes after it
Wanted = Callable[[Step], bool]
# Of a layer of the small OPT: Q, K and V; the rest of its matrices, with biases and norms.
QKV, REST = 3 * 64**2, 9 * 64**2 + 9 * 64 + 256


def prices(job: PlannedJob, wanted: Wanted, number: int = 0) -> dict[Step, float]:
    """Of the steps of one pass, what their lanes take: those of a device without what the host takes to issue them."""
    plan = job.plan
    cost = StepCost(plan)
    found = {s: cost.times(s).lane_s for s in list(job.passes(plan))[number] if wanted(s)}
    assert found, "no such step"
    return found


def price(job: PlannedJob, kind: StepKind, unit: int = 1, number: int = 0) -> float:
    """Of the only one of a kind that works on a unit (or of many alike)."""
    found = set(prices(job, lambda s: s.kind is kind and s.unit == unit, number).values())
    assert len(found) == 1, found
    return found.pop()


def layer(job: PlannedJob, number: int = 1) -> float:
    """Of a decoding micro-batch in one layer that has all it needs."""
    return price(job, StepKind.LAYER, number=number)


def test_a_layer_in_one_step_costs_what_its_parts_do() -> None:
    """Products before and after the attention, and the attention itself; on a processor three times what a step costs
    beside its work, too: that is how its rates were stated and measured. With a cache that is moved the same are steps
    of their own."""
    whole = layer(a_job(Policy(4, 1, GPU, GPU, GPU)))
    apart = a_job(Policy(4, 1, GPU, CPU, GPU))
    kinds = (StepKind.PROJECT, StepKind.ATTEND, StepKind.OUTPUT)
    assert whole == pytest.approx(sum(price(apart, kind, number=1) for kind in kinds))


def test_every_part_of_a_cache_is_attended_to_for_itself() -> None:
    """Sequence groups of one sequence each that decode together."""
    job = a_job(Policy(8, 1, GPU, GPU, GPU, schedule=Schedule.CONTINUOUS), gen_len=9)
    plan = job.plan
    steps = [s for one in job.passes(plan) for s in one if s.kind is StepKind.LAYER]
    step = max(steps, key=lambda s: s.micro_batch.rows)
    rows = step.micro_batch.rows
    assert rows == len(step.micro_batch.kv_parts) > 4
    attended = sum(pairs for _, pairs in step.micro_batch.attended) * 2 * 64 * 2 / 5e10
    products = max((QKV + REST) * 2 / 1e11, 2 * rows * (QKV + REST) / 1e12)
    assert StepCost(plan).times(step).lane_s == pytest.approx(products + attended)


def test_bytes_cross_a_link_at_its_rate() -> None:
    """Weights of a layer: 12 * 64^2 values, 9 vectors of 64 and two of 256 for biases and norms, in 2 bytes each, in
    whole pages."""
    layer = 12 * 64 * 64 * 2 + (4 + 1 + 4) * 64 * 2 + 256 * 2
    whole = -(-layer // 4096) * 4096
    loads = prices(a_job(Policy(4, 1, DISK, CPU, CPU)), lambda s: s.kind is StepKind.LOAD_WEIGHTS and s.unit == 1)
    by_tiers: dict[object, object] = {step.lane.ends: (step.bytes, seconds) for step, seconds in loads.items()}
    assert by_tiers == {
        (Tier.DISK, Tier.CPU): (whole, pytest.approx(whole / 1e9 + US)),
        (Tier.CPU, Tier.GPU): (whole, pytest.approx(whole / 4e9)),
    }
    # Hidden states of 4 prompts of 16 tokens, 64 wide, back to host memory.
    stores = price(a_job(Policy(4, 1, GPU, GPU, CPU)), StepKind.STORE_HIDDEN)
    assert stores == pytest.approx(4 * 16 * 64 * 2 / 2e9)
    # K and V of the prompts to disk: through host memory.
    written = prices(a_job(Policy(4, 1, GPU, DISK, GPU)), lambda s: s.kind is StepKind.STORE_KV and s.unit == 1)
    moved = 4 * 16 * 2 * 64 * 2
    assert {s.lane: seconds for s, seconds in written.items()} == {
        Lane.D2H: pytest.approx(moved / 2e9),
        Lane.DISK_WRITE: pytest.approx(moved / 5e8 + US),
    }


def test_large_products_take_their_arithmetic() -> None:
    """64 rows times 3 * 64^2 values for Q, K, V; the rest of the layer are 9 * 64^2, biases and norms."""
    job = a_job(Policy(4, 1, GPU, GPU, GPU))
    assert price(job, StepKind.PROJECT) == pytest.approx(2 * 64 * 3 * 64**2 / 1e12)
    rest = 9 * 64**2 + 9 * 64 + 256
    assert price(job, StepKind.OUTPUT) == pytest.approx(2 * 64 * rest / 1e12)
    host = a_job(Policy(4, 1, CPU, CPU, CPU), HOST)
    assert price(host, StepKind.PROJECT) == pytest.approx(2 * 64 * 3 * 64**2 / 1e11 + US)


def test_small_products_take_the_reading_of_their_weights() -> None:
    """A token each of 2 sequences: 4 FLOPs per value of 2 bytes; the accelerator does 10 FLOPs for a byte, the
    processor 5. Each of the 2 has 17 tokens of 256 bytes to attend to."""
    job = a_job(Policy(2, 1, GPU, GPU, GPU), prompts=2)
    read, attended = (QKV + REST) * 2, 2 * 17 * 256
    assert layer(job) == pytest.approx(read / 1e11 + attended / 5e10)
    host = a_job(Policy(2, 1, CPU, CPU, CPU), HOST, prompts=2)
    assert layer(host) == pytest.approx(read / 2e10 + attended / 1e10 + 3 * US)
    # From 10 sequences on, arithmetic is what takes longer.
    larger = a_job(Policy(20, 1, GPU, GPU, GPU), prompts=20)
    arithmetic, attended = 2 * 20 * (QKV + REST), 20 * 17 * 256
    assert layer(larger) == pytest.approx(arithmetic / 1e12 + attended / 5e10)


def test_the_head_is_multiplied_with_rows_that_are_wanted() -> None:
    """One of each of 4 prompts of 16 tokens: 64 token rows of the table, the position table is not multiplied with."""
    job = a_job(Policy(4, 1, GPU, GPU, GPU))
    head = job.plan.model.packed.head
    read = max(head.num_values * 2 / 1e11, 2 * 4 * head.num_values / 1e12)
    assert price(job, StepKind.HEAD, unit=4) == pytest.approx(read)
    assert head.num_values == 64 * 64 + 2 * 64


def test_compressed_weights_are_used_in_place_by_a_processor() -> None:
    """4.5 bits a value: few rows read them, many rows are computed at the rate of their format, half of the plain
    one's."""
    lossy = Lossy(weights=FOUR_BITS)
    for policy, machine in (
        (Policy(1, 1, CPU, CPU, CPU, lossy=lossy), HOST),
        (Policy(1, 1, CPU, CPU, CPU, offloaded=Offloaded.IN_PLACE, lossy=lossy), ACCELERATOR),
    ):
        job = a_job(policy, machine, prompts=1)
        attended = 17 * 256 / 1e10
        # 2 FLOPs a value at 5e10/s, or 4.5 / 8 bytes at 2e10/s.
        computed = 2 * (QKV + REST) / 5e10 + attended
        assert layer(job) == pytest.approx(computed + 3 * US)
        assert price(job, StepKind.PROJECT) == pytest.approx(2 * 16 * QKV / 5e10 + US)
        steps = [step for one in job.passes(job.plan) for step in one]
        assert all(step.kind is not StepKind.DEQUANTIZE for step in steps)
    quick = replace(CPU_SITE, matrix={"float16/4": {64: {1: 1e12}}})
    reading = a_job(Policy(1, 1, CPU, CPU, CPU, lossy=lossy), with_cpu(HOST, quick), prompts=1)
    read = (QKV + REST) * 4.5 / 8 / 2e10 + attended
    assert layer(reading) == pytest.approx(read + 3 * US)


def test_products_with_activations_in_8_bits_have_a_rate_of_their_own() -> None:
    """Predictions took them for products of 4-bit weights with plain activations. The head's are; and machines that
    were measured before take that rate for all."""
    quick = {**CPU_SITE.matrix, "float16/4x8": {64: {1: 2e11}}}
    job = a_job(
        Policy(4, 1, CPU, CPU, CPU, lossy=Lossy(weights=FOUR_BITS, activations=8)),
        with_cpu(HOST, replace(CPU_SITE, matrix=quick)),
    )
    before = replace(job, hardware=HOST)
    assert price(job, StepKind.PROJECT) == pytest.approx(2 * 64 * QKV / 2e11 + US)
    assert price(before, StepKind.PROJECT) == pytest.approx(2 * 64 * QKV / 5e10 + US)
    assert price(job, StepKind.HEAD, unit=4) == price(before, StepKind.HEAD, unit=4)


def test_compressed_weights_are_unpacked_once_by_an_accelerator() -> None:
    """Then products are plain ones, in the plain format."""
    job = a_job(Policy(4, 2, CPU, GPU, GPU, lossy=Lossy(weights=FOUR_BITS)))
    unpacked = prices(job, lambda s: s.kind is StepKind.DEQUANTIZE and s.unit == 1)
    plain = job.plan.model.packed.units[1].plain_bytes
    assert plain == pytest.approx(12 * 64**2 * 2, rel=0.03)
    assert list(unpacked.values()) == [pytest.approx(plain / 5e10)]
    assert price(job, StepKind.PROJECT) == pytest.approx(2 * 64 * 3 * 64**2 / 1e12)


def test_a_norm_that_is_not_compressed_is_not_unpacked() -> None:
    """The embedding of this OPT has no matrix: it has nothing to unpack."""
    job = a_job(Policy(4, 1, CPU, GPU, GPU, lossy=Lossy(weights=FOUR_BITS)))
    plan = job.plan
    steps = [step for one in job.passes(plan) for step in one]
    unpacked = {step.unit for step in steps if step.kind is StepKind.DEQUANTIZE}
    assert unpacked == {unit.index for unit in job.plan.model.packed.units if unit.plain_bytes}
    assert 0 not in unpacked


def test_attention_of_prompts_takes_its_arithmetic() -> None:
    """4 prompts of 16 tokens that attend to those before them and to themselves, at a quarter of the matrix rate; all
    of a longer one."""
    pairs = 4 * 16 * 17 // 2
    job = a_job(Policy(4, 1, GPU, GPU, GPU))
    assert price(job, StepKind.ATTEND) == pytest.approx(pairs * 4 * 64 / 2.5e11)
    table = {16: 1e11, 64: 4e11}
    hardware = with_gpu(ACCELERATOR, replace(GPU_SITE, prefill_attention=table))
    long = a_job(Policy(1, 1, GPU, GPU, GPU), hardware, prompts=1, prompt_len=64)
    assert price(long, StepKind.ATTEND) == pytest.approx(64 * 65 / 2 * 4 * 64 / 4e11)
    between = a_job(Policy(1, 1, GPU, GPU, GPU), hardware, prompts=1, prompt_len=32)
    assert price(between, StepKind.ATTEND) == pytest.approx(32 * 33 / 2 * 4 * 64 / 2e11)


@pytest.mark.parametrize(
    ("lossy", "token_bytes", "rate"),
    [
        (EXACT, 2 * 64 * 2, 5e10),
        # 16 values of a head: 8 bytes of codes and 4 of scale and least value.
        (Lossy(kv_cache=FOUR_BITS), 2 * 4 * 12, 1e10),
        (Lossy(weights=FOUR_BITS), 2 * 64 * 2, 5e10),
        (Lossy(value_share=0.1), 2 * 64 * 2 * 0.55, 5e10),  # all keys, a tenth of the values
    ],
)
def test_attention_of_a_token_reads_its_cache(lossy: Lossy, token_bytes: float, rate: float) -> None:
    """4 sequences with 16 tokens of prompt; the first new one is attended to as well, and two more two passes later."""
    job = a_job(Policy(4, 1, GPU, GPU, GPU, lossy=lossy))
    assert layer(job, 3) - layer(job, 1) == pytest.approx(4 * 2 * token_bytes / rate)
    away = a_job(Policy(4, 1, GPU, CPU, GPU, lossy=lossy))
    assert price(away, StepKind.ATTEND, number=1) == pytest.approx(4 * 17 * token_bytes / rate)


def test_attention_runs_at_the_rate_of_its_site_and_its_heads() -> None:
    job = a_job(Policy(4, 1, GPU, CPU, GPU, attention=AttentionSite.CPU))
    assert price(job, StepKind.ATTEND, number=1) == pytest.approx(4 * 17 * 256 / 1e10 + US)
    grouped = replace(GPU_SITE, decode_attention={"float16": {1: 1e10, 2: 4e10, 8: 5e10}})
    machine = with_gpu(ACCELERATOR, grouped)
    llama = a_job(Policy(4, 1, GPU, GPU, GPU), machine, small_llama())
    assert layer(llama, 3) - layer(llama, 1) == pytest.approx(4 * 2 * 128 / 4e10)


def test_attention_takes_time_for_a_call_and_for_each_of_its_sequences() -> None:
    beside = {"attend": {"float16": 3e-4}, "attend_sequence": {"float16": 2e-5}}
    job = a_job(Policy(4, 1, GPU, GPU, GPU), with_gpu(ACCELERATOR, replace(GPU_SITE, **beside)))
    without = a_job(Policy(4, 1, GPU, GPU, GPU))
    assert layer(job) == pytest.approx(layer(without) + 3e-4 + 4 * 2e-5)


def test_what_the_host_does_between_is_priced_by_its_memory() -> None:
    """Embedding rows of two tables, what sampling needs of a row, keys and values of a token into their place."""
    job = a_job(Policy(4, 1, CPU, CPU, GPU))
    assert price(job, StepKind.GATHER_ROWS, unit=0) == pytest.approx(4 * 16 * 2 * 64 * 2 / 2e10 + US)
    assert price(job, StepKind.SAMPLE, unit=4) == pytest.approx(4 * 8 / 2e10 + US)
    assert price(job, StepKind.APPEND_KV, number=1) == pytest.approx(4 * 256 / 2e10 + US)


def test_rates_are_looked_up_by_width_and_rows() -> None:
    """Rows between two of the table: on a line in logarithms. The width of a layer of 12 h^2 values is h, all of them
    counted."""
    table = {16: {1: 1e10, 64: 1e11}, 64: {1: 1e11, 64: 1e12}}
    machine = with_gpu(ACCELERATOR, replace(GPU_SITE, matrix={"float16": table}))
    job = a_job(Policy(4, 1, GPU, GPU, GPU), machine)
    assert price(job, StepKind.PROJECT) == pytest.approx(2 * 64 * 3 * 64**2 / 1e12, rel=0.02)
    eight = a_job(Policy(8, 1, GPU, GPU, GPU), machine, prompt_len=1)
    rate = (1e11 * 1e12) ** 0.5
    assert price(eight, StepKind.PROJECT) == pytest.approx(2 * 8 * 3 * 64**2 / rate, rel=0.02)


def test_prices_that_were_looked_up_are_those_of_the_same_work() -> None:
    """Steps of a micro-batch on parts of its cache had one price, whatever their sizes, as no bytes or FLOPs tell them
    apart; and the attention of a prompt of one token that of a decode step."""
    job = a_job(Policy(4, 1, GPU, Placement(cpu=0.25, disk=0.75), GPU), prompts=4)
    appended = prices(job, lambda s: s.kind is StepKind.APPEND_KV and s.unit == 1, number=1)
    expected = {256 / 2e10 + US, 3 * 256 / 2e10 + US}
    assert sorted(appended.values()) == pytest.approx(sorted(expected))
    one = a_job(Policy(1, 1, GPU, GPU, GPU, prefill_chunk=1), prompts=1, prompt_len=2)
    plan = one.plan
    cost = StepCost(plan)
    for steps in one.passes(plan):
        for step in steps:
            assert cost.seconds(step) == StepCost(plan).seconds(step)


@given(jobs())
@settings(max_examples=40, deadline=None)
def test_nothing_is_free_and_looking_up_is_pricing(job: PlannedJob) -> None:
    """Every step takes at least what any step takes; a step costs the same whether or not one like it was priced
    before. A device's links are busy while the host issues the next step."""
    plan = job.plan
    cost = StepCost(plan)
    for steps in job.passes(plan):
        for step in steps:
            seconds = cost.seconds(step)
            assert seconds >= US
            assert seconds == StepCost(plan).seconds(step)
            if step.bytes:
                rate = job.hardware.link_rate(step.lane)
                assert rate is not None
                moved_s = step.bytes / rate
                issue_s = cost.times(step).issue_s
                assert seconds == pytest.approx(max(moved_s, issue_s) if issue_s else moved_s + US)


def test_a_device_is_bound_by_its_work_or_by_the_host_that_issues_it() -> None:
    """A resident layer of an OPT is 16 operators in one step; a host that takes 2 us for each of them is slower than
    this device. What it issues does not depend on how much there is to do."""
    slow = with_gpu(ACCELERATOR, replace(GPU_SITE, operator=2e-6))
    for size in (2, 8):
        job = a_job(Policy(size, 1, GPU, GPU, GPU), slow, prompts=size)
        plan = job.plan
        step = next(s for s in list(job.passes(plan))[1] if s.kind is StepKind.LAYER and s.unit == 2)
        times = StepCost(plan).times(step)
        assert times.issue_s == pytest.approx(US + 16 * 2e-6)
        assert times.lane_s < times.issue_s == StepCost(plan).seconds(step)
    assert times.lane_s == layer(a_job(Policy(8, 1, GPU, GPU, GPU)))


def test_what_the_host_computes_is_not_issued() -> None:
    """Nor is anything for an accelerator that the host's cores emulate: its lanes are threads that do the work."""
    policy = Policy(4, 1, GPU, CPU, CPU, attention=AttentionSite.CPU)
    for hardware in (ACCELERATOR, EMULATED):
        job = a_job(policy, with_gpu(hardware, replace(GPU_SITE, operator=2e-6)))
        plan = job.plan
        cost = StepCost(plan)
        issued = {s.lane for one in job.passes(plan) for s in one if cost.times(s).issue_s}
        assert issued == ({Lane.GPU, Lane.H2D, Lane.D2H} if hardware is ACCELERATOR else set())


def test_a_machine_that_nobody_has_measured_is_refused() -> None:
    for machine in (
        HardwareProfile("cpu", Accelerator.NONE),
        HardwareProfile("box", Accelerator.CUDA, rates=Rates({Tier.CPU: CPU_SITE})),
        HardwareProfile("disk", Accelerator.NONE, rates=Rates({Tier.CPU: CPU_SITE})),
    ):
        with pytest.raises(UserError, match="flexgen_bench calibrate") as error:
            rates_of(machine)
        assert error.value.value == machine.name
    with pytest.raises(UserError, match="not known: gpu, "):
        rates_of(HardwareProfile("box", Accelerator.CUDA, rates=Rates({Tier.CPU: CPU_SITE})))
    with pytest.raises(UserError, match="not known: disk_read, disk_write"):
        rates_of(HardwareProfile("disk", Accelerator.NONE, rates=Rates({Tier.CPU: CPU_SITE})))


def test_links_are_those_between_a_machines_tiers() -> None:
    assert [lane for lane in HOST.lanes if lane.is_link] == [Lane.DISK_READ, Lane.DISK_WRITE]
    assert [lane.kind for lane in ACCELERATOR.lanes if lane.is_link] == list(LINKS)
    assert rates_of(HOST).sites == {Tier.CPU: CPU_SITE}


def test_measured_links_serve_where_none_are_stated() -> None:
    measured = Rates({Tier.CPU: CPU_SITE}, links={"disk_read": 1e8, "disk_write": 1e8}, spread={"x": 0.1})
    machine = HardwareProfile("here", Accelerator.NONE, rates=measured)
    job = a_job(Policy(4, 1, DISK, CPU, CPU), machine)
    whole = job.plan.model.packed.units[1].num_bytes
    assert price(job, StepKind.LOAD_WEIGHTS) == pytest.approx(whole / 1e8 + US)


def with_gpu(machine: HardwareProfile, gpu: SiteRates) -> HardwareProfile:
    return replace(machine, rates=Rates({Tier.GPU: gpu, Tier.CPU: CPU_SITE}))


def with_cpu(machine: HardwareProfile, cpu: SiteRates) -> HardwareProfile:
    return replace(machine, rates=Rates({Tier.CPU: cpu}))


def test_recorded_passes_are_launches_once_it_is_known_what_one_costs() -> None:
    """The first layer of a pass is launched with all that follow it; of the others the host has no more than the step.
    Prompts are issued as ever."""
    known = with_gpu(ACCELERATOR, replace(GPU_SITE, operator=2e-6, launch=1e-5))
    here = Policy(4, 1, GPU, GPU, GPU)
    unknown = a_job(here, with_gpu(ACCELERATOR, replace(GPU_SITE, operator=2e-6)))

    def issued(job: PlannedJob, number: int, kind: StepKind) -> list[float]:
        cost = StepCost(job.plan)
        return [cost.times(step).issue_s for step in list(job.passes(job.plan))[number] if step.kind is kind]

    first, *others = issued(a_job(here, known), 1, StepKind.LAYER)
    assert first == pytest.approx(US + 1e-5)
    assert others == [pytest.approx(US)] * len(others)
    assert min(issued(unknown, 1, StepKind.LAYER)) > 16 * 2e-6
    for kind in (StepKind.PROJECT, StepKind.OUTPUT):
        assert issued(a_job(here, known), 0, kind) == issued(unknown, 0, kind)

"""The step generator: whatever order the derived dependencies allow must compute what program order computes."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.config.build import model_spec
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, ExpertLoads, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane, Site, Tier
from flexgen_bench.models.model import Model
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.dependencies import DependencyTracker
from flexgen_bench.schedule.kv_layout import KVLayout
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_group import KVSlot, Span, start_group
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step, StepKind
from tests.support.shapes import mixture_shape, opt_shape

LAYERS = 3
SHAPE = opt_shape(num_layers=LAYERS)
MODEL = Model.of(SHAPE, DType.FLOAT32)
MIXTURE = Model.of(mixture_shape(num_layers=LAYERS), DType.FLOAT32)
HOST = HardwareProfile("cpu", Accelerator.NONE)
EMULATED = HardwareProfile("emulated", Accelerator.EMULATED, gpu_memory_bytes=2**30)


@dataclass(frozen=True)
class Case:
    """A job of random shape under a random policy; ``early`` are sequences that end after so many tokens."""

    policy: Policy
    hardware: HardwareProfile
    requests: tuple[Request, ...]
    early: dict[int, int]

    @property
    def plan(self) -> MemoryPlan:
        model = MODEL if self.policy.experts is None else MIXTURE
        return plan_job(model, self.policy, self.hardware, self.requests)


@st.composite
def placements(draw: st.DrawFn, tiers: tuple[Tier, ...]) -> Placement:
    shares = draw(st.tuples(*[st.integers(0, 3)] * len(tiers)).filter(any))
    return Placement(**{str(t): n / sum(shares) for t, n in zip(tiers, shares, strict=True)})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    hardware = draw(st.sampled_from([HOST, EMULATED]))
    policy = Policy(
        gpu_batch_size=draw(st.integers(1, 4)),
        num_gpu_batches=draw(st.integers(1, 4)),
        weights=draw(placements(hardware.tiers)),
        kv_cache=draw(placements(hardware.tiers)),
        activations=draw(placements(hardware.tiers)),
        prefetch=draw(st.integers(1, 3)),
        attention=draw(st.sampled_from(AttentionSite)),
        schedule=draw(st.sampled_from(Schedule)),
        prefill_chunk=draw(st.sampled_from([None, 1, 3])),
        offloaded=draw(st.sampled_from(Offloaded)),
    )
    if policy.attention is AttentionSite.CPU:
        policy = replace(policy, kv_moved=draw(st.sampled_from([0.0, 0.3, 0.7])))
    if draw(st.booleans()):
        experts, loads = draw(placements(hardware.tiers)), draw(st.sampled_from(ExpertLoads))
        policy = replace(policy, experts=experts, expert_loads=loads)
    lengths = st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from([0, 0, 2, 4]))
    requests = tuple(Request(*r) for r in draw(st.lists(lengths, min_size=1, max_size=9)))
    early = draw(st.dictionaries(st.integers(0, len(requests) - 1), st.integers(1, 4), max_size=4))
    return Case(policy, hardware, requests, early)


def all_passes(case: Case, plan: MemoryPlan) -> list[list[Step]]:
    """Every step of a job by pass; sequences leave when they have their tokens, some early."""
    scheduler = Scheduler(case.policy, plan)
    tokens = dict.fromkeys(range(len(case.requests)), 0)
    found = []
    while not scheduler.is_done:
        batches = scheduler.schedule()
        found.append(list(scheduler.steps(batches)))
        for batch in batches:
            for member in batch.members:
                if member.token or member.is_last_chunk:
                    for i in member.group.sequences:
                        tokens[i] += 1
        scheduler.postprocess(
            lambda group: [
                i for i in group.sequences if tokens[i] >= min(case.requests[i].gen_len, case.early.get(i, 99))
            ]
        )
    assert all(n == min(case.requests[i].gen_len, case.early.get(i, 99)) for i, n in tokens.items())
    return found


def all_steps(case: Case, plan: MemoryPlan | None = None) -> list[Step]:
    return [step for steps in all_passes(case, plan or case.plan) for step in steps]


def meaning(steps: list[Step]) -> list[tuple[object, ...]]:
    """What each step would read if they ran in this order: for every buffer, which step wrote it last."""
    written: dict[Buffer, int] = {}
    seen: dict[int, tuple[object, ...]] = {}
    for step in steps:
        touched = (*step.reads, *step.writes)
        seen[id(step)] = tuple(written.get(buffer) for buffer in touched)
        for buffer in step.writes:
            written[buffer] = id(step)
    return [seen[key] for key in sorted(seen)]


def any_legal_order(steps: list[Step], rng: random.Random) -> list[Step]:
    """Run the lanes at random speeds, respecting only lane order and derived dependencies."""
    tracker = DependencyTracker()
    lanes = (*Site.GPU.lanes, Site.GPU.net_out)
    queues: dict[Lane, deque[tuple[Step, int, dict[Lane, int]]]] = {lane: deque() for lane in lanes}
    for step in steps:
        number, waits = tracker.add(step)
        queues[step.lane].append((step, number, waits))
    done = dict.fromkeys(lanes, 0)
    order = []
    while any(queues.values()):
        ready = [
            lane
            for lane, queue in queues.items()
            if queue and all(done[other] >= n for other, n in queue[0][2].items())
        ]
        assert ready, "deadlock: no lane can go on"
        lane = rng.choice(ready)
        step, number, _ = queues[lane].popleft()
        done[lane] = number
        order.append(step)
    return order


@given(cases(), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_every_legal_order_means_the_same(case: Case, seed: int) -> None:
    steps = all_steps(case)
    order = any_legal_order(steps, random.Random(seed))
    assert len(order) == len(steps)
    assert meaning(order) == meaning(steps)


@given(cases())
@settings(max_examples=80, deadline=None)
def test_staged_units_are_loaded_before_use_once_per_pass(case: Case) -> None:
    """A compute step that names a slot finds its own unit there, and every streamed unit is loaded once a pass; a last
    pass that nobody could foresee leaves loads for one more behind."""
    plan = case.plan
    passes = all_passes(case, plan)
    slots: dict[tuple[Tier, int], int] = {}
    streamed = [u.index for u in plan.job.streamed]
    loads = dict.fromkeys(streamed, 0)
    for step in (step for steps in passes for step in steps):
        unit = plan.job.units[step.unit]
        if step.kind is StepKind.LOAD_WEIGHTS:
            tier = step.lane.ends[1]
            slots[tier, step.weight_buffer] = step.unit
            loads[step.unit] += tier is unit.site.tier and step.part <= 0
        elif step.kind is StepKind.LOAD_EXPERTS:
            slots[step.lane.ends[1], step.weight_buffer] = step.unit
        elif step.kind in (StepKind.EMBED, StepKind.PROJECT, StepKind.OUTPUT, StepKind.EXPERTS, StepKind.HEAD):
            assert (step.weight_buffer >= 0) == bool(unit.path)
            if step.weight_buffer >= 0:
                assert slots[unit.site.tier, step.weight_buffer] == step.unit
    extra = [count - len(passes) for count in loads.values()]
    assert all(count >= 0 for count in extra)
    # Of layers, of experts, and the head.
    assert sum(extra) <= (2 * plan.job.weight_buffers + 1 if case.early else 0)


@given(cases())
@settings(max_examples=80, deadline=None)
def test_only_links_move_bytes_and_every_prompt_token_passes_every_layer(case: Case) -> None:
    """Once for every prompt that has it, or for all of a sequence group that share it."""
    steps = all_steps(case)
    assert all(step.bytes == 0 for step in steps if not step.lane.is_link)
    used = {step.lane for step in steps}
    accelerator = case.hardware is EMULATED
    assert accelerator or used <= {Lane.CPU, Lane.DISK_READ, Lane.DISK_WRITE}
    started = {s.micro_batch.members[0].group for s in steps if not s.on_weights and s.micro_batch.is_prefill}
    prompt_tokens = sum(r.prompt_len for r in case.requests)
    prompt_tokens -= sum((c.size - 1) * c.shared for c in started)
    for layer in range(1, LAYERS + 1):
        rows = [
            s.micro_batch.rows
            for s in steps
            if s.kind is StepKind.OUTPUT and s.unit == layer and not s.on_weights and s.micro_batch.is_prefill
        ]
        assert sum(rows) == prompt_tokens


@given(cases())
@settings(max_examples=80, deadline=None)
def test_rooms_and_micro_batches_keep_to_the_policy(case: Case) -> None:
    """Never more sequences than a block, no two sequence groups in a KV slot, decode shared up to the micro-batch
    size."""
    plan = case.plan
    scheduler = Scheduler(case.policy, plan)
    while not scheduler.is_done:
        batches = scheduler.schedule()
        list(scheduler.steps(batches))
        running = {m.group.index: m.group for b in batches for m in b.members}
        assert len({c.kv_slot for c in running.values()}) == len(running)
        assert sum(c.size for c in running.values()) <= case.policy.block_size
        assert all(sum(m.group.size for m in b.members) <= case.policy.gpu_batch_size for b in batches)
        scheduler.postprocess()


def test_the_continuous_schedule_spreads_prefill_over_the_passes() -> None:
    """Eight blocks of 8 sequences that live 8 passes: once all KV slots are taken, one sequence starts in every
    pass."""
    policy = Policy(4, 2, schedule=Schedule.CONTINUOUS)
    case = Case(policy, HOST, (Request(5, 8),) * 64, {})
    starts = [
        sum(s.kind is StepKind.EMBED and s.micro_batch.is_prefill for s in steps)
        for steps in all_passes(case, case.plan)
    ]
    assert starts == [1] * 64 + [0] * 7
    block = Case(Policy(4, 2), HOST, (Request(5, 8),) * 64, {})
    assert len(all_passes(block, block.plan)) == 64


def test_the_cpu_attends_while_the_accelerator_computes() -> None:
    """Projections of a layer come before its prefill, and a micro-batch's output is followed by its next projection."""
    policy = Policy(2, 2, Placement(cpu=1), Placement(cpu=1), Placement(gpu=1), attention=AttentionSite.CPU)
    case = Case(policy, EMULATED, (Request(3, 3),) * 4, {})
    decode = all_passes(case, case.plan)[1]
    on_gpu = [(s.kind, s.unit, s.micro_batch_index) for s in decode if s.lane is Lane.GPU][2:-2]
    project, output = StepKind.PROJECT, StepKind.OUTPUT
    assert on_gpu == [
        (project, 1, 0),
        (project, 1, 1),
        (output, 1, 0),
        (project, 2, 0),
        (output, 1, 1),
        (project, 2, 1),
        (output, 2, 0),
        (project, 3, 0),
        (output, 2, 1),
        (project, 3, 1),
        (output, 3, 0),
        (output, 3, 1),
    ]


def test_a_slot_is_not_overwritten_while_it_is_used() -> None:
    """Write-after-read: with one slot, the second load waits for the first unit's last compute step."""
    tracker = DependencyTracker()
    slot = Buffer("weights", 0)
    tracker.add(Step(Lane.DISK_READ, StepKind.LOAD_WEIGHTS, 1, writes=(slot,)))
    assert tracker.add(Step(Lane.CPU, StepKind.PROJECT, 1, reads=(slot,))) == (1, {Lane.DISK_READ: 1})
    assert tracker.add(Step(Lane.CPU, StepKind.OUTPUT, 1, reads=(slot,))) == (2, {Lane.DISK_READ: 1})
    assert tracker.add(Step(Lane.DISK_READ, StepKind.LOAD_WEIGHTS, 2, writes=(slot,))) == (2, {Lane.CPU: 2})


def test_loads_run_ahead_over_the_end_of_a_pass_but_not_over_the_end_of_the_job() -> None:
    policy = Policy(1, 1, Placement(disk=1), Placement(cpu=1), Placement(cpu=1), prefetch=2)
    case = Case(policy, HOST, (Request(2, 2),), {})
    loads = [[s.unit for s in steps if s.kind is StepKind.LOAD_WEIGHTS] for steps in all_passes(case, case.plan)]
    # The embedding's own weights are read with its rows; the tied head is streamed like a layer, into a slot of its
    # own.
    assert loads == [[1, 2, 3, 4, 1, 2], [3, 4]]


def test_a_segment_that_nobody_will_attend_to_is_not_written() -> None:
    """The last fed token used to complete the last segment, which went to disk although the sequence group was about to
    leave."""
    for gen_len in range(2, 40):
        policy = Policy(2, 1, Placement(cpu=1), Placement(disk=1), Placement(cpu=1))
        case = Case(policy, HOST, (Request(3, gen_len),) * 2, {})
        steps = [s for s in all_steps(case) if s.micro_batch.token]
        last_load = max(i for i, s in enumerate(steps) if s.kind is StepKind.LOAD_KV)
        written = [i for i, s in enumerate(steps) if s.lane is Lane.DISK_WRITE]
        assert all(i < last_load for i in written), gen_len
        last = max(s.token for s in steps)
        assert all(steps[i].token < last for i in written)


def test_a_large_head_is_loaded_in_pieces_between_the_layers() -> None:
    """In one piece it held the link until the layers in their slots were computed and the next were not there."""
    shape = model_spec("opt-1.3b").shape  # the head is two layers large, and 24 layers come before it
    policy = Policy(1, 1, Placement(disk=1))
    plan = plan_job(Model.of(shape, DType.BFLOAT16), policy, HOST, [Request(2, 1)])
    scheduler = Scheduler(policy, plan)
    steps = list(scheduler.steps(scheduler.schedule()))
    loads = [s for s in steps if s.kind is StepKind.LOAD_WEIGHTS]
    pieces = [i for i, s in enumerate(loads) if s.unit == 25]
    assert pieces == [4, 13, 22]
    assert sum(loads[i].bytes for i in pieces) == plan.job.units[25].load_bytes
    assert max(loads[i].bytes for i in pieces) <= plan.job.units[1].load_bytes
    assert [s.unit for s in loads if s.unit != 25] == list(range(1, 25))


def test_sequences_that_leave_give_up_their_rows_and_keep_their_slots() -> None:
    kv_slot = KVSlot(0, (Span(Tier.GPU, 0, 2), Span(Tier.DISK, 2, 5)), (Span(Tier.CPU, 0, 5),))
    layouts = (KVLayout(2, 9, 3, 3, 8), KVLayout(3, 9, 3, 1, 8))
    group = start_group(7, kv_slot, (10, 11, 12, 13, 14), (1, 2, 3, 4, 9), 4, layouts)
    assert group.places == (0, 1, 0, 1, 2)
    left = group.without([10, 13]).without([12])
    assert left.sequences == (11, 14)
    assert left.prompt_lens == (2, 9)
    assert left.kv == (Span(Tier.GPU, 0, 1), Span(Tier.DISK, 1, 2))
    assert left.places == (1, 2)
    assert left.whole == group


@pytest.mark.parametrize(("tokens", "full", "used"), [(0, 0, 0), (1, 0, 1), (4, 1, 1), (5, 1, 2)])
def test_kv_segments(tokens: int, full: int, used: int) -> None:
    layout = KVLayout(2, 3, 9, 4, 16)
    assert layout.full_segments(tokens) == full
    assert layout.used_segments(tokens) == used
    assert layout.region_bytes == layout.prefix_bytes(layout.num_segments)
    assert layout.prompt_bytes % 4096 == 0

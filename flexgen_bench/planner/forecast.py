"""How long a planned job takes: every kind of pass played once on the simulated lanes, and the passes in between estimated.

Passes of the same shape differ in how many tokens are cached, so their times lie on a line: of a long run of them the first
and the last are played. Blocks that repeat are played once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Lane
from flexgen_bench.planner.cost import StepCost, rates_of
from flexgen_bench.planner.lane_sums import LaneSums
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.program import Program
from flexgen_bench.planner.simulator import Contention, Event, SharedCores, Simulator
from flexgen_bench.planner.units import PackedModel
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.steps import Step

# At least so many passes are played at each end of a run of like ones; the first of a run still feels what was before it.
LEAST_WINDOW = 2
# Which micro-batches a pass has, and what is in them. Passes with the same micro-batches are alike: sequences and cached tokens in
# them change from one to the next by about as much.
Shape = tuple[tuple[object, ...], tuple[object, ...]]
# Played passes and their weights, by number: the time of a pass is the weighted sum of theirs.
Mix = Mapping[int, float]


@dataclass(frozen=True)
class PassTime:
    """One pass of a job: seconds, and per lane the seconds it worked and the bytes it moved."""

    seconds: float
    is_prefill: bool
    busy_s: Mapping[Lane, float]
    bytes: Mapping[Lane, float]


@dataclass(frozen=True)
class Forecast:
    """The times of all passes, and every step of the played ones if it was asked for."""

    passes: tuple[PassTime, ...]
    events: tuple[Event, ...] = ()

    @property
    def prefill_s(self) -> float:
        """Seconds of the passes that only compute prompts, as the engine counts them."""
        return sum(p.seconds for p in self.passes if p.is_prefill)

    @property
    def decode_s(self) -> float:
        return sum(p.seconds for p in self.passes if not p.is_prefill)

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    def busy_s(self) -> dict[Lane, float]:
        return {lane: sum(p.busy_s[lane] for p in self.passes) for lane in Lane}

    def moved_bytes(self) -> dict[Lane, int]:
        return {lane: round(sum(p.bytes[lane] for p in self.passes)) for lane in Lane}


def forecast(
    shape: ModelShape,
    packed: PackedModel,
    dtype: DType,
    policy: Policy,
    hardware: HardwareProfile,
    plan: MemoryPlan,
    *,
    every_pass: bool = False,
    keep: bool = False,
) -> Forecast:
    """Play a planned job. every_pass: estimate none; keep: keep the times of every played step. UserError without rates."""
    cost = StepCost(shape, packed, dtype, policy, hardware, plan.job)
    simulator = Simulator(cost.seconds, policy.overlap, contention(hardware), keep)
    return _forecast(policy, plan, simulator, every_pass)


def closed_form(
    shape: ModelShape,
    packed: PackedModel,
    dtype: DType,
    policy: Policy,
    hardware: HardwareProfile,
    plan: MemoryPlan,
) -> Forecast:
    """The same from sums over the steps of each pass (``lane_sums.py``): a bound that nothing but waiting adds to."""
    cost = StepCost(shape, packed, dtype, policy, hardware, plan.job)
    return _forecast(policy, plan, LaneSums(cost.seconds, policy.overlap, plan.job), False)


class Player(Protocol):
    """What tells the seconds of a pass from its steps, and keeps account."""

    @property
    def busy_s(self) -> Mapping[Lane, float]: ...

    @property
    def bytes(self) -> Mapping[Lane, int]: ...

    @property
    def events(self) -> Sequence[Event]: ...

    def run_pass(self, steps: Iterable[Step]) -> float: ...


def _forecast(policy: Policy, plan: MemoryPlan, player: Player, every_pass: bool) -> Forecast:
    shapes = list(_shapes(policy, plan))
    mixes = [{n: 1.0} for n in range(len(shapes))] if every_pass else _mixes(shapes, _window(plan))
    program = Program(policy, plan)
    played: dict[int, PassTime] = {}
    for number, mix in enumerate(mixes):
        batches = program.begin_pass()
        if mix == {number: 1.0}:
            played[number] = _play(player, program, batches)
        program.end_pass()
    return Forecast(tuple(_mixed(mix, played) for mix in mixes), tuple(player.events))


def contention(hardware: HardwareProfile) -> Contention | None:
    """What lanes of this machine take from each other; None: nothing."""
    if hardware.accelerator is not Accelerator.EMULATED:
        return None
    memory = rates_of(hardware).sites[hardware.compute_tier].memory
    # Copying reads and writes memory, on one of the cores.
    shares = {
        lane: min(0.5, 2 * rate / memory)
        for lane in (Lane.H2D, Lane.D2H)
        if (rate := hardware.link_rate(lane))
    }
    return SharedCores(shares)


def _play(player: Player, program: Program, batches: list[MicroBatch]) -> PassTime:
    busy, moved = dict(player.busy_s), dict(player.bytes)
    seconds = player.run_pass(program.steps(batches))
    return PassTime(
        seconds,
        all(batch.is_prefill for batch in batches),
        {lane: s - busy[lane] for lane, s in player.busy_s.items()},
        {lane: float(b - moved[lane]) for lane, b in player.bytes.items()},
    )


def _shapes(policy: Policy, plan: MemoryPlan) -> Iterator[Shape]:
    """Of every pass of the job."""
    program = Program(policy, plan)
    while not program.is_done:
        batches = program.begin_pass()
        yield (
            tuple((batch.is_prefill, batch.chunk) for batch in batches),
            tuple(
                (m.token, m.cohort.size, m.cohort.prompt_lens) for b in batches for m in b.members
            ),
        )
        program.end_pass()


def _window(plan: MemoryPlan) -> int:
    """Passes in which whatever happens now and then happens once: tails of a cache that is moved are written in segments."""
    longest = LEAST_WINDOW
    for room in plan.cohorts.rooms:
        for cohort in plan.cohorts.possible(room):
            segments = [x.segment_tokens for x in cohort.layouts if x.num_segments > 1]
            longest = max([longest, *segments])
    return longest


def _mixes(shapes: Sequence[Shape], window: int) -> list[Mix]:
    """For every pass, of which played ones its time is made. A pass that follows the same one as before is not played again, and of
    a run of passes alike only its first (what came before it differs), a window after that, and a window at the end."""
    mixes: list[Mix] = []
    seen: dict[object, int] = {}

    def play(number: int) -> Mix:
        key = (shapes[number], shapes[number - 1] if number else None)
        return {seen.setdefault(key, number): 1.0}

    start = 0
    while start < len(shapes):
        stop = start + 1
        while stop < len(shapes) and shapes[stop][0] == shapes[start][0]:
            stop += 1
        if stop - start <= 2 * window + 2:
            mixes += [play(number) for number in range(start, stop)]
        else:
            head = range(start + 1, start + 1 + window)
            tail = range(stop - window, stop)
            mixes += [play(number) for number in (start, *head)]
            after = [play(number) for number in tail]
            for number in range(head.stop, tail.start):
                # On the line through the middles of both windows.
                share = (number - (head[0] + head[-1]) / 2) / (tail[0] - head[0])
                mixes.append(_blend(mixes[head.start : head.stop], after, share))
            mixes += after
        start = stop
    return mixes


def _blend(head: Sequence[Mix], tail: Sequence[Mix], share: float) -> Mix:
    mix: dict[int, float] = {}
    for window, weight in ((head, 1 - share), (tail, share)):
        for number in (n for one in window for n in one):
            mix[number] = mix.get(number, 0.0) + weight / len(window)
    return mix


def _mixed(mix: Mix, played: Mapping[int, PassTime]) -> PassTime:
    parts = [(played[number], weight) for number, weight in mix.items()]
    if len(parts) == 1:
        return parts[0][0]
    return PassTime(
        sum(p.seconds * w for p, w in parts),
        parts[0][0].is_prefill,
        {lane: sum(p.busy_s[lane] * w for p, w in parts) for lane in Lane},
        {lane: sum(p.bytes[lane] * w for p, w in parts) for lane in Lane},
    )

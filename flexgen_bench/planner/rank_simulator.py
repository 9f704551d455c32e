"""Simulates the ranks of a pipeline together, on one clock: the passes of all waves, as the engine submits them.

Every rank has lanes of its own (the same kinds, with the rank as their device) and steps with the dependencies that
they have in its process. Between ranks, a step that receives waits for the one that sends; and a step that sends waits
until as much of what was sent before has been received as the memory for what is under way asks for
(``Staging.outbox``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flexgen_bench.core.tiers import NETWORK, Lane, LaneKind
from flexgen_bench.planner.cost import StepCost, StepTimes
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.rank_machines import RankMachine, contention_of
from flexgen_bench.planner.simulated_lanes import AT_BEGIN, Contention, LaneSeconds, SimulatedLanes
from flexgen_bench.planner.simulator import ends_pass
from flexgen_bench.schedule.dependencies import Dependencies, DependencyTracker
from flexgen_bench.schedule.steps import Step, StepKind

# Of lanes, the number of the step that ends a pass.
Ends = dict[Lane, int]


class RankSimulator(SimulatedLanes):
    """plans: one for each rank, of the same job. machines: what each rank runs on; None: a machine of its own, as in
    its plan. keep: see ``SimulatedLanes``; the lanes of events are those of all ranks.

    ``submit`` takes a pass of all ranks, ``finish`` lets time go on until one that was submitted is over: on every rank
    its last step that computes, and the tokens that have come.
    """

    def __init__(
        self, plans: Sequence[MemoryPlan], machines: Sequence[RankMachine] | None = None, keep: bool = False
    ) -> None:
        if machines is None:
            machines = [RankMachine(plan.hardware, host) for host, plan in enumerate(plans)]
        senders = [None, *(plan.hardware for plan in plans)]
        self._costs = [StepCost(plan, sender) for plan, sender in zip(plans, senders, strict=False)]
        super().__init__(self._times_of, contention_of(machines), keep)
        self._ranks = [_Rank(plan, rank) for rank, plan in enumerate(plans)]

    def submit(self, passes: Sequence[Iterable[Step]], account: LaneSeconds | None = None) -> Ends:
        """A pass: the steps of each rank. account: where its work is counted."""
        ends: Ends = {}
        sent: dict[int, _Sent] = {}  # by micro-batch, from the rank before
        tokens: dict[int, int] = {}  # by micro-batch, the steps of the last rank that send them
        late: list[tuple[_Rank, Step]] = []  # what waits for these: nothing of the pass comes behind it
        for rank, steps in zip(self._ranks, passes, strict=True):
            received, sent = sent, {}
            for step in steps:
                if step.kind is StepKind.RECV_TOKENS:
                    late.append((rank, step))
                    continue
                number, waits = self._add_of(rank, step, account)
                if step.lane.kind not in NETWORK:
                    continue
                if step.kind is StepKind.SEND_HIDDEN:
                    message = sent[step.micro_batch_index] = _Sent(number, step.bytes)
                    rank.outbox.send(message, waits)
                elif step.kind is StepKind.RECV_HIDDEN:
                    message = received[step.micro_batch_index]
                    message.received = number
                    waits[rank.sender] = message.number
                elif step.kind is StepKind.SEND_TOKENS:
                    tokens[step.micro_batch_index] = number
            ends |= {lane: number for lane, number in rank.last.items() if ends_pass(lane, rank.tokens_stay)}
            ends |= rank.previous
        last = self._ranks[-1].lanes[Lane(LaneKind.NET_OUT)]
        for rank, step in late:
            number, waits = self._add_of(rank, step, account)
            waits[last] = tokens[step.micro_batch_index]
            ends[rank.lanes[step.lane]] = number
        return ends

    def finish(self, ends: Ends) -> None:
        for lane, number in ends.items():
            self.run_until(lane, number)

    def drain(self) -> None:
        """Let everything end that was submitted."""
        for rank in self._ranks:
            self.finish(rank.last)

    def seconds(self, step: Step) -> float:
        """What a step on a lane of a rank takes by itself."""
        return self._costs[step.lane.device].seconds(step)

    def _speed(self, contention: Contention) -> Mapping[Lane, float] | None:
        """Asked every time: of all ranks' lanes hardly any two moments are alike, and what is alike is known to it."""
        speed = contention(self._running)
        return speed if any(s != 1 for s in speed.values()) else None

    def _times_of(self, step: Step) -> StepTimes:
        return self._costs[step.lane.device].times(step)

    def _add_of(self, rank: _Rank, step: Step, account: LaneSeconds | None) -> tuple[int, Dependencies]:
        """Its number, and what it waits for, to which more may be added before time goes on."""
        lane = rank.lanes[step.lane]
        step = step._replace(lane=lane)
        number, waits = rank.tracker.add(step)
        given_s = None
        if not rank.overlap:  # one after the other
            given_s = AT_BEGIN
            waits |= {other: n for other, n in rank.previous.items() if other is not lane}
            rank.previous = {lane: number}
        self.add(step, waits, given_s, account)
        rank.last[lane] = number
        return number, waits


@dataclass(slots=True)
class _Sent:
    """Hidden states that a step sends: its number, and that of the step that receives them."""

    number: int
    bytes: int
    received: int = 0


class _Outbox:
    """What a rank has sent and the next one has not yet received. room: bytes there are for it."""

    def __init__(self, room: int, receiver: Lane) -> None:
        self._room, self._receiver = room, receiver
        self._under_way: deque[_Sent] = deque()
        self._bytes = 0

    def send(self, message: _Sent, waits: Dependencies) -> None:
        """Add to what a step waits for what must have been received before there is room for its message."""
        self._under_way.append(message)
        self._bytes += message.bytes
        while self._bytes > self._room and len(self._under_way) > 1:
            gone = self._under_way.popleft()
            self._bytes -= gone.bytes
            waits[self._receiver] = max(waits.get(self._receiver, 0), gone.received)


class _Rank:
    def __init__(self, plan: MemoryPlan, number: int) -> None:
        self.lanes = {Lane(kind): Lane(kind, number) for kind in LaneKind}
        self.tracker = DependencyTracker()
        self.overlap = plan.policy.overlap
        self.tokens_stay = self.overlap and plan.job.tokens_stay
        self.last: Ends = {}
        self.previous: Ends = {}  # the step before, where each waits for that
        self.outbox = _Outbox(plan.staging.outbox, Lane(LaneKind.NET_IN, number + 1))
        self.sender = Lane(LaneKind.NET_OUT, max(0, number - 1))

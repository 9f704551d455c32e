"""An engine over several ranks, where an engine on one device would stand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from flexgen_bench.core.errors import DoesNotFit, RankLost, UserError
from flexgen_bench.core.moment import JobState
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.progress import Progress, quiet
from flexgen_bench.core.tiers import Lane, Site
from flexgen_bench.core.timeline import Timeline
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import GREEDY_ROW_BYTES, Engine
from flexgen_bench.engine.generation import Running, check_new
from flexgen_bench.engine.job_run import JobResult
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.ranks.commands import Check, Generate, Load, RankReport, SequenceOfJob, Unload
from flexgen_bench.ranks.group import RankGroup
from flexgen_bench.ranks.ranks import Ranks
from flexgen_bench.schedule.sequence_groups import Capacity, Request

# What several ranks do not do.
OPEN_JOBS = "jobs that take requests while they run (serve, chat, stream, open)"
SCORING = "scoring (log-likelihoods, logprobs of prompts)"


class RankedEngine:
    """Weights in place on all ranks, ready for jobs. This process is rank 0.

    A job that fails ends all other ranks (RankLost if one of them had ended before). The next job starts new ones.
    Raises what an Engine raises, of whichever rank.
    """

    def __init__(self, weights: PackedWeights, policy: Policy, device: Device, offload_dir: Path, ranks: Ranks) -> None:
        self.policy, self._ranks = policy, ranks
        self._group = ranks.group()
        own: list[Engine] = []

        def load() -> None:
            wire = self._group.wire
            own.append(weights.engine(policy, device, offload_dir, ranks.stages[0], wire))

        try:
            self._group.ask(self._load, load)
        except BaseException:
            for engine in own:
                engine.close()
            if self._group.error is None:
                with suppress(Exception):  # of what has failed before
                    self._group.ask(Unload())  # some have their weights
            raise
        self._own = own[0]
        self.direct_io = self._own.direct_io

    @property
    def _load(self) -> Load:
        return Load(self.policy, self._ranks.stages)

    def generate(self, sequences: Sequence[Running], progress: Progress = quiet) -> JobResult:
        """Run every sequence to its end. Results are in the sequences themselves; those that had ended when a rank was
        lost keep theirs."""
        check_new(sequences)
        self.check_free()
        self._check(*self._own.asked(sequences))
        command = Generate(tuple(SequenceOfJob.of(sequence) for sequence in sequences))
        group = self._ready()
        result, reports = group.run(command, lambda: self._own.generate(sequences, progress))
        return _of_all(result, dict(enumerate(reports, start=1)), group.on_this_host)

    def plan(self, requests: Sequence[Request] | Capacity, logits_row_bytes: int = GREEDY_ROW_BYTES) -> MemoryPlan:
        """Of this rank."""
        return self._own.plan(requests, logits_row_bytes)

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether all ranks have room for a job of these requests."""
        try:
            self._check(requests, GREEDY_ROW_BYTES)
        except DoesNotFit:
            return False
        return True

    def check_free(self) -> None:
        """UserError if no job can be run now: the engine is closed."""
        self._own.check_free()

    def release_kept(self) -> None:
        """Give back what the last job has left for the next one, on this rank."""
        self._own.release_kept()

    def job_state(self) -> JobState | None:
        """What this rank is doing in the job that runs; afterwards how the last one ended."""
        return self._own.job_state()

    def close(self) -> None:
        """Release the weights on all ranks, which stay for another engine. A second time does nothing."""
        self._own.close()
        if self._group.error is None:
            with suppress(RankLost):  # it holds nothing any more
                self._group.ask(Unload())

    def _check(self, requests: Sequence[Request], logits_row_bytes: int) -> None:
        self._own.check(requests, logits_row_bytes)
        self._ready().ask(Check(tuple(requests), logits_row_bytes))

    def _ready(self) -> RankGroup:
        """The other ranks with their weights: new ones, if some were lost."""
        group = self._ranks.group()
        if group is not self._group:
            group.ask(self._load)
            self._own.wire = group.wire
            self._group = group
        return group


def refused(what: str, ranks: Ranks) -> UserError:
    """For what only one device does so far."""
    return UserError(
        ranks.setting,
        len(ranks.stages),
        f"1 for {what}",
        "Several ranks only generate from prompts that are all there.",
    )


def _of_all(result: JobResult, reports: Mapping[int, RankReport], on_this_host: Collection[int]) -> JobResult:
    """What rank 0 has seen of a job, and the lanes, memory and plans of the others under their own numbers.

    Processes of one machine have one clock, which is rank 0's. That of another host says nothing of this one's, so that
    a rank's times there count from its own job's beginning.
    """
    assert result.plan is not None
    planned = {site: dict(parts) for site, parts in result.plan.bytes.items()}
    lanes, allocated = dict(result.lanes), dict(result.allocated)
    timeline = dict(result.timeline.lanes)
    origin_s = next((lane.origin_s for lane in timeline.values()), 0.0)
    for rank, report in reports.items():
        planned |= {Site(site.kind, rank): dict(parts) for site, parts in report.planned.items()}
        allocated |= {Site(site.kind, rank): dict(parts) for site, parts in report.allocated.items()}
        lanes |= {Lane(lane.kind, rank): use for lane, use in report.lanes.items()}
        for name, one in report.timeline.lanes.items():
            on_clock = replace(one, origin_s=origin_s) if rank in on_this_host else one
            timeline[str(Lane(Lane.parse(name).kind, rank))] = on_clock
    return replace(
        result, plan=replace(result.plan, bytes=planned), lanes=lanes, allocated=allocated, timeline=Timeline(timeline)
    )

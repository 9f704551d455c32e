"""Several ranks in one process, a thread each: engines of the stages of a model, connected by local wires."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.pipeline import Stage
from flexgen_bench.core.policy import Policy
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.job_run import JobResult
from flexgen_bench.engine.local_wire import LocalWire, local_wires

LIMIT_S = 120.0  # no job of a tiny model takes so long: ranks that wait for each other do


class Stuck(AssertionError):
    """Ranks wait for each other."""


@dataclass
class Rank:
    """What became of one rank's part of a job: its sequences and result, or its error."""

    sequences: list[Running] = field(default_factory=list)
    result: JobResult = field(default_factory=JobResult)
    error: BaseException | None = None

    @property
    def tokens(self) -> list[list[int]]:
        return [sequence.new for sequence in self.sequences]


def on_ranks(
    weights: PackedWeights,
    policies: Sequence[Policy],
    hardware: HardwareProfile,
    stages: Sequence[Stage],
    folder: Path,
    sequences: Callable[[], list[Running]],
    on_engine: Callable[[Engine], None] = lambda engine: None,
) -> list[Rank]:
    """A job on all ranks; every rank has sequences of its own, and a policy. Raises Stuck where they do not end."""

    def engine(number: int, wire: LocalWire) -> Engine:
        own = wire if len(stages) > 1 else None
        return weights.engine(policies[number], Device.open(hardware, 1), folder, stages[number], own)

    return in_threads(len(stages), engine, sequences, f"{policies[0]}, {stages}", on_engine)


def in_threads(
    count: int,
    engine_of: Callable[[int, LocalWire], Engine],
    sequences: Callable[[], list[Running]],
    what: str,
    on_engine: Callable[[Engine], None] = lambda engine: None,
) -> list[Rank]:
    """A job on so many ranks. engine_of: of a rank, by its number and wire. Raises Stuck where they do not end, saying
    ``what`` it was that they did."""
    wires, ranks = local_wires(count), [Rank() for _ in range(count)]

    def work(number: int, rank: Rank, wire: LocalWire) -> None:
        try:
            engine = engine_of(number, wire)
            try:
                on_engine(engine)
                rank.sequences = sequences()
                rank.result = engine.generate(rank.sequences)
            finally:
                engine.close()
        except BaseException as error:
            rank.error = error
            wire.abort(error)

    threads = [
        threading.Thread(target=work, args=(number, *each), name=f"rank-{number}", daemon=True)
        for number, each in enumerate(zip(ranks, wires, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    stuck = [thread.name for thread in threads if thread.is_alive()]
    if stuck:
        wires[0].abort(Stuck("given up"))
        raise Stuck(f"{', '.join(stuck)} did not end within {LIMIT_S:.0f} s: {what}")
    return ranks


def all_well(ranks: Sequence[Rank]) -> list[Rank]:
    """Raises what a rank has failed with, the first that was not ended by another one's failure."""
    errors = [rank.error for rank in ranks if rank.error is not None]
    for error in sorted(errors, key=lambda error: type(error).__name__ == "RankFailed"):
        raise error
    return list(ranks)

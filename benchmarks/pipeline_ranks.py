"""Four ranks against one: weights that fit only together, on emulated accelerators with slow links and a slow network.

``python benchmarks/pipeline_ranks.py [--quick] [--out results/benchmarks/pipeline_ranks.json]``

Each accelerator has the memory that a rank of four needs for its quarter of the weights, caches and buffers. One rank
alone keeps as many weights as go into that, beside its staging buffers, and streams the others in every pass; four keep
all. So they are more than four times as fast. Ranks are real processes; their times stand beside those of the simulator
(``planner/rank_forecast.py``), of the same plans and the rates of this machine. Two networks: one that takes longer
than computing, and one that is not felt, where four ranks are bound by the cores that they share.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import Bar, Options, Report, median, options
from engine_runs import Measured, Shape, dummy_weights_of, emulated, run

from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.pipeline import even_stages
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Lane, LaneKind, Tier
from flexgen_bench.core.units import GB, KB
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.machine.measured_rates import ensure_calibrated, with_calibration
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.planner.rank_forecast import RankForecast, rank_forecast
from flexgen_bench.planner.rank_machines import in_one_machine
from flexgen_bench.ranks.commands import Setup
from flexgen_bench.ranks.division import divide
from flexgen_bench.ranks.engines import Engines
from flexgen_bench.ranks.ranks import join
from flexgen_bench.schedule.sequence_groups import Request

RANKS = 4
AS_SIMULATED, FASTER = 0.10, 4.0
# One rank streams 97 of 109 MB in each pass, 3.9 s on this link; computing it takes 0.1 s.
H2D = 0.025 * GB
# A decoding micro-batch' hidden states, 2 KB, take 130 ms of the slow one: with four of them under way a pass waits for
# the network, not for the cores that ranks share here.
NETWORKS = {"slow network": 16 * KB, "fast network": 1.0 * GB}
JOB = Shape(prompts=8, prompt_len=2, gen_len=6)
QUICK_JOB = replace(JOB, gen_len=3)
WARM_UP = replace(JOB, gen_len=1)
VOCABULARY = 8192
MODEL = ModelShape(
    name="opt-of-16-layers",
    family="opt",
    num_layers=16,
    hidden_size=512,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    ffn_size=2048,
    vocab_size=VOCABULARY,
    max_positions=2048,
    tied_embeddings=True,
    options={"norm_before": True, "embed_dim": 512, "activation": "relu", "bias": True, "norm_affine": True},
)
GPU = Placement.all_on(Tier.GPU)
BATCH = 2  # sequences of a micro-batch, of one rank as of four: their tokens are then the same to the bit


@dataclass(frozen=True)
class Case:
    """So many ranks under a policy. memory: bytes of each accelerator."""

    name: str
    ranks: int
    policy: Policy
    memory: int
    network: float

    @property
    def hardware(self) -> HardwareProfile:
        links = {"h2d": H2D, "d2h": GB, "net_out": self.network, "net_in": self.network}
        return replace(emulated(), gpu_memory_bytes=self.memory, count=self.ranks, links=links)


@dataclass(frozen=True)
class Ran:
    """A case on the clock, and as it was simulated."""

    case: Case
    predicted: RankForecast
    measured: Measured

    @property
    def seconds(self) -> float:
        return self.measured.prefill_s + self.measured.decode_s

    @property
    def ratio(self) -> float:
        return self.predicted.total_s / self.seconds

    def busy_s(self, rank: int) -> dict[str, float]:
        """Measured, of each lane of a rank."""
        return {
            str(lane.kind): use.busy_s
            for lane, use in self.measured.lanes.items()
            if lane.device == rank and use.busy_s
        }

    def bubble(self, rank: int) -> float:
        """Measured: of the job's time, what a rank computes nothing in."""
        return 1 - self.measured.busy_s(Lane(LaneKind.GPU, rank)) / self.seconds

    @property
    def slowest(self) -> int:
        """Measured: the rank with the lane that works longest."""
        return max(range(self.case.ranks), key=lambda rank: max(self.busy_s(rank).values()))

    def lines(self) -> Iterator[str]:
        """Where its time went, simulated / measured."""
        yield (
            f"{self.case.name}: {self.predicted.total_s:.2f} s simulated, {self.seconds:.2f} s measured; slowest rank "
            f"{self.predicted.slowest} / {self.slowest}"
        )
        for rank in range(self.case.ranks):
            expected = {str(lane): seconds for lane, seconds in self.predicted.of_rank(rank).busy_s().items()}
            own = self.busy_s(rank)
            lanes = ", ".join(f"{name} {expected.get(name, 0.0):.2f}/{own[name]:.2f}" for name in sorted(own))
            yield f"  rank {rank}: bubble {self.predicted.bubble(rank):.0%}/{self.bubble(rank):.0%}; busy s: {lanes}"

    def to_dict(self) -> dict[str, Any]:
        ranks = range(self.case.ranks)
        return {
            "case": self.case.name,
            "ranks": self.case.ranks,
            "predicted": {
                "prefill_s": self.predicted.times.prefill_s,
                "decode_s": self.predicted.times.decode_s,
                "slowest_rank": self.predicted.slowest,
                "bubble": [self.predicted.bubble(rank) for rank in ranks],
                "lane_busy_s": {str(lane): s for lane, s in self.predicted.times.busy_s().items()},
            },
            "achieved": self.measured.to_dict()
            | {"slowest_rank": self.slowest, "bubble": [self.bubble(rank) for rank in ranks]},
            "ratio": self.ratio,
        }


def main() -> int:
    opts = options(__doc__)
    job = QUICK_JOB if opts.quick else JOB
    weights = dummy_weights_of(ModelSpec(MODEL), opts)
    rates = ensure_calibrated(opts.cache, opts.threads, print)
    report = Report("pipeline_ranks", Evidence.EMULATED, opts)
    cases = [*_cases(weights, job)]
    report.settings = {
        "job": vars(job),
        "model": to_json(MODEL),
        "cases": {case.name: {"policy": to_json(case.policy), "hardware": to_json(case.hardware)} for case in cases},
    }
    by_case: list[list[Ran]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=opts.cache) as scratch:
        for case in cases:
            known = with_calibration(case.hardware, rates)
            simulated = rank_forecast(_plans(weights, case, job, known), in_one_machine(known, case.ranks))
            with _engine(weights, case, opts, Path(scratch)) as made:
                run(made, WARM_UP, VOCABULARY)
                measured = [run(made, job, VOCABULARY, seed=number) for number in range(opts.rounds)]
            by_case.append([Ran(case, simulated, one) for one in measured])
            print(*by_case[-1][-1].lines(), sep="\n", flush=True)
    rounds = [*zip(*by_case, strict=True)]
    assert all(ran.measured.tokens == alone.measured.tokens for alone, *others in rounds for ran in others)
    report.rounds = [{"cases": [ran.to_dict() for ran in one]} for one in rounds]
    report.bars = [*_bars(*by_case)]
    report.where_time_goes = [line for ran in rounds[-1] for line in ran.lines()]
    return report.finish()


def _cases(weights: PackedWeights, job: Shape) -> Iterator[Case]:
    """Four ranks, each with a wave of one micro-batch, and one rank that has these in one block, in the same memory."""
    together = Policy(BATCH, 1, GPU, GPU, GPU)
    memory = max(map(_gpu_bytes, _plans(weights, Case("", RANKS, together, 2**40, GB), job)))
    batches = job.prompts // BATCH
    for percent in range(100, -1, -1):
        kept = Placement(gpu=percent / 100, cpu=1 - percent / 100)
        alone = Case("1 rank", 1, Policy(BATCH, batches, kept, GPU, GPU), memory, GB)
        try:
            _plans(weights, alone, job)
        except DoesNotFit:
            continue
        yield alone
        break
    else:
        raise AssertionError(f"one rank has no room for its buffers in {memory} bytes")
    for name, network in NETWORKS.items():
        yield Case(f"{RANKS} ranks, {name}", RANKS, together, memory, network)


def _gpu_bytes(plan: MemoryPlan) -> int:
    return sum(sum(parts.values()) for site, parts in plan.bytes.items() if site.tier is Tier.GPU)


def _plans(
    weights: PackedWeights, case: Case, job: Shape, hardware: HardwareProfile | None = None
) -> tuple[MemoryPlan, ...]:
    """Of every rank. hardware: with rates, where times are wanted. DoesNotFit."""
    own = replace(hardware or case.hardware, count=1)
    machines = in_one_machine(replace(own, count=case.ranks), case.ranks)
    requests = [Request(job.prompt_len, job.gen_len)] * job.prompts
    plans = tuple(
        plan_job(weights.model, case.policy, machine.hardware, requests, stage=stage)
        for stage, machine in zip(even_stages(MODEL.num_layers, case.ranks), machines, strict=True)
    )
    for plan in plans:
        plan.check({})
    return plans


@contextmanager
def _engine(weights: PackedWeights, case: Case, opts: Options, scratch: Path) -> Iterator[Any]:
    """Over real processes, which have ended at the end."""
    folder = prepare_checkpoint(ModelSpec(MODEL), DType.BFLOAT16, opts.cache, lambda *_: None)
    division = divide(case.hardware, opts.threads)
    own = (division.hardware, division.threads)
    ranks = join(division, Setup(folder, DType.BFLOAT16, opts.cache, None, *own, scratch))
    try:
        made = Engines(weights, division.open_device(), scratch, ranks).make(case.policy)
        try:
            yield made
        finally:
            made.close()
    finally:
        if ranks is not None:
            ranks.close()


def _bars(alone: list[Ran], *others: list[Ran]) -> Iterator[Bar]:
    for same in (alone, *others):
        yield Bar(
            f"{same[0].case.name}: error of the simulation",
            f"{same[0].predicted.total_s:.2f} s",
            f"{median([ran.seconds for ran in same]):.2f} s",
            tuple(abs(ran.ratio - 1) for ran in same),
            AS_SIMULATED,
            at_most=True,
        )
    for same in others:
        speedups = tuple(one.seconds / four.seconds for one, four in zip(alone, same, strict=True))
        yield Bar(
            f"{same[0].case.name}: times as fast as 1 rank",
            f"{alone[0].predicted.total_s / same[0].predicted.total_s:.2f} simulated",
            f"{median(speedups):.2f}",
            speedups,
            FASTER,
            at_most=False,
        )


if __name__ == "__main__":
    sys.exit(main())

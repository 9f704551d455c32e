"""Engines for the benchmarks: dummy weights of a shape, machines to run on, and one job with its clock."""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Options

from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.config.build import model_spec
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.timeline import Timeline
from flexgen_bench.core.units import GB, GIB
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.executor import LaneUse
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.models.model import Model
from flexgen_bench.planner.forecast import Forecast, forecast
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.sequence_groups import Request

# Of a link that is not to be felt. Copies are made by a core, at some 10 GB/s.
UNTHROTTLED = 100 * GB

HOST = HardwareProfile("cpu", Accelerator.NONE)


def emulated(h2d: float = UNTHROTTLED, d2h: float = UNTHROTTLED) -> HardwareProfile:
    """An emulated accelerator with room for everything and links of these bytes/s."""
    return HardwareProfile("emulated", Accelerator.EMULATED, gpu_memory_bytes=12 * GIB, links={"h2d": h2d, "d2h": d2h})


def dummy_weights(options: Options, compression: Compression | None = None) -> PackedWeights:
    """The benchmark's model in bfloat16, made and packed at first use and kept in the cache."""
    return dummy_weights_of(model_spec(options.model), options, compression)


def dummy_weights_of(model: ModelSpec, options: Options, compression: Compression | None = None) -> PackedWeights:
    """The same of any model."""

    def show_progress(what: str, done: int, total: int) -> None:
        print(f"\r{what}: {done / GB:.2f} of {total / GB:.2f} GB", end="", flush=True)

    folder = prepare_checkpoint(model, DType.BFLOAT16, options.cache, show_progress)
    packing: Mapping[str, Any] = {"compression": compression} if compression else {}
    return PackedWeights.from_checkpoint(folder, DType.BFLOAT16, options.cache, **packing)


@contextmanager
def resident(shape: ModelShape, lossy: Lossy, sequences: int, options: Options) -> Iterator[tuple[Engine, int]]:
    """An engine without accelerator over dummy bfloat16 weights of a shape, and the bytes of weights that a pass reads.

    sequences: of a micro-batch.
    """
    folder = prepare_checkpoint(ModelSpec(shape), DType.BFLOAT16, options.cache, lambda *_: None)
    weights = PackedWeights.from_checkpoint(folder, DType.BFLOAT16, options.cache, compression=lossy.weights)
    cpu = Placement.all_on(Tier.CPU)
    policy = Policy(sequences, 1, cpu, cpu, cpu, lossy=lossy)
    units = weights.packed.units
    with engine(weights, policy, HOST, options) as made:
        yield made, sum(unit.num_bytes for unit in units if unit.kind is not UnitKind.EMBED)


@contextmanager
def engine(weights: PackedWeights, policy: Policy, hardware: HardwareProfile, options: Options) -> Iterator[Engine]:
    """An engine that is closed at the end; what it spills goes beside the cached weights, to the same disk."""
    options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.cache) as folder:
        made = weights.engine(policy, Device.open(hardware, options.threads), Path(folder))
        try:
            yield made
        finally:
            made.close()


@dataclass(frozen=True)
class Shape:
    """A job: how many prompts, of how many tokens, with how many tokens generated each."""

    prompts: int
    prompt_len: int
    gen_len: int


@dataclass(frozen=True)
class Measured:
    """One job. wall_s: all of it. pass_s: seconds of each decode pass of a job of one block (none for other jobs).
    prompts, tokens: of every sequence."""

    wall_s: float
    prefill_s: float
    decode_s: float
    pass_s: tuple[float, ...]
    lanes: Mapping[Lane, LaneUse]
    plan: MemoryPlan
    tokens: tuple[tuple[int, ...], ...]
    timeline: Timeline
    prompts: tuple[tuple[int, ...], ...] = ()

    def busy_s(self, lane: Lane) -> float:
        return self.lanes[lane].busy_s if lane in self.lanes else 0.0

    def bytes(self, link: Lane) -> int:
        """Over a link, by whichever lanes work on it."""
        return sum(use.bytes for lane, use in self.lanes.items() if lane.link is link)

    @property
    def busiest(self) -> Lane:
        return max(self.lanes, key=self.busy_s)

    def to_dict(self) -> dict[str, Any]:
        return {
            "wall_s": self.wall_s,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "pass_s": list(self.pass_s),
            "lanes": {
                str(lane): {"busy_s": use.busy_s, "bytes": use.bytes, "steps": use.steps}
                for lane, use in self.lanes.items()
                if use.steps
            },
        }


def predicted(weights: PackedWeights, policy: Policy, job: Shape, hardware: HardwareProfile, **how: Any) -> Forecast:
    """A job's times on a machine whose rates are known; ``how``: see ``planner.forecast``."""
    requests = [Request(job.prompt_len, job.gen_len)] * job.prompts
    model = Model(weights.shape, weights.dtype, weights.packed)
    return forecast(plan_job(model, policy, hardware, requests), **how)


def run(made: Engine, shape: Shape, vocab_size: int = 50_000, seed: int = 0) -> Measured:
    """Generate greedily, without early ends, from random prompts that are the same for the same ``seed``."""
    rng = random.Random(seed)
    params = SamplingParams(max_tokens=shape.gen_len, ignore_eos=True)
    prompts = [[rng.randrange(4, vocab_size) for _ in range(shape.prompt_len)] for _ in range(shape.prompts)]
    sequences = to_full_length(prompts, params)
    events: list[tuple[float, str, int]] = []
    start = time.perf_counter()
    result = made.generate(sequences, lambda phase, done, total: events.append((time.perf_counter(), phase, done)))
    wall = time.perf_counter() - start
    assert result.plan is not None
    return Measured(
        wall_s=wall,
        prefill_s=result.prefill_s,
        decode_s=result.decode_s,
        pass_s=_decode_passes(events, shape.prompts),
        lanes=result.lanes,
        plan=result.plan,
        tokens=tuple(tuple(s.new) for s in sequences),
        timeline=result.timeline,
        prompts=tuple(map(tuple, prompts)),
    )


def _decode_passes(events: Sequence[tuple[float, str, int]], sequences: int) -> tuple[float, ...]:
    """A pass over one block ends when it has told of all its sequences once more; the first one starts with the
    prefill's end."""
    ends = [max((t for t, phase, _ in events if phase == "prefill"), default=0.0)]
    due = sequences
    for moment, phase, done in events:
        if phase == "decode" and done >= due:
            ends.append(moment)
            due += sequences
    return tuple(later - earlier for earlier, later in itertools.pairwise(ends))


def lane_lines(measured: Measured, title: str) -> list[str]:
    """Where the time of a job went: each lane's busy seconds, bytes and rate, and what the busiest one waited."""
    lines = [f"{title}: {measured.wall_s:.2f} s"]
    for lane, use in sorted(measured.lanes.items(), key=lambda item: -item[1].busy_s):
        if not use.steps:
            continue
        moved = f", {use.bytes / GB:.2f} GB" if use.bytes else ""
        rate = f" at {use.bytes / use.busy_s / GB:.2f} GB/s" if use.bytes and use.busy_s else ""
        lines.append(f"  {lane.name:<11} busy {use.busy_s:6.2f} s ({use.busy_s / measured.wall_s:4.0%}){moved}{rate}")
    idle = measured.wall_s - measured.busy_s(measured.busiest)
    lines.append(f"  the busiest lane, {measured.busiest}, was idle for {idle:.2f} s")
    return lines

"""Machines with round rates for the tests of the planner, small models, and random jobs on both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.rates import Rates, SiteRates
from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.model import Model
from flexgen_bench.planner.forecast import Forecast, closed_form, forecast
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step
from tests.support.shapes import llama_shape, opt_shape

DTYPE = DType.FLOAT16
FOUR_BITS = Compression(4)
KIB, MIB = 2**10, 2**20


def site(flops: float = 1e12, memory: float = 1e11, step: float = 1e-6, unpack: float = 5e10) -> SiteRates:
    """Rates that do not depend on sizes. Compressed weights are multiplied with at half the rate, compressed caches
    attended at a tenth of memory instead of half of it."""
    return SiteRates(
        matrix={"float16": {64: {1: flops}}, "float16/4": {64: {1: flops / 2}}},
        memory=memory,
        prefill_attention={16: flops / 4},
        decode_attention={"float16": {1: memory / 2}, "float16/4": {1: memory / 10}},
        unpack=unpack,
        step=step,
    )


# Its host issues an operator in a tenth of a microsecond.
GPU_SITE = replace(site(flops=1e12, memory=1e11), operator=1e-7)
CPU_SITE = site(flops=1e11, memory=2e10)
LINK_RATES = {"disk_read": 1e9, "disk_write": 5e8, "h2d": 4e9, "d2h": 2e9}


def accelerator(
    gpu_memory: int = 2**40,
    cpu_memory: int = 2**40,
    disk: int = 2**45,
    gpu: SiteRates = GPU_SITE,
    cpu: SiteRates = CPU_SITE,
    kind: Accelerator = Accelerator.CUDA,
    **links: float,
) -> HardwareProfile:
    """A machine with an accelerator; ``links`` that differ from ``LINK_RATES``."""
    return HardwareProfile(
        f"test {kind}",
        kind,
        gpu_memory,
        cpu_memory,
        disk,
        links=LINK_RATES | links,
        rates=Rates({Tier.GPU: gpu, Tier.CPU: cpu}),
    )


def host(cpu_memory: int = 2**40, disk: int = 2**45, cpu: SiteRates = CPU_SITE, **links: float) -> HardwareProfile:
    """A machine without."""
    own = {lane: rate for lane, rate in LINK_RATES.items() if lane.startswith("disk")} | links
    return HardwareProfile(
        "test host", Accelerator.NONE, None, cpu_memory, disk, links=own, rates=Rates({Tier.CPU: cpu})
    )


HOST = host()
ACCELERATOR = accelerator()
# Copying reads and writes memory: a link of 2.5e9 bytes/s takes a quarter of 2e10.
EMULATED = accelerator(kind=Accelerator.EMULATED, gpu=CPU_SITE, h2d=2.5e9, d2h=2.5e9)


def small_opt(layers: int = 3, hidden: int = 64, vocab: int = 64) -> ModelShape:
    """Layers of 12 hidden^2 values in their matrices."""
    return opt_shape(
        num_layers=layers,
        hidden_size=hidden,
        embed_dim=hidden,
        num_heads=hidden // 16,
        num_kv_heads=hidden // 16,
        head_dim=16,
        ffn_size=4 * hidden,
        vocab_size=vocab,
        max_positions=2048,
    )


def small_llama(layers: int = 3, hidden: int = 64, vocab: int = 64) -> ModelShape:
    """Two query heads per KV head, and a head of its own."""
    return llama_shape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=hidden // 16,
        num_kv_heads=hidden // 32,
        head_dim=16,
        ffn_size=3 * hidden,
        vocab_size=vocab,
        max_positions=2048,
    )


def model_of(shape: ModelShape, lossy: Lossy = EXACT) -> Model:
    return Model.of(shape, DTYPE, lossy.weights)


@dataclass(frozen=True)
class PlannedJob:
    """A job on a machine, ready to be simulated."""

    shape: ModelShape
    policy: Policy
    hardware: HardwareProfile
    requests: tuple[Request, ...]

    @property
    def plan(self) -> MemoryPlan:
        return plan_job(model_of(self.shape, self.policy.lossy), self.policy, self.hardware, self.requests)

    def passes(self, plan: MemoryPlan) -> Iterator[list[Step]]:
        """Every step, pass by pass."""
        scheduler = Scheduler(self.policy, plan)
        while not scheduler.is_done:
            yield list(scheduler.steps(scheduler.schedule()))
            scheduler.postprocess()

    def forecast(self, points: int | None = None, keep: bool = False) -> Forecast:
        """Simulated; all passes unless ``points`` says otherwise."""
        return forecast(self.plan, points=points, keep=keep)

    def closed_form(self, points: int | None = None) -> Forecast:
        return closed_form(self.plan, points=points)


def a_job(
    policy: Policy,
    hardware: HardwareProfile = ACCELERATOR,
    shape: ModelShape | None = None,
    prompts: int = 8,
    prompt_len: int = 16,
    gen_len: int = 4,
) -> PlannedJob:
    """Like requests; by default all of a small OPT."""
    requests = (Request(prompt_len, gen_len),) * prompts
    return PlannedJob(small_opt() if shape is None else shape, policy, hardware, requests)


@st.composite
def placements(draw: st.DrawFn, tiers: tuple[Tier, ...]) -> Placement:
    shares = draw(st.tuples(*[st.integers(0, 3)] * len(tiers)).filter(any))
    return Placement(**{str(t): n / sum(shares) for t, n in zip(tiers, shares, strict=True)})


@st.composite
def policies(draw: st.DrawFn, tiers: tuple[Tier, ...]) -> Policy:
    bits = st.sampled_from([None, FOUR_BITS])
    attention = draw(st.sampled_from(AttentionSite))
    return Policy(
        gpu_batch_size=draw(st.integers(1, 4)),
        num_gpu_batches=draw(st.integers(1, 4)),
        weights=draw(placements(tiers)),
        kv_cache=draw(placements(tiers)),
        activations=draw(placements(tiers)),
        prefetch=draw(st.integers(1, 3)),
        overlap=draw(st.sampled_from([True, True, False])),
        attention=attention,
        kv_moved=draw(st.sampled_from([0.0, 0.3, 0.7])) if attention is AttentionSite.CPU else 0.0,
        schedule=draw(st.sampled_from(Schedule)),
        prefill_chunk=draw(st.sampled_from([None, None, 5])),
        offloaded=draw(st.sampled_from(Offloaded)),
        lossy=Lossy(draw(bits), draw(bits)),
    )


@st.composite
def jobs(draw: st.DrawFn, most_sequences: int = 6, longest: int = 5) -> PlannedJob:
    """Random small models under random policies, prompts of mixed lengths."""
    hardware = draw(st.sampled_from([HOST, ACCELERATOR, EMULATED]))
    make = draw(st.sampled_from([small_opt, small_llama]))
    shape = make(layers=draw(st.integers(1, 4)))
    lengths = st.tuples(st.integers(1, 40), st.integers(1, longest))
    drawn = draw(st.lists(lengths, min_size=1, max_size=most_sequences))
    requests = tuple(Request(*lens) for lens in drawn)
    return PlannedJob(shape, draw(policies(hardware.tiers)), hardware, requests)

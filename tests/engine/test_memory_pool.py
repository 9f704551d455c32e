"""Host memory of one job serves the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.engine.memory_pool import KeptMemory
from tests.engine.test_engine_tokens import Reference
from tests.engine.test_engine_tokens import reference as reference  # noqa: PLC0414  (a fixture)

CPU = HardwareProfile("cpu", Accelerator.NONE)
EMULATED = HardwareProfile("emulated", Accelerator.EMULATED, gpu_memory_bytes=2**30)


@pytest.mark.parametrize(("machine", "tier"), [(CPU, Tier.CPU), (EMULATED, Tier.GPU)])
def test_a_block_is_used_again_and_is_zero(machine: HardwareProfile, tier: Tier) -> None:
    """An emulated accelerator's memory was fresh in every job: its prompts' attention took 17 ms of a layer instead of
    5."""
    kept, device = KeptMemory(), Device.open(machine, 1)
    first = Arenas(device, kept)
    block = first.allocate(tier, "kv_cache", 10_000)
    block.fill_(255)
    first.end()
    again = Arenas(device, kept).allocate(tier, "kv_cache", 9_000)  # as many pages
    assert again.data_ptr() == block.data_ptr()
    assert not again.any()


def test_what_does_not_serve_is_released_first() -> None:
    kept, device = KeptMemory(), Device.open(CPU, 1)
    arenas = Arenas(device, kept)
    arenas.allocate(Tier.CPU, "a", 4096)
    arenas.allocate(Tier.CPU, "b", 8192)
    arenas.end()
    assert kept.take(12288) is None
    assert kept.take(4096) is None
    assert kept.take(8192) is None


@pytest.mark.parametrize("machine", [CPU, EMULATED])
def test_jobs_of_one_engine_have_their_own_tokens(
    reference: Reference, tmp_path: Path, machine: HardwareProfile
) -> None:
    """The second job gets the first one's memory, and other prompts."""
    at = Placement.all_on(machine.compute_tier)
    prompts = list(reference.prompts)
    params = SamplingParams(max_tokens=len(reference.tokens[0]), ignore_eos=True)
    engine = reference.weights.engine(Policy(4, 2, at, at, at), Device.open(machine, 1), tmp_path)
    try:
        for order in (list(range(len(prompts))), list(reversed(range(len(prompts))))):
            sequences = to_full_length([prompts[i] for i in order], params)
            engine.generate(sequences)
            assert [s.new for s in sequences] == [reference.tokens[i] for i in order]
    finally:
        engine.close()

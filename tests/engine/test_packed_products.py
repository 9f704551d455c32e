"""Passes of few rows use compressed weights as they lie, where the device has products for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexgen_bench.core.compression import Along, Compression, Lossy
from flexgen_bench.core.policy import Placement, Policy, Schedule
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.engine.weights import Weights
from flexgen_bench.kernels.fused_product import MOST_ROWS
from flexgen_bench.schedule.steps import Step
from tests.engine.test_compressed_weights import NEW_TOKENS, convert, fake_quantized
from tests.support.tiny_models import EMULATED, HOST, greedy_reference, random_model, random_prompts

FOUR = Compression(4, 16)
LENGTHS = (9, 12, 3, 5)
GPU = Placement.all_on(Tier.GPU)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("rows", [0, 2, MOST_ROWS])
def test_only_passes_of_many_rows_unpack(
    rows: int, schedule: Schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences decode at a time: with room for two rows only their prompts are computed from unpacked weights.
    Tokens are the same, of units that live there and of such that take turns in a slot."""
    passes: list[int] = []
    unpack = Weights.dequantize

    def noted(self: Weights, step: Step) -> None:
        passes.append(step.unit)
        unpack(self, step)

    monkeypatch.setattr(Weights, "dequantize", noted)
    monkeypatch.setattr(Device, "packed_rows", lambda *_: rows)
    prompts = random_prompts(LENGTHS)
    model = random_model("opt")
    expected = greedy_reference(fake_quantized(random_model("opt"), FOUR), prompts, NEW_TOKENS)
    packed = convert(model, tmp_path, FOUR)
    half = Placement(0.5, 0.25, 0.25)
    policy = Policy(2, 2, half, GPU, GPU, schedule=schedule, lossy=Lossy(weights=FOUR))
    engine = packed.engine(policy, Device.open(EMULATED, 1), tmp_path)
    try:
        sequences = to_full_length(prompts, SamplingParams(max_tokens=NEW_TOKENS))
        result = engine.generate(sequences)
    finally:
        engine.close()
    assert [s.new for s in sequences] == expected
    units = {unit.index for unit in result.plan.job.units if unit.unpack}
    if schedule is Schedule.BLOCK:  # one pass of prompts
        assert sorted(passes) == sorted([*units] * (1 if rows else NEW_TOKENS))
    elif rows == 0:
        assert set(passes) == units
    said = f"as they are in passes of up to {rows} rows" if rows else "unpacked in every pass"
    assert said in result.decode_path


def test_what_has_no_such_products_unpacks() -> None:
    for hardware in (HOST, EMULATED):
        assert Device.open(hardware, 1).packed_rows(FOUR, torch.float32) == 0
    cuda = Device(EMULATED, torch.device("cuda"), 1)
    assert cuda.packed_rows(Compression(4, 16, Along.OUTPUTS), torch.float16) == 0
    assert cuda.packed_rows(Compression(3), torch.float16) == 0

"""What a GPU gets (``Device.launches_kernels``) on the emulated accelerator: few operators per layer, and the tokens of
transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexgen_bench.core.errors import NotFinite
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.resident_cache import Attention
from tests.engine.test_engine_tokens import LENGTHS, Reference, on, reference_of, run, until
from tests.engine.test_engine_tokens import reference as reference  # noqa: PLC0414  (a fixture)
from tests.support.poisoned_layers import Projected, poison
from tests.support.tiny_models import EMULATED, HOST, random_prompts

GPU, CPU, HALF = on(Tier.GPU), on(Tier.CPU), Placement(gpu=0.5, cpu=0.5)
POLICIES = {
    "all resident": Policy(3, 2, GPU, GPU, GPU),
    "one at a time, all at once": Policy(1, 7, GPU, GPU, GPU),
    "cohorts that decode together": Policy(4, 2, GPU, GPU, GPU, schedule=Schedule.CONTINUOUS),
    "weights moved": Policy(2, 3, CPU, GPU, GPU),
    "activations moved": Policy(3, 2, HALF, GPU, HALF),
    "half of the cache moved": Policy(4, 2, GPU, HALF, GPU),
    "half of the cache attended by the cpu": Policy(4, 2, HALF, HALF, GPU, attention=AttentionSite.CPU),
    "half of the layers computed by the cpu": Policy(2, 4, HALF, GPU, GPU, offloaded=Offloaded.IN_PLACE),
    "prompts in chunks": Policy(3, 2, GPU, GPU, GPU, prefill_chunk=4),
}


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As for a GPU; how many runs of sequences each fused attention was given."""
    monkeypatch.setattr(Device, "launches_kernels", True)
    given: list[int] = []
    attend = Attention.__call__

    def counted(self: Attention, step, q, k, v):  # type: ignore[no-untyped-def]
        given.append(len(self._of[step.unit]))
        return attend(self, step, q, k, v)

    monkeypatch.setattr(Attention, "__call__", counted)
    return given


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_those_of_transformers(reference: Reference, name: str, lean: list[int], tmp_path: Path) -> None:
    assert run(reference, POLICIES[name], EMULATED, tmp_path)[0] == reference.tokens
    assert bool(lean) is (POLICIES[name].kv_cache == GPU)
    assert (max(lean, default=1) > 1) is (POLICIES[name].schedule is Schedule.CONTINUOUS)


@pytest.mark.parametrize("schedule", Schedule)
def test_sequences_that_have_ended_are_left_out(
    reference: Reference, schedule: Schedule, lean: list[int], tmp_path: Path
) -> None:
    """What is left of a micro-batch has gaps in its region, and is attended to run by run."""
    stop = {i: ids[1 + i % 4] for i, ids in enumerate(reference.tokens) if i % 2}
    expected = [until(ids, stop.get(i)) for i, ids in enumerate(reference.tokens)]
    policy = Policy(7, 1, GPU, GPU, GPU, schedule=schedule)
    assert run(reference, policy, EMULATED, tmp_path, stop=stop)[0] == expected
    assert max(lean) > 1


def test_prompts_of_one_length_need_no_mask(lean: list[int], tmp_path: Path) -> None:
    assert len(set(LENGTHS)) > 1, "the others do"
    alike = reference_of("llama-tied-grouped", random_prompts([9] * 5), tmp_path)
    assert run(alike, POLICIES["all resident"], EMULATED, tmp_path)[0] == alike.tokens


@pytest.mark.parametrize("issues", [False, True], ids=["carried out", "issued"])
@pytest.mark.parametrize("hardware", [HOST, EMULATED], ids=["host", "emulated"])
def test_what_is_not_finite_in_decode_names_its_layer(
    reference: Reference, hardware: HardwareProfile, issues: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in the prompts is. Resident layers are judged together, at the end of a pass, and the first of them is
    named."""
    monkeypatch.setattr(Device, "launches_kernels", issues)

    def spoil(made: Projected) -> None:
        made[2][0, 0, 0] = torch.inf

    poison(monkeypatch, lambda step: step.unit == 2 and step.token == 3, spoil)
    near = on(hardware.compute_tier)
    with pytest.raises(NotFinite, match="layer 1 has produced values"):
        run(reference, Policy(3, 2, near, near, near), hardware, tmp_path)

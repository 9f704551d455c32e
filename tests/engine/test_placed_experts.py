"""Experts placed apart from their layers: the same tokens wherever they lie, and no more bytes than they need."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, ExpertLoads, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.weights import Weights
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.steps import Step, StepKind
from tests.engine.test_engine_tokens import (
    GPU_MIXES,
    HOST_MIXES,
    LENGTHS,
    NEW_TOKENS,
    Reference,
    check_allocated_as_planned,
    on,
    random_policy,
    reference_of,
    run,
)
from tests.support.tiny_models import EMULATED, HOST, MODELS, greedy_reference, random_model, random_prompts, save


@pytest.fixture(scope="module", params=["glm4-moe", "qwen2-moe"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Experts behind a dense layer, in every second layer; with an MLP for all tokens, gated or not."""
    return reference_of(request.param, random_prompts(LENGTHS), tmp_path_factory.mktemp(request.param))


GPU, CPU, DISK = on(Tier.GPU), on(Tier.CPU), on(Tier.DISK)
TOUCHED, IN_PLACE = ExpertLoads.TOUCHED, Offloaded.IN_PLACE
POLICIES = {
    "streamed": Policy(2, 3, GPU, GPU, GPU, experts=CPU),
    "streamed from disk, one buffer": Policy(3, 2, GPU, CPU, CPU, prefetch=1, experts=DISK),
    "layers and experts streamed": Policy(2, 2, CPU, CPU, GPU, experts=Placement(0.4, 0.3, 0.3), prefill_chunk=5),
    "on the accelerator, layers streamed": Policy(2, 2, CPU, GPU, CPU, experts=GPU),
    "the cpu attends": Policy(1, 4, CPU, CPU, GPU, attention=AttentionSite.CPU, experts=CPU),
    "in several places": Policy(
        4, 2, CPU, Placement(0.3, 0.7), GPU, attention=AttentionSite.CPU, kv_moved=0.5, experts=CPU
    ),
    "continuous": Policy(2, 2, GPU, CPU, GPU, schedule=Schedule.CONTINUOUS, experts=Placement(cpu=0.5, disk=0.5)),
    "touched": Policy(1, 3, GPU, GPU, GPU, experts=CPU, expert_loads=TOUCHED),
    "touched, from disk": Policy(2, 2, CPU, CPU, CPU, experts=DISK, expert_loads=TOUCHED, prefill_chunk=3),
    "in place": Policy(2, 3, GPU, GPU, GPU, offloaded=IN_PLACE, experts=CPU),
    "in place, touched from disk, the cpu attends": Policy(
        1, 4, GPU, CPU, CPU, attention=AttentionSite.CPU, offloaded=IN_PLACE, experts=DISK, expert_loads=TOUCHED
    ),
    "layers in place, experts on the accelerator": Policy(2, 2, CPU, GPU, GPU, offloaded=IN_PLACE, experts=GPU),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_experts_of_their_own(reference: Reference, policy: Policy, tmp_path: Path) -> None:
    tokens, result = run(reference, policy, EMULATED, tmp_path)
    assert tokens == reference.tokens
    check_allocated_as_planned(result, EMULATED)


@pytest.mark.parametrize("seed", range(4))
def test_random_policies(reference: Reference, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"experts{reference.weights.shape.family}{seed}")
    hardware = rng.choice([HOST, EMULATED])
    mix = rng.choice(HOST_MIXES if hardware is HOST else GPU_MIXES)
    policy = replace(random_policy(rng, hardware), experts=mix, expert_loads=rng.choice(list(ExpertLoads)))
    tokens, result = run(reference, policy, hardware, tmp_path)
    assert tokens == reference.tokens, policy
    check_allocated_as_planned(result, hardware)


SPARSE: dict[str, Any] = {"num_local_experts": 16, "num_experts_per_tok": 1, "intermediate_size": 512}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A model of which a token touches 1 of 16 experts, so wide that pages are no matter."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("sparse")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, **SPARSE, vocab_size=131, max_position_embeddings=64, sliding_window=None)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15
    prompts = random_prompts([3, 2])
    weights = PackedWeights.from_checkpoint(save(model, folder / "ckpt"), DType.FLOAT32, folder / "cache")
    return Reference(weights, prompts, greedy_reference(model, prompts, NEW_TOKENS))


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK])
@pytest.mark.parametrize("batches", [1, 2])
def test_only_touched_experts_are_moved(
    sparse: Reference, tier: Tier, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that were moved are those of the experts that tokens were routed to, once per pass and layer, however
    many micro-batches touch them."""
    touched: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # by unit and token
    settled = Weights.settled

    def watched(self: Weights, step: Step, experts: list[int]) -> Step:
        if step.lane is Lane.H2D_WEIGHTS:
            touched[step.unit, step.token].update(experts)
        return settled(self, step, experts)

    monkeypatch.setattr(Weights, "settled", watched)
    policy = Policy(1, batches, GPU, GPU, GPU, experts=on(tier), expert_loads=TOUCHED)
    one = replace(sparse, prompts=sparse.prompts[:batches], tokens=sparse.tokens[:batches])
    tokens, result = run(one, policy, EMULATED, tmp_path)
    assert tokens == one.tokens
    expert_bytes = 4 * 3 * 64 * SPARSE["intermediate_size"]
    needed = sum(map(len, touched.values())) * expert_bytes
    assert len(touched) == 2 * NEW_TOKENS
    assert needed <= result.lanes[Lane.H2D_WEIGHTS].bytes <= 1.1 * needed
    if batches == 1:
        assert all(len(experts) == 1 for (_, token), experts in touched.items() if token)
    if tier is Tier.DISK:
        assert result.lanes[Lane.DISK_READ].bytes == result.lanes[Lane.H2D_WEIGHTS].bytes
    moved = [s for s in result.timeline.lanes[str(Lane.H2D_WEIGHTS)] if s.kind == StepKind.LOAD_EXPERTS]
    assert sum(s.bytes for s in moved) == result.lanes[Lane.H2D_WEIGHTS].bytes


def test_experts_are_streamed_once_for_all_micro_batches(sparse: Reference, tmp_path: Path) -> None:
    policy = Policy(1, 2, GPU, GPU, GPU, experts=CPU)
    tokens, result = run(sparse, policy, EMULATED, tmp_path)
    assert tokens == sparse.tokens
    assert result.plan is not None
    streamed = sum(u.load_bytes for u in result.plan.job.units if u.kind is UnitKind.EXPERTS)
    assert result.lanes[Lane.H2D_WEIGHTS].bytes == streamed * NEW_TOKENS


def test_what_is_moved_to_experts_in_place_is_what_was_planned(sparse: Reference, tmp_path: Path) -> None:
    """Hidden states and routing down, results up; weights stay."""
    policy = Policy(2, 1, GPU, GPU, GPU, offloaded=IN_PLACE, experts=CPU)
    tokens, result = run(sparse, policy, EMULATED, tmp_path)
    assert tokens == sparse.tokens
    rows = 2 * (sum(map(len, sparse.prompts)) + 2 * (NEW_TOKENS - 1))  # through two layers
    moved = [s for lane in result.timeline.lanes.values() for s in lane if s.kind in ("move_routed", "move_experts")]
    assert sum(s.bytes for s in moved) == rows * (64 * 4 + 12 + 64 * 4)
    assert result.lanes[Lane.H2D_WEIGHTS].bytes == 0


@pytest.mark.parametrize("loads", ExpertLoads)
def test_compressed_experts_stay_packed_on_the_link(
    loads: ExpertLoads, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """The same tokens as with experts in their layers, which an accelerator unpacks; a fraction of the bytes."""
    folder = tmp_path_factory.mktemp("four-bits")
    compression = Compression(4, 32)
    save(random_model("mixtral"), folder / "ckpt")
    weights = PackedWeights.from_checkpoint(folder / "ckpt", DType.FLOAT32, folder / "cache", compression=compression)
    whole = Policy(2, 2, CPU, GPU, GPU, lossy=Lossy(weights=compression))
    packed = Reference(weights, random_prompts([5, 9, 3]), [])
    expected = run(packed, whole, EMULATED, tmp_path)[0]
    apart = replace(whole, weights=GPU, experts=CPU, expert_loads=loads)
    tokens, result = run(packed, apart, EMULATED, tmp_path)
    assert tokens == expected
    check_allocated_as_planned(result, EMULATED)
    assert result.plan is not None
    blocks = [unit.experts for unit in weights.packed.units if unit.experts is not None]
    most = sum(one.count * one.num_bytes for one in blocks) * NEW_TOKENS
    assert 0 < result.lanes[Lane.H2D_WEIGHTS].bytes <= most


def test_scoring_is_the_same(sparse: Reference, tmp_path: Path) -> None:
    """Without a cache, with rows of logits for every token."""
    found = []
    for policy in (
        Policy(2, 1, CPU, GPU, GPU, prefill_chunk=4),
        Policy(2, 1, GPU, GPU, GPU, experts=CPU, expert_loads=TOUCHED, prefill_chunk=4),
    ):
        engine = sparse.weights.engine(policy, Device.open(EMULATED, 1), tmp_path)
        try:
            found.append(engine.log_probabilities([[5, 9, 7, 3], [8, 2]]))
        finally:
            engine.close()
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*found, strict=True))


def test_a_model_without_experts_has_none_to_place(tmp_path: Path) -> None:
    weights = PackedWeights.from_checkpoint(
        save(random_model(next(iter(MODELS))), tmp_path / "ckpt"), DType.FLOAT32, tmp_path / "cache"
    )
    with pytest.raises(UserError, match=r"policy\.experts.*has no experts"):
        run(Reference(weights, [[5]], []), Policy(1, 1, experts=CPU), EMULATED, tmp_path)
    with pytest.raises(UserError, match=r"policy\.expert_loads"):
        Policy(expert_loads=TOUCHED)

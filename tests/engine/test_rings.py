"""Layers with a window keep its tokens alone, and say what transformers says: generations that go round the ring
several times, prompts of any lengths beside each other, what is moved, and what is kept for a next turn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import NotFinite
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Policy, Schedule
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.engine.resident_cache import Attention
from flexgen_bench.kernels.native import build
from flexgen_bench.planner import memory_plan
from flexgen_bench.schedule import sequence_groups
from tests.engine.test_engine_tokens import Reference, check_allocated_as_planned, on, random_policy, run, until
from tests.engine.test_kept_prefix import CAPACITY, NEW, PLAIN, sequence
from tests.engine.test_kept_prefix import run as take
from tests.kernels.test_lossy_attention import fake_quantized_cache
from tests.kernels.test_packed_cache import fused as fused  # noqa: PLC0414  (a fixture)
from tests.support.poisoned_layers import Projected, poison
from tests.support.tiny_models import EMULATED, HOST, greedy_reference, random_model, random_prompts, save

LENGTHS, NEW_TOKENS = [3, 12, 12, 1, 7, 26], 24
FOUR_BITS = Compression(4, 8)


@pytest.fixture(scope="module", params=["gemma3", "phi3"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return longer(request.param, tmp_path_factory.mktemp(request.param))


def longer(name: str, folder: Path, lengths: Sequence[int] = LENGTHS) -> Reference:
    """Of a random model, with more new tokens than a window has."""
    model, prompts = random_model(name), random_prompts(lengths)
    weights = PackedWeights.from_checkpoint(save(model, folder / "ckpt"), DType.FLOAT32, folder / "cache")
    return Reference(weights, prompts, greedy_reference(model, prompts, NEW_TOKENS))


@pytest.mark.parametrize("seed", range(5))
def test_round_and_round(reference: Reference, seed: int, tmp_path: Path) -> None:
    """Any policy, while some sequences end early; what the plan counts is what is allocated."""
    draw = random.Random(f"{reference.weights.shape.family}{seed}")
    hardware = draw.choice([HOST, EMULATED, EMULATED])
    policy = random_policy(draw, hardware)
    stop = {i: t[draw.randrange(NEW_TOKENS)] for i, t in enumerate(reference.tokens) if draw.random() < 0.3}
    found, result = run(reference, policy, hardware, tmp_path, NEW_TOKENS, stop)
    assert found == [until(ids, stop.get(i)) for i, ids in enumerate(reference.tokens)], policy
    assert result.plan is not None
    assert result.plan.groups.rings
    check_allocated_as_planned(result, hardware)


@pytest.mark.parametrize("native", ["1", "0"], ids=["native", "torch"])
def test_prompts_of_all_lengths_in_one_micro_batch(
    reference: Reference, native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the longest has gone round the ring, the shortest has not filled it: resident, moved, and attended to where
    it lies."""
    monkeypatch.setenv(build.SWITCH, native)
    cpu = on(Tier.CPU)
    for policy, hardware in (
        (Policy(6, 1, cpu, cpu, cpu), HOST),
        (Policy(6, 1, cpu, cpu, cpu, prefill_chunk=18), EMULATED),
        (Policy(6, 1, cpu, cpu, cpu, attention=AttentionSite.CPU), EMULATED),
        (Policy(3, 2, cpu, cpu, cpu, attention=AttentionSite.CPU, kv_moved=0.5), EMULATED),
    ):
        assert run(reference, policy, hardware, tmp_path, NEW_TOKENS)[0] == reference.tokens


def test_a_compressed_ring(tmp_path: Path) -> None:
    """Groups lie along a head's values, so a token that is overwritten takes nobody else's scale with it."""
    folder = tmp_path / "model"
    reference = longer("gemma3", folder)
    expected = greedy_reference(
        random_model("gemma3"), reference.prompts, NEW_TOKENS, lambda: fake_quantized_cache(FOUR_BITS)
    )
    draw = random.Random(1)
    for hardware in (HOST, EMULATED, EMULATED):
        policy = random_policy(draw, hardware, Lossy(kv_cache=FOUR_BITS))
        assert run(reference, policy, hardware, tmp_path, NEW_TOKENS)[0] == expected, policy


@pytest.mark.parametrize("segment_bytes", [1, 3000])
def test_on_disk_segments_replace_each_other(
    reference: Reference, segment_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny caches are one segment on disk: here they are several, written over those that nobody sees any more."""
    monkeypatch.setattr(sequence_groups, "DISK_SEGMENT_BYTES", segment_bytes)
    disk, cpu = on(Tier.DISK), on(Tier.CPU)
    for policy, hardware in (
        (Policy(6, 1, cpu, disk, cpu), HOST),
        (Policy(3, 2, cpu, disk, cpu, prefill_chunk=9), EMULATED),
        (Policy(2, 2, cpu, disk, cpu, attention=AttentionSite.CPU, schedule=Schedule.CONTINUOUS), EMULATED),
    ):
        tokens, result = run(reference, policy, hardware, tmp_path, NEW_TOKENS)
        assert tokens == reference.tokens
        check_allocated_as_planned(result, hardware)


@pytest.mark.parametrize("native", ["1", "0"], ids=["native", "torch"])
def test_sparse_attention_uses_the_newest_token(native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is always used, wherever in the ring it is: the tokens are those of a cache that holds everything."""
    monkeypatch.setenv(build.SWITCH, native)
    reference = longer("mistral", tmp_path / "model")
    cpu, lossy = on(Tier.CPU), Lossy(value_share=0.4)
    found = []
    for windows in ((6,), ()):
        monkeypatch.setattr(memory_plan, "ring_windows", lambda decoder, windows=windows: set(windows))
        for policy, hardware in (
            (Policy(6, 1, cpu, cpu, cpu, lossy=lossy), HOST),
            (Policy(6, 1, cpu, cpu, cpu, lossy=lossy), EMULATED),
            (Policy(6, 1, cpu, on(Tier.DISK), cpu, lossy=lossy), HOST),
        ):
            stop = {0: reference.tokens[0][5]}
            tokens, result = run(reference, policy, hardware, tmp_path, NEW_TOKENS, stop)
            assert result.plan is not None
            assert result.plan.groups.rings == windows
            found.append(tokens)
    assert found.count(found[0]) == 6
    assert found[0] != reference.tokens


def test_a_link_carries_the_window_alone(tmp_path: Path) -> None:
    """Of Mistral every layer has one: a prompt of any length costs what the window holds."""
    reference = longer("mistral", tmp_path / "model")
    moved = []
    for length in (20, 40):
        same = Reference(reference.weights, random_prompts([length] * 2), [])
        policy = Policy(2, 1, on(Tier.GPU), on(Tier.CPU), on(Tier.GPU))
        _, result = run(same, policy, EMULATED, tmp_path, 9)
        assert result.plan is not None
        (ring,) = result.plan.groups.rings
        layout = result.plan.groups.start(0, result.plan.groups.kv_slots[0]).laid_out(ring)[0]
        assert layout.tokens == ring == 6
        assert result.lanes[Lane.H2D].bytes == 4 * 8 * layout.region_bytes
        moved.append(result.lanes[Lane.H2D].bytes)
    assert moved[0] == moved[1]


def test_what_has_left_the_window_is_computed_anew(reference: Reference, tmp_path: Path) -> None:
    """A kept sequence can be continued from its end, or from the token before it; further back, keys that the window
    wants have been overwritten, so that nothing of it is used."""
    engine = reference.weights.engine(PLAIN, Device.open(HOST, 1), tmp_path)
    prompt = random_prompts([30])[0]
    with engine.open(CAPACITY) as job:
        first = sequence(prompt, None)
        take(job, first)
        assert first.kept is not None
        held = (*prompt, *first.new[:-1])
        assert first.kept.tokens == held
        # Of a layer with a window, no more than that is kept.
        assert min(layer[0].shape[2] for layer in first.kept.layers) < 10
        turns = []
        for back in (0, 1, 2, 20):
            turn = sequence([*held[: len(held) - back], 7, 9, 11], first)
            request = job._request(turn)
            assert request.kept == (len(held) - back if back < 2 else 0)
            take(job, turn)
            turns.append(turn)
        # A short one has not gone round, so that it can be continued from anywhere.
        short = sequence(random_prompts([2])[0], None, 2)
        take(job, short)
        again = sequence([short.prompt[0], 9, 11], short)
        assert job._request(again).kept == 1
        take(job, again)
    for turn in (*turns, again):
        alone = to_full_length([turn.prompt], turn.params)
        engine.generate(alone)
        assert turn.new == alone[0].new
        assert len(turn.new) == NEW
    engine.close()


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("alike", [True, False], ids=["equally long", "of all lengths"])
def test_what_a_gpu_gets(schedule: Schedule, alike: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of a resident micro-batch need no mask and no window, so that torch's fused attention reads them: called
    for those that are equally long, but not where there are many lengths. Some sequences end early."""
    monkeypatch.setattr(Device, "launches_kernels", True)
    fused: list[int] = []
    attend = Attention._attend

    def counted(self, view, q, *rest):  # type: ignore[no-untyped-def]
        fused.append(len(q))
        return attend(self, view, q, *rest)

    monkeypatch.setattr(Attention, "_attend", counted)
    lengths = [9] * 6 if alike else LENGTHS
    reference = longer("gemma3", tmp_path / "model", lengths)
    stop = {i: ids[3 + 4 * i] for i, ids in enumerate(reference.tokens) if i % 2}
    expected = [until(ids, stop.get(i)) for i, ids in enumerate(reference.tokens)]
    policy = Policy(6, 1, *[on(Tier.GPU)] * 3, schedule=schedule)
    found, result = run(reference, policy, EMULATED, tmp_path, NEW_TOKENS, stop)
    assert found == expected
    assert fused
    assert (max(fused) == 6) is (alike and schedule is Schedule.BLOCK)
    check_allocated_as_planned(result, EMULATED)


def test_kernels_for_a_compressed_cache_read_rings(tmp_path: Path, fused: list[Compression]) -> None:
    """They append and attend in any slots."""
    reference = longer("gemma3", tmp_path / "model", [9] * 4)
    policy = Policy(4, 1, *[on(Tier.GPU)] * 3, lossy=Lossy(kv_cache=FOUR_BITS))
    found = run(reference, policy, EMULATED, tmp_path, NEW_TOKENS)[0]
    assert len(fused) == 4 * (NEW_TOKENS - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "launches_kernels", False)
        assert run(reference, policy, EMULATED, tmp_path, NEW_TOKENS)[0] == found


@pytest.mark.parametrize("layer_number", [1, 2])
def test_what_is_not_finite_names_its_layer(layer_number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are judged together at the end of a pass, those with windows and those without apart; the first of all is
    named, though all layers after it are not finite either."""

    def spoil(made: Projected) -> None:
        made[2][0, 0, 0] = torch.inf

    poison(monkeypatch, lambda step: step.unit == 1 + layer_number and step.token == 3, spoil)
    reference = longer("gemma3", tmp_path / "model")  # layers 0, 1 and 3 have a window
    with pytest.raises(NotFinite, match=f"layer {layer_number} has produced values"):
        run(reference, Policy(6, 1, *[on(Tier.CPU)] * 3), HOST, tmp_path)

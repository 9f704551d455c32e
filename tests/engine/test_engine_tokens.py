"""The engine says what transformers says: every family, tier mixture, batch shape, overlap on and off."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import flexgen_bench.engine.actions as actions_module
import flexgen_bench.engine.device as device_module
import flexgen_bench.engine.hidden as hidden_module
import flexgen_bench.engine.weights as weights_module
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Lane, Site, Tier
from flexgen_bench.engine.actions import Actions
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import Running, to_full_length
from flexgen_bench.engine.hidden import HiddenStates
from flexgen_bench.engine.job_run import JobResult
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from flexgen_bench.schedule.steps import Step
from tests.support.tiny_models import EMULATED, HOST, MODELS, greedy_reference, random_model, random_prompts, save

NEW_TOKENS = 9
LENGTHS = [1, 30, 2, 9, 9, 17, 5]  # very different, two alike


@dataclass(frozen=True)
class Reference:
    """A tiny model, packed, and its greedy tokens according to transformers."""

    weights: PackedWeights
    prompts: list[list[int]]
    tokens: list[list[int]]


@pytest.fixture(scope="module", params=sorted(MODELS))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp(request.param)
    return reference_of(request.param, random_prompts(LENGTHS), folder)


def reference_of(name: str, prompts: list[list[int]], folder: Path) -> Reference:
    """A random model, packed below ``folder``, with transformers' tokens for these prompts."""
    model = random_model(name)
    weights = PackedWeights.from_checkpoint(save(model, folder / "ckpt"), DType.FLOAT32, folder / "cache")
    return Reference(weights, prompts, greedy_reference(model, prompts, NEW_TOKENS))


def run(
    reference: Reference,
    policy: Policy,
    hardware: HardwareProfile,
    folder: Path,
    new_tokens: int = NEW_TOKENS,
    stop: dict[int, int] | None = None,
) -> tuple[list[list[int]], JobResult]:
    """Tokens of every prompt; ``stop`` gives some prompts an id that ends them."""
    engine = reference.weights.engine(policy, Device.open(hardware, 1), folder)
    params = SamplingParams(max_tokens=new_tokens)
    ends = {i: frozenset([token]) for i, token in (stop or {}).items()}
    sequences = [
        Running(prompt, params, Sampler(params, prompt, i), ends.get(i, frozenset()), lambda new: False)
        for i, prompt in enumerate(reference.prompts)
    ]
    try:
        result = engine.generate(sequences)
    finally:
        engine.close()
    return [s.new for s in sequences], result


def until(ids: list[int], stop: int | None) -> list[int]:
    """Up to and including the first ``stop``."""
    return ids if stop is None else ids[: ids.index(stop) + 1]


def on(tier: Tier) -> Placement:
    return Placement.all_on(tier)


HOST_MIXES = [on(Tier.CPU), on(Tier.DISK), Placement(cpu=0.5, disk=0.5)]
GPU_MIXES = [on(Tier.GPU), on(Tier.CPU), on(Tier.DISK), Placement(0.4, 0.3, 0.3), Placement(gpu=0.5, disk=0.5)]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("everything", HOST_MIXES, ids=["cpu", "disk", "mixed"])
def test_plain_host(reference: Reference, everything: Placement, overlap: bool, tmp_path: Path) -> None:
    policy = Policy(3, 2, everything, everything, everything, overlap=overlap)
    assert run(reference, policy, HOST, tmp_path)[0] == reference.tokens


@pytest.mark.parametrize("attention", AttentionSite)
@pytest.mark.parametrize("everything", GPU_MIXES, ids=["gpu", "cpu", "disk", "thirds", "gpu+disk"])
def test_accelerator(reference: Reference, everything: Placement, attention: AttentionSite, tmp_path: Path) -> None:
    policy = Policy(2, 3, everything, everything, everything, attention=attention)
    assert run(reference, policy, EMULATED, tmp_path)[0] == reference.tokens


ONCE_WRONG = {
    "chunks of one prompt gathered their keys in different staging buffers": Policy(
        3, 2, on(Tier.CPU), on(Tier.DISK), on(Tier.CPU), prefill_chunk=8
    ),
    "parts of a micro-batch shared staging memory under two names": Policy(
        7, 2, Placement(0.4, 0.3, 0.3), Placement(0.4, 0.3, 0.3), Placement(cpu=0.5, disk=0.5), prefill_chunk=1
    ),
    "pages read for the cpu and pages on their way to the accelerator were the same, under two names": Policy(
        2,
        3,
        Placement(gpu=0.5, disk=0.5),
        on(Tier.CPU),
        on(Tier.DISK),
        prefill_chunk=3,
        prefetch=1,
        offloaded=Offloaded.IN_PLACE,
    ),
    "a layer on the cpu replaced the residual of another micro-batch on the accelerator": Policy(
        1, 4, Placement(gpu=0.5, cpu=0.5), on(Tier.CPU), on(Tier.GPU), offloaded=Offloaded.IN_PLACE
    ),
}


@pytest.mark.parametrize("policy", ONCE_WRONG.values(), ids=list(ONCE_WRONG))
def test_policies_that_once_gave_wrong_tokens(reference: Reference, policy: Policy, tmp_path: Path) -> None:
    """What a step touches and does not name goes wrong only when the lanes run far apart: hence several times."""
    for _ in range(3):
        assert run(reference, policy, EMULATED, tmp_path)[0] == reference.tokens


def random_policy(rng: random.Random, hardware: HardwareProfile, lossy: Lossy = EXACT) -> Policy:
    """Any mixture of placements, odd batch shapes, any prefetch depth, schedule and chunking."""
    mixes = HOST_MIXES if hardware is HOST else GPU_MIXES
    return Policy(
        gpu_batch_size=rng.choice([1, 2, 3, 7, 20]),
        num_gpu_batches=rng.choice([1, 2, 3]),
        weights=rng.choice(mixes),
        kv_cache=rng.choice(mixes),
        activations=rng.choice(mixes),
        prefetch=rng.choice([1, 2, 3, 9]),
        overlap=rng.choice([True, False]),
        attention=rng.choice(list(AttentionSite)),
        schedule=rng.choice(list(Schedule)),
        prefill_chunk=rng.choice([None, None, 1, 3, 8, 20]),
        offloaded=rng.choice(list(Offloaded)),
        lossy=lossy,
    )


@pytest.mark.one_in(3)
@pytest.mark.parametrize("seed", range(14))
def test_random_policies(reference: Reference, seed: int, tmp_path: Path) -> None:
    """Weights, cache and activations placed independently, odd batch shapes, any prefetch depth, schedule and chunking;
    some sequences end early. What the plan counts is what is allocated, on every tier and by name."""
    rng = random.Random(f"{reference.weights.shape.family}{seed}")
    hardware = rng.choice([HOST, EMULATED])
    policy = random_policy(rng, hardware)
    stop = {i: ids[rng.randrange(9)] for i, ids in enumerate(reference.tokens) if rng.random() < 0.3}
    found, result = run(reference, policy, hardware, tmp_path, stop=stop)
    assert found == [until(ids, stop.get(i)) for i, ids in enumerate(reference.tokens)], policy
    check_allocated_as_planned(result, hardware)


def check_allocated_as_planned(result: JobResult, hardware: HardwareProfile) -> None:
    assert result.plan is not None
    planned = {site: dict(parts) for site, parts in result.plan.bytes.items()}
    planned[Site(hardware.compute_tier)].pop("workspace")  # torch's own allocator, within this bound
    planned[Site.CPU].pop("attention workspace", None)
    planned[Site.CPU].pop("expert workspace", None)
    for name in ("weights", "experts"):  # the packed store itself
        planned[Site.DISK].pop(name, None)
    planned[Site(hardware.compute_tier)].pop("kept prefixes", None)  # with whoever keeps them
    allocated = {site: {k: n for k, n in p.items() if n} for site, p in result.allocated.items()}
    assert allocated == {site: parts for site, parts in planned.items() if parts}


@pytest.mark.parametrize("hardware", [HOST, EMULATED], ids=["host", "emulated"])
def test_one_new_token_needs_no_cache(reference: Reference, hardware: HardwareProfile, tmp_path: Path) -> None:
    policy = Policy(2, 2, on(Tier.DISK), on(Tier.DISK), on(Tier.DISK), prefetch=1)
    tokens, result = run(reference, policy, hardware, tmp_path, new_tokens=1)
    assert tokens == [ids[:1] for ids in reference.tokens]
    assert result.plan is not None
    assert not any("kv" in part for parts in result.plan.bytes.values() for part in parts)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kv", [on(Tier.GPU), on(Tier.CPU), on(Tier.DISK), Placement(0.4, 0.3, 0.3)])
@pytest.mark.parametrize("attention", AttentionSite)
def test_sequences_that_stop_early_leave_and_the_others_go_on(
    reference: Reference, kv: Placement, attention: AttentionSite, tmp_path: Path
) -> None:
    """Whole micro-batches leave at different passes, in several blocks; stages move to the ones that stay."""
    stop = {i: ids[i % 5] for i, ids in enumerate(reference.tokens) if i != 3}
    expected = [until(ids, stop.get(i)) for i, ids in enumerate(reference.tokens)]
    policy = Policy(1, 4, on(Tier.DISK), kv, kv, prefetch=3, attention=attention)
    assert run(reference, policy, EMULATED, tmp_path, stop=stop)[0] == expected


def test_links_carry_what_the_placement_says(reference: Reference, tmp_path: Path) -> None:
    """Streamed weights cross the link once per pass and block, whatever the number of micro-batches."""
    policy = Policy(2, 2, on(Tier.CPU), on(Tier.GPU), on(Tier.GPU), prefetch=2)
    _, result = run(reference, policy, EMULATED, tmp_path)
    units = reference.weights.packed.units
    streamed = sum(unit.num_bytes for unit in units)
    blocks = -(-len(LENGTHS) // policy.block_size)
    assert result.lanes[Lane.H2D_WEIGHTS].bytes == streamed * NEW_TOKENS * blocks
    embedded = sum(LENGTHS) + sum(
        min(policy.block_size, len(LENGTHS) - b * policy.block_size) * (NEW_TOKENS - 1) for b in range(blocks)
    )
    tables = sum(t.tensor.spec.shape[1] for t in reference.weights.packed.tables)
    assert result.lanes[Lane.H2D].bytes == embedded * tables * 4
    assert result.lanes[Lane.DISK_READ].bytes == 0


def test_loads_are_copied_in_chunks(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any size, whether or not a unit or a piece of the head is a multiple of it."""
    monkeypatch.setattr(weights_module, "CHUNK", 1000)
    policy = Policy(2, 2, Placement(cpu=0.5, disk=0.5), on(Tier.GPU), on(Tier.GPU))
    assert run(reference, policy, EMULATED, tmp_path)[0] == reference.tokens


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("chunk", [None, 4])
def test_sampled_tokens_depend_on_the_seed_alone(
    reference: Reference, schedule: Schedule, chunk: int | None, tmp_path: Path
) -> None:
    """Whatever the placement, batch shape, schedule and chunking."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.8, top_p=0.9, seed=5)
    found = []
    for policy, hardware in (
        (Policy(7, 1), HOST),
        (
            Policy(
                2,
                3,
                *[Placement(0.4, 0.3, 0.3)] * 3,
                attention=AttentionSite.CPU,
                schedule=schedule,
                prefill_chunk=chunk,
                offloaded=Offloaded.IN_PLACE,
            ),
            EMULATED,
        ),
    ):
        engine = reference.weights.engine(policy, Device.open(hardware, 1), tmp_path)
        sequences = to_full_length(reference.prompts, params)
        engine.generate(sequences)
        engine.close()
        found.append([s.new for s in sequences])
    assert found[0] == found[1]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("chunk", [None, 1, 5, 64])
@pytest.mark.parametrize("schedule", Schedule)
def test_scores_do_not_depend_on_chunks(
    reference: Reference, chunk: int | None, schedule: Schedule, tmp_path: Path
) -> None:
    """A scored continuation that spans chunks has the log-likelihoods it has in one piece."""
    requests = [
        ScoreRequest([*prompt, *ids], len(prompt))
        for prompt, ids in zip(reference.prompts, reference.tokens, strict=True)
    ]
    requests.append(ScoreRequest(reference.prompts[1], 1))
    found = []
    for policy, hardware in (
        (Policy(8, 1), HOST),
        (Policy(3, 2, *[on(Tier.DISK)] * 3, prefill_chunk=chunk, schedule=schedule), EMULATED),
    ):
        engine = reference.weights.engine(policy, Device.open(hardware, 1), tmp_path)
        scores: dict[int, list[tuple[float, bool]]] = {}
        engine.score(requests, scores.__setitem__)
        engine.close()
        found.append(scores)
    for i, request in enumerate(requests):
        assert len(found[0][i]) == len(request.tokens) - request.start
        for (p, greedy), (q, other) in zip(found[0][i], found[1][i], strict=True):
            assert p == pytest.approx(q, abs=1e-4)
            assert greedy == other


def test_realised_shares_follow_requested_ones(reference: Reference, tmp_path: Path) -> None:
    placement = Placement(cpu=0.5, disk=0.5)
    _, result = run(reference, Policy(1, 7, on(Tier.CPU), placement, placement), HOST, tmp_path)
    assert result.plan is not None
    assert abs(result.plan.realised_kv_cache["disk"] - 0.5) < 0.25
    assert result.plan.realised_weights == {"gpu": 0.0, "cpu": 1.0, "disk": 0.0}


def test_a_resident_micro_batch_does_not_disturb_a_spilled_one(tmp_path: Path) -> None:
    """Two micro-batches share a stage; one keeps its hidden states on the compute tier and claims no staging buffer.
    It used to overwrite what the other one still had to write to disk."""
    folder = tmp_path / "model"
    model = random_model("opt-350m-like")
    prompts = random_prompts([4] * 6)
    weights = PackedWeights.from_checkpoint(save(model, folder), DType.FLOAT32, tmp_path / "cache")
    reference = Reference(weights, prompts, greedy_reference(model, prompts, NEW_TOKENS))
    policy = Policy(1, 6, on(Tier.GPU), on(Tier.GPU), Placement(gpu=0.5, disk=0.5))
    for _ in range(3):
        assert run(reference, policy, EMULATED, tmp_path)[0] == reference.tokens


def test_rows_that_stay_on_the_accelerator_do_not_keep_the_others(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of the hidden states on the accelerator takes that share: it used to be a view, and kept all rows of
    every micro-batch there, whatever the plan had counted."""
    put = HiddenStates.put

    def put_and_look(self: HiddenStates, step: Step, x: torch.Tensor) -> None:
        put(self, step, x)
        if any(part.tier is not Tier.GPU for part in step.micro_batch.hidden_parts):
            for part in step.micro_batch.hidden_parts:
                rows = self._rows.get((part.group.kv_slot, step.micro_batch.chunk, part.home))
                assert rows is None or rows.untyped_storage().nbytes() == rows.nbytes

    monkeypatch.setattr(HiddenStates, "put", put_and_look)
    policy = Policy(7, 1, on(Tier.GPU), on(Tier.GPU), Placement(gpu=0.4, cpu=0.3, disk=0.3))
    assert run(reference, policy, EMULATED, tmp_path)[0] == reference.tokens


@pytest.mark.parametrize("hidden", [on(Tier.GPU), Placement(0.4, 0.3, 0.3)], ids=["gpu", "thirds"])
def test_what_a_link_brings_up_is_marked_as_used_by_the_stream_that_reads_it(
    reference: Reference, hidden: Placement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA reuses freed memory in the order of the stream that allocated it. Hidden states that a layer on the cpu had
    sent back were read without the mark: the next copy over the link could overwrite them. Which stream: by its lane's
    thread."""
    brought: list[torch.Tensor] = []
    marked: set[int] = set()
    to_compute = Device.to_compute

    def bring(self: Device, tensor: torch.Tensor) -> torch.Tensor:
        found = to_compute(self, tensor)
        if threading.current_thread().name == f"lane-{Lane.H2D}":
            brought.append(found)  # kept, so that no two have the same address
        return found

    def mark(tensor: torch.Tensor) -> torch.Tensor:
        if threading.current_thread().name != f"lane-{Lane.H2D}":
            marked.add(tensor.untyped_storage().data_ptr())
        return tensor

    monkeypatch.setattr(Device, "to_compute", bring)
    for module in (device_module, hidden_module, actions_module):
        monkeypatch.setattr(module, "crossing", mark)
    policy = Policy(
        2,
        3,
        Placement(gpu=0.5, cpu=0.5),
        on(Tier.CPU),
        hidden,
        attention=AttentionSite.CPU,
        offloaded=Offloaded.IN_PLACE,
    )
    assert run(reference, policy, EMULATED, tmp_path)[0] == reference.tokens
    assert brought
    assert {tensor.untyped_storage().data_ptr() for tensor in brought} <= marked


def test_nothing_of_a_micro_batch_stays_behind(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathered rows, attention outputs and logits are gone when they have been used: kept until the next micro-batch of
    their stage, those of a prompt doubled what the accelerator held, which no plan had counted."""
    close, seen = Actions.close, []

    def look_and_close(self: Actions) -> None:
        seen.append(
            [
                dict(held)
                for held in (
                    self._embedding._rows,
                    self._embedding._gpu_rows,
                    self._x,
                    self._qkv_host,
                    self._attended,
                    self._attended_host,
                    self._next._found,
                    self._next._found_host,
                    self._hidden._staged,
                    self._hidden._host,
                )
            ]
        )
        close(self)

    monkeypatch.setattr(Actions, "close", look_and_close)
    policy = Policy(2, 3, *[Placement(0.4, 0.3, 0.3)] * 3, attention=AttentionSite.CPU)
    assert run(reference, policy, EMULATED, tmp_path)[0] == reference.tokens
    assert seen == [[{}] * 10]

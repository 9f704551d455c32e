"""Ranks that share every layer say what one rank says: every family, tier mixture, batch shape and schedule."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_bench.core.compression import Along, Compression, Lossy, Scales
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Policy, Schedule
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.local_wire import local_wires
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from flexgen_bench.schedule.sequence_groups import Capacity, Request
from tests.engine.test_engine_tokens import check_allocated_as_planned, random_policy, until
from tests.support.rank_engines import Rank
from tests.support.sliced_models import MODELS, on_slices, slices_of
from tests.support.tiny_models import EMULATED, HOST, greedy_reference, random_prompts, save, with_random_weights

NEW_TOKENS = 6
LENGTHS = [1, 19, 2, 9, 9, 17]
PROMPTS = random_prompts(LENGTHS)
LINKED = replace(EMULATED, links={**EMULATED.links, "net_out": 2e9, "net_in": 2e9})


class Shared:
    """A tiny random model, its slices, and its greedy tokens according to transformers."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.name, self._folder = name, folder
        model = with_random_weights(MODELS[name](), name)
        self.checkpoint = save(model, folder / "ckpt")
        self.tokens = greedy_reference(model, PROMPTS, NEW_TOKENS)
        self._slices: dict[tuple[Any, ...], list[PackedWeights]] = {}

    def slices(self, ranks: int, compression: Compression | None = None) -> list[PackedWeights]:
        key = ranks, compression
        if key not in self._slices:
            self._slices[key] = slices_of(self.checkpoint, ranks, self._folder / "cache", compression)
        return self._slices[key]


@pytest.fixture(scope="module", params=MODELS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared("opt", tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared("llama", tmp_path_factory.mktemp("llama"))


def sequences(stop: dict[int, int] | None = None, params: SamplingParams | None = None) -> list[Running]:
    params = params or SamplingParams(max_tokens=NEW_TOKENS)
    ends = {i: frozenset([token]) for i, token in (stop or {}).items()}
    return [
        Running(prompt, params, Sampler(params, prompt, i), ends.get(i, frozenset()), lambda new: False)
        for i, prompt in enumerate(PROMPTS)
    ]


def run(
    weights: list[PackedWeights],
    policy: Policy,
    hardware: HardwareProfile,
    folder: Path,
    stop: dict[int, int] | None = None,
) -> list[Rank]:
    ranks = on_slices(weights, policy, hardware, folder, lambda: sequences(stop))
    for rank in ranks:
        check_allocated_as_planned(rank.result, hardware)
    return ranks


@pytest.mark.one_in(4)
def test_every_family(shared: Shared, tmp_path: Path) -> None:
    """Two ranks on an accelerator whose layers stream, with prompts in chunks; some sequences end early."""
    rng = random.Random(shared.name)
    policy = random_policy(rng, EMULATED)
    stop = {1: shared.tokens[1][2], 4: shared.tokens[4][0]}
    for rank in run(shared.slices(2), policy, LINKED, tmp_path, stop):
        assert rank.tokens == [until(ids, stop.get(i)) for i, ids in enumerate(shared.tokens)], policy


@pytest.mark.parametrize("seed", range(3))
def test_random_policies(llama: Shared, opt: Shared, seed: int, tmp_path: Path) -> None:
    """Every tier, both schedules, chunks, compressed or not; four ranks, or two."""
    rng = random.Random(seed)
    model, hardware = rng.choice([opt, llama]), rng.choice([HOST, LINKED])
    policy = replace(random_policy(rng, hardware), schedule=rng.choice(list(Schedule)))
    for rank in run(model.slices(rng.choice([2, 4])), policy, hardware, tmp_path):
        assert rank.tokens == model.tokens, policy


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Whose rows and columns are whole groups of 8 on two ranks."""
    return Shared("llama-even", tmp_path_factory.mktemp("even"))


@pytest.mark.parametrize(
    ("compression", "hardware"),
    [
        (Compression(4, 8), HOST),
        (Compression(8, 8, scales=Scales.MSE), LINKED),
        (Compression(4, 8, Along.OUTPUTS), LINKED),
    ],
    ids=["4-bit", "8-bit", "along outputs"],
)
def test_compressed_weights_are_those_of_one_rank(
    even: Shared, compression: Compression, hardware: HardwareProfile, tmp_path: Path
) -> None:
    """Quantized slice by slice, they are the same numbers: the tokens are those of one rank with the same weights."""
    whole = PackedWeights.from_checkpoint(even.checkpoint, DType.FLOAT32, tmp_path / "cache", compression=compression)
    policy = random_policy(random.Random(str(compression)), hardware, Lossy(weights=compression))
    expected = alone(whole, policy, hardware, tmp_path, sequences)
    for rank in run(even.slices(2, compression), policy, hardware, tmp_path):
        assert rank.tokens == expected, policy


def test_what_is_lossy_in_the_cache_is_each_heads_own(llama: Shared, tmp_path: Path) -> None:
    policy = Policy(3, 2, lossy=Lossy(kv_cache=Compression(4, 8), value_share=0.5))
    whole = PackedWeights.from_checkpoint(llama.checkpoint, DType.FLOAT32, tmp_path / "cache")
    expected = alone(whole, policy, HOST, tmp_path, sequences)
    assert expected != llama.tokens
    for rank in run(llama.slices(4), policy, HOST, tmp_path):
        assert rank.tokens == expected


def test_every_rank_draws_the_same_tokens(llama: Shared, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, seed=3)
    whole = PackedWeights.from_checkpoint(llama.checkpoint, DType.FLOAT32, tmp_path / "cache")
    drawn = alone(whole, Policy(3, 2), HOST, tmp_path, lambda: sequences(params=params))
    assert drawn != llama.tokens
    for rank in on_slices(llama.slices(2), Policy(3, 2), HOST, tmp_path, lambda: sequences(params=params)):
        assert rank.tokens == drawn


def test_sums_have_the_same_bits_on_every_rank_and_a_failure_ends_all() -> None:
    """In bfloat16, where the order of three numbers matters."""
    wires = local_wires(3)
    torch.manual_seed(0)
    parts = [torch.randn(4, 64).to(torch.bfloat16) for _ in wires]
    sums = [part.clone() for part in parts]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda wire, rows: wire.all_reduce(0, rows), wires, sums))
        assert all(torch.equal(one, sums[0]) for one in sums)
        torch.testing.assert_close(sums[0].float(), sum(part.float() for part in parts), rtol=0.02, atol=0.03)
        waiting = [pool.submit(wire.all_reduce, 1, torch.zeros(1, 1)) for wire in wires[:2]]
        wires[2].abort(ValueError("out of order"))
        for each in waiting:
            with pytest.raises(RuntimeError, match="rank 2 has failed: ValueError: out of order"):
                each.result(60)


def test_what_ranks_that_share_layers_do_not_do_is_named(opt: Shared, tmp_path: Path) -> None:
    engine = opt.slices(2)[0].engine(Policy(1, 1), Device.open(HOST, 1), tmp_path, wire=local_wires(2)[0])
    try:
        with pytest.raises(UserError, match=r"gpu\.tensor_parallel = 2: must be 1 for scoring"):
            engine.score([ScoreRequest((1, 2, 3), 1)], lambda *found: None)
        with pytest.raises(UserError, match=r"gpu\.tensor_parallel = 2: must be 1 for a job that takes requests"):
            engine.open(Capacity(1, 4, 4))
    finally:
        engine.close()
    with pytest.raises(ValueError, match="several ranks need a wire"):
        opt.slices(2)[0].engine(Policy(1, 1), Device.open(HOST, 1), tmp_path)


def test_a_policy_is_chosen_for_a_slice(llama: Shared, tmp_path: Path) -> None:
    """Of memory that has room for the slice of one rank, and not for the whole model."""
    whole = PackedWeights.from_checkpoint(llama.checkpoint, DType.FLOAT32, tmp_path / "cache")
    layers = [sum(u.home_bytes for u in one.packed.units[1:-1]) for one in (whole, llama.slices(4)[0])]
    assert layers[1] < 0.6 * layers[0]  # extents are whole pages
    chosen = llama.slices(4)[0].choose_policy(Device.open(HOST, 1), tmp_path, [Request(9, 6)] * 4)
    assert chosen.weights.cpu == 1
    for rank in run(llama.slices(4), chosen, HOST, tmp_path):
        assert rank.tokens == llama.tokens


def alone(
    weights: PackedWeights, policy: Policy, hardware: HardwareProfile, folder: Path, asked: Callable[[], list[Running]]
) -> list[list[int]]:
    """Tokens of one rank that has everything."""
    engine, running = weights.engine(policy, Device.open(hardware, 1), folder), asked()
    try:
        engine.generate(running)
    finally:
        engine.close()
    return [sequence.new for sequence in running]

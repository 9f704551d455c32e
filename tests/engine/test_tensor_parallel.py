"""Ranks that share every layer say what one rank says: every family, tier mixture, batch shape and schedule."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Policy, Schedule
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.slices import Slice
from flexgen_bench.core.tiers import Lane, LaneKind
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.local_wire import local_wires
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.schedule.steps import StepKind
from tests.engine.test_engine_tokens import check_allocated_as_planned, on, random_policy, until
from tests.support.sliced_models import MODELS, Rank, on_slices, slices_of
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


def test_every_family(shared: Shared, tmp_path: Path) -> None:
    """Two ranks on an accelerator whose layers stream, with prompts in chunks; some sequences end early."""
    rng = random.Random(shared.name)
    policy = random_policy(rng, EMULATED)
    stop = {1: shared.tokens[1][2], 4: shared.tokens[4][0]}
    for rank in run(shared.slices(2), policy, LINKED, tmp_path, stop):
        assert rank.tokens == [until(ids, stop.get(i)) for i, ids in enumerate(shared.tokens)], policy


@pytest.mark.parametrize("seed", range(6))
def test_random_policies(llama: Shared, opt: Shared, seed: int, tmp_path: Path) -> None:
    """Every tier, both schedules, chunks, compressed or not; four ranks, or two."""
    rng = random.Random(seed)
    model, hardware = rng.choice([opt, llama]), rng.choice([HOST, LINKED])
    policy = replace(random_policy(rng, hardware), schedule=rng.choice(list(Schedule)))
    for rank in run(model.slices(rng.choice([2, 4])), policy, hardware, tmp_path):
        assert rank.tokens == model.tokens, policy

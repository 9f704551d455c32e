"""What the engine scores is what it would decode: under every mode, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_bench.accuracy.run.modes import list_modes, load_mode
from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.outputs import Score
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from tests.support.forced_decoding import Forced
from tests.support.tiny_models import HOST, random_model, random_prompts, save

SMALL = Compression(4, 16)
MODES = {
    "exact": EXACT,
    "compressed weights": Lossy(weights=SMALL),
    "compressed cache": Lossy(kv_cache=SMALL),
    "few values": Lossy(value_share=0.2),
    "all of it": Lossy(weights=SMALL, kv_cache=SMALL, value_share=0.2),
}


def requests() -> list[ScoreRequest]:
    """Continuations of 1 to 7 tokens, some of which share what comes before them."""
    found = []
    for i, tokens in enumerate(random_prompts([30, 21, 12, 40, 9, 3])):
        start = max(1, len(tokens) - 1 - i)
        found.append(ScoreRequest(tokens, start))
        found.append(ScoreRequest([*tokens[:-1], 7], start))
    return found


@pytest.mark.parametrize("family", ["opt", "llama-tied-grouped"])
@pytest.mark.parametrize("lossy", MODES.values(), ids=MODES)
def test_scores_are_those_of_decoding(family: str, lossy: Lossy, tmp_path: Path) -> None:
    weights = PackedWeights.from_checkpoint(
        save(random_model(family), tmp_path / "ckpt"), DType.FLOAT32, tmp_path / "cache", compression=lossy.weights
    )
    policy = Policy(
        gpu_batch_size=5,
        num_gpu_batches=2,
        weights=Placement(cpu=1.0),
        kv_cache=Placement(cpu=1.0),
        activations=Placement(cpu=1.0),
        lossy=lossy,
    )
    asked = requests()
    scored: dict[int, Score] = {}
    engine = weights.engine(policy, Device.open(HOST, 1), tmp_path)
    try:
        engine.score(asked, scored.__setitem__)
        forced = Forced(asked)
        engine._run(engine.plan(forced.jobs()), forced)
    finally:
        engine.close()
    for i, request in enumerate(asked):
        decoded = [p for p, _ in forced.results[i]]
        found = scored[i]
        found_tokens = [p for p, _ in found] if isinstance(found, list) else found.token_logprobs
        assert len(decoded) == len(request.tokens) - request.start
        assert list(found_tokens) == pytest.approx(decoded, abs=2e-4), (i, request.start)


def test_modes_that_change_something_are_all_named() -> None:
    """Two names for one setting would be two rows of the same numbers."""
    modes = [load_mode(name) for name in list_modes()]
    settings = [(mode.lossy, mode.dtype, mode.weight_format) for mode in modes]
    assert len(set(settings)) == len(settings)
    assert all(mode.title for mode in modes)

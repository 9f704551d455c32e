"""Ranks as processes that share every layer: the tokens of one, sums over gloo, and who may not share."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexgen_bench import LLM, Placement, Policy, SamplingParams
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.errors import RankLost, UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.slices import Slice
from flexgen_bench.engine.device import Device
from flexgen_bench.ranks import gloo_wire
from flexgen_bench.ranks.division import divide
from flexgen_bench.schedule.sequence_groups import Request
from tests.ranks.test_gloo_wire import failing, wires
from tests.support import planner_machines
from tests.support.sliced_models import MODELS, slices_of
from tests.support.tiny_models import EMULATED, HOST, greedy_reference, random_prompts, save, with_random_weights
from tests.support.tiny_text_models import save_tokenizer

PROMPTS = random_prompts([1, 19, 2, 9, 9, 17])
NEW_TOKENS = 8
FULL = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


def test_two_processes_give_the_tokens_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_random_weights(MODELS["llama"](), "llama")
    expected = greedy_reference(model, PROMPTS, NEW_TOKENS)
    folder = save(model, tmp_path / "model")
    save_tokenizer(folder)
    thirds = Placement(0.4, 0.3, 0.3)
    policy, gpu = Policy(2, 3, thirds, thirds, thirds), replace(EMULATED, tensor_parallel=2)
    with LLM(folder, gpu=gpu, dtype="float32", threads=2, cache_dir=tmp_path / "cache", policy=policy) as two:
        assert [list(output.token_ids) for output in two.generate(PROMPTS, FULL)] == expected
        assert two.last_job is not None
        lanes = {str(lane): use for lane, use in two.last_job.lanes.items()}
        assert lanes["net_out"].bytes == lanes["net_out:1"].bytes > 0
        with pytest.raises(UserError, match=r"must be 1 for"):
            two.score(["a"], ["b"])


def test_a_policy_for_a_mixture_is_the_plain_rules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The search places experts apart, which ranks that share layers refuse: it always failed, with a warning."""
    folder = save(with_random_weights(MODELS["mixtral"](), "mixtral"), tmp_path / "model")
    first = slices_of(folder, 2, tmp_path / "cache")[0]
    device = Device.open(planner_machines.HOST, 1)
    with caplog.at_level(logging.WARNING):
        policy = first.choose_policy(device, tmp_path, [Request(4, 4)] * 3)
    assert policy.experts is None
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_over_gloo_have_the_same_bits_on_every_rank(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    of_ranks = wires(3)
    parts = [torch.randn(5, 33).to(dtype) for _ in of_ranks]
    sums = [part.clone() for part in parts]
    with ThreadPoolExecutor(3) as pool:
        for number in range(3):
            list(pool.map(lambda wire, rows: wire.all_reduce(number, rows), of_ranks, sums))  # noqa: B023
            assert all(torch.equal(one, sums[0]) for one in sums)
    expected = 9 * sum(part.float() for part in parts)
    torch.testing.assert_close(sums[0].float(), expected, rtol=0.02, atol=0.2)


def test_an_abort_ends_the_wait_for_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo_wire, "_NEWS_S", 0.2)
    first, second, _ = wires(3)  # the third never comes
    waiting = [failing(lambda: one.all_reduce(0, torch.zeros(2, 2))) for one in (first, second)]  # noqa: B023
    threading.Event().wait(0.2)
    reason = RankLost(2, "killed")
    for one in (first, second):
        one.abort(reason)
    for thread, raised in waiting:
        thread.join(30)
        assert not thread.is_alive()
        assert isinstance(raised[0], RankLost)
    with pytest.raises(RankLost, match="rank 2 is lost: killed"):
        first.all_reduce(1, torch.zeros(1, 1))


def test_ranks_that_share_layers_divide_a_machine_like_others() -> None:
    machine = replace(EMULATED, tensor_parallel=2, cpu_memory_bytes=2**30)
    part = divide(machine, 4)
    assert (part.ranks, part.threads, part.part) == (2, 2, Slice(0, 2))
    assert (part.hardware.cpu_memory_bytes, part.hardware.tensor_parallel) == (2**29, 1)
    assert part.stages(3) == (None, None)
    assert divide(HOST, 4, ranks=2).part is None
    with pytest.raises(UserError, match=r"ranks = 4: must be 2, as gpu\.tensor_parallel says"):
        divide(machine, 4, ranks=4)


def test_ranks_share_layers_or_have_their_own() -> None:
    for changes in ({"count": 2}, {"layers_per_rank": (1, 2)}):
        with pytest.raises(UserError, match=r"gpu\.tensor_parallel = 2: must be 1 with gpu\.count"):
            replace(HOST, tensor_parallel=2, **changes)
    with pytest.raises(UserError, match=r"gpu\.tensor_parallel"):
        replace(HOST, tensor_parallel=0)


def test_a_machine_without_ranks_is_written_as_it_always_was() -> None:
    assert "tensor_parallel" not in to_json(HOST)
    shared = replace(HOST, tensor_parallel=4)
    assert from_json(HardwareProfile, to_json(shared), "gpu") == shared

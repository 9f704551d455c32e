"""What ``policy=auto`` comes to: what the search found, or the heuristic's policy where that is nearly as fast."""

from __future__ import annotations

import pytest

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import EXACT
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.policy import Policy
from flexgen_bench.planner import auto_policy as module
from flexgen_bench.planner.auto_policy import LEAST_GAIN, auto_choice, auto_policy
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.planner.engine_predictor import EnginePredictor
from flexgen_bench.planner.search import Search
from flexgen_bench.planner.search_space import SearchSpace
from tests.planner.test_search import MACHINES, job_on, space_of
from tests.support.planner_machines import DTYPE, host, site
from tests.support.shapes import opt_shape

NEARLY = MACHINES["emulated"]  # the rule's policy is 9 % slower there
PROMPTS = 8


def heuristic(hardware: HardwareProfile) -> Policy:
    return default_policy(space_of(hardware, PROMPTS))


def chosen(hardware: HardwareProfile) -> Policy:
    return auto_policy(space_of(hardware, PROMPTS))


def test_what_is_clearly_faster_is_run() -> None:
    auto = auto_choice(space_of(MACHINES["host"]))
    assert auto.gain is None
    assert auto.choice.policy == chosen(MACHINES["host"]) != heuristic(MACHINES["host"])
    why = EnginePredictor({}, {}).predict(job_on(MACHINES["host"], 8)).settings["why"]
    assert not any("rule" in line for line in why)


def test_what_is_little_faster_is_not() -> None:
    """Everybody who asks gets the rule's policy, with its own figures and the reason."""
    of = space_of(NEARLY)
    search = Search(of)
    found = search.run()
    gain = search.tok_per_s(found.policy) / search.tok_per_s(heuristic(NEARLY)) - 1
    assert 0 < gain < LEAST_GAIN - 1
    auto = auto_choice(of)
    assert auto.choice.policy == chosen(NEARLY) == heuristic(NEARLY) != found.policy
    assert auto.gain == pytest.approx(gain)
    assert auto.choice.tok_per_s == pytest.approx(found.tok_per_s / (1 + gain), rel=0.02)
    told = EnginePredictor({}, {}).predict(job_on(NEARLY, 8))
    assert told.settings["policy"] == to_json(heuristic(NEARLY))
    assert told.tok_per_s == pytest.approx(auto.choice.tok_per_s)
    [line] = [line for line in told.settings["why"] if "plain rule" in line]
    assert f"promises {gain:.1%} more" in line
    assert "less than 10%" in line


def test_the_search_finds_no_less_than_the_rule() -> None:
    """OPT-1.3B in 2.25 GiB of memory: the linear programs keep room for staging what the rule's policy holds, no single
    change led from theirs to it, and what the search found was predicted 25 % slower."""
    shape = opt_shape(
        num_layers=24,
        hidden_size=2048,
        embed_dim=2048,
        num_heads=32,
        num_kv_heads=32,
        head_dim=64,
        ffn_size=8192,
        vocab_size=50272,
        max_positions=2048,
    )
    capped = host(int(2.25 * 2**30), cpu=site(2e11, 2e10), disk_read=2e9, disk_write=2e9)
    search = Search(SearchSpace(Job(shape, DTYPE, capped, 32, 32, 32), (EXACT,)))
    found = search.run()
    assert found.heuristic is not None
    assert search.tok_per_s(found.policy) >= search.tok_per_s(found.heuristic) > 0


def test_how_much_is_clearly_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_GAIN", 1.0)
    assert chosen(NEARLY) != heuristic(NEARLY)


def test_a_rule_that_keeps_no_bound_is_not_preferred() -> None:
    """It knows nothing of latencies; neither does it where nothing keeps one."""
    plain = auto_choice(space_of(NEARLY)).choice
    latency = 0.9 * plain.forecast.total_s * plain.policy.block_size / PROMPTS
    bound = auto_choice(space_of(NEARLY, max_latency_s=latency)).choice
    assert bound.policy != heuristic(NEARLY)
    with pytest.raises(UserError, match="max_latency_s"):
        auto_choice(space_of(NEARLY, max_latency_s=1e-9))

"""What ``batch --plan`` says of several ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flexgen_bench.batch import plan
from flexgen_bench.core.pipeline import even_stages
from flexgen_bench.core.policy import Policy
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.schedule.sequence_groups import Request
from tests.support.planner_machines import HOST, model_of, small_opt


def test_a_plan_of_several_ranks_is_each_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gave rank 0's memory as the job's, and for the time it blamed a machine that was not calibrated."""

    class OfTwo:
        def plan(self, requests: list[Request]) -> MemoryPlan:
            return plan_job(model_of(small_opt(4)), Policy(2, 1), HOST, requests, stage=even_stages(4, 2)[0])

    asked = SimpleNamespace(max_tokens=3)
    sampled = [SimpleNamespace(prompts=[[1, 2]], sequences=[SimpleNamespace(params=asked)])] * 4
    monkeypatch.setattr(plan, "_sample", lambda *_: sampled)
    others: Any = SimpleNamespace(lines=4, window=8)
    llm: Any = OfTwo()
    said = plan.plan_text(llm, others, iter(()), others, others)
    assert "memory of each of 2 ranks: cpu " in said
    assert "it is not predicted for 2 ranks" in said
    assert "calibrate" not in said

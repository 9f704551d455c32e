"""A policy in the words of a table."""

from __future__ import annotations

from dataclasses import replace

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.policy import AttentionSite, Placement, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.report.settings_text import policy_text

GPU, CPU = Placement.all_on(Tier.GPU), Placement.all_on(Tier.CPU)


def test_attention_is_told_of_a_cache_below_the_gpu() -> None:
    """Policies that keep all of it there were printed with "attention on the cpu"."""
    policy = Policy(8, 2, CPU, CPU, GPU, attention=AttentionSite.CPU, kv_moved=0.25)
    assert policy_text(to_json(policy)).endswith("attention on the cpu, 25 % of the cache there moved; prefetch 2")
    some = replace(policy, kv_cache=Placement(gpu=0.5, cpu=0.5), kv_moved=0.0)
    assert "attention on the cpu" in policy_text(to_json(some))
    assert "attention" not in policy_text(to_json(replace(some, kv_cache=GPU)))
    assert "attention on the cpu" in policy_text({"gpu_batch_size": 1, "num_gpu_batches": 1, "attention": "cpu"})

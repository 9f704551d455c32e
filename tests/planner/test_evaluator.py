"""What a search compares: policies that come to the same are one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.evaluator import Evaluator
from flexgen_bench.planner.forecast import forecast
from flexgen_bench.planner.neighbours import neighbours
from flexgen_bench.planner.search import Search
from tests.planner.test_search import machine, space_of

GPU, CPU = Placement.all_on(Tier.GPU), Placement.all_on(Tier.CPU)
ROOMY = space_of(machine(64))
RESIDENT = Policy(4, 2, GPU, GPU, GPU)
STREAMED = Policy(4, 2, CPU, CPU, CPU, attention=AttentionSite.CPU, kv_moved=0.5)
# Of 4 layers and 8 sequences.
SAME = {
    "attention of a cache on the gpu": (RESIDENT, replace(RESIDENT, attention=AttentionSite.CPU)),
    "layers in place of which none is away": (RESIDENT, replace(RESIDENT, offloaded=Offloaded.IN_PLACE)),
    "a buffer for weights that stay": (RESIDENT, replace(RESIDENT, prefetch=1)),
    "a chunk as long as the prompts": (RESIDENT, replace(RESIDENT, prefill_chunk=4 * 32)),
    "a share of less than a layer": (STREAMED, replace(STREAMED, weights=Placement(gpu=0.01, cpu=0.99))),
    "a moved share of less than a sequence": (STREAMED, replace(STREAMED, kv_moved=0.51)),
}
OTHER = {
    "attention": replace(STREAMED, attention=AttentionSite.COMPUTE, kv_moved=0.0),
    "a moved share": replace(STREAMED, kv_moved=0.25),
    "a layer": replace(STREAMED, weights=Placement(gpu=0.25, cpu=0.75)),
    "a sequence": replace(STREAMED, kv_cache=Placement(gpu=0.125, cpu=0.875)),
    "hidden states": replace(STREAMED, activations=GPU),
    "another buffer": replace(STREAMED, prefetch=3),
    "a chunk": replace(STREAMED, prefill_chunk=64),
    "a micro-batch": replace(STREAMED, gpu_batch_size=2, num_gpu_batches=4),
    "overlap": replace(STREAMED, overlap=False),
}


@pytest.mark.parametrize("what", SAME)
def test_what_comes_to_the_same_is_simulated_once(what: str) -> None:
    """A search spent its steps on changes that change nothing: a fourth buffer for weights that stay where they are."""
    evaluator = Evaluator(ROOMY)
    one, other = SAME[what]
    speed, steps = evaluator.tok_per_s(one), evaluator.steps
    assert speed == evaluator.tok_per_s(other) > 0
    assert (evaluator.steps, evaluator.tried) == (steps, 1)
    assert forecast(ROOMY.plan(one)).total_s == forecast(ROOMY.plan(other)).total_s


@pytest.mark.parametrize("what", OTHER)
def test_what_does_not_is_simulated_by_itself(what: str) -> None:
    evaluator = Evaluator(ROOMY)
    for policy in (STREAMED, OTHER[what]):
        assert evaluator.fits(policy)
    assert evaluator.tried == 2


def test_a_step_leaves_no_rounding_behind() -> None:
    """What is left of a share that steps of 0.05 have used up made a policy one that uses the disk."""
    policy = replace(RESIDENT, kv_cache=Placement(gpu=0.95 - 1e-12, disk=0.05 + 1e-12))
    left = [one.kv_cache.disk for one in neighbours(ROOMY, policy)]
    assert 0.0 in left
    assert not any(0 < share < 1e-9 for share in left)


def test_no_way_of_working_is_told_that_is_the_one_chosen() -> None:
    """A model that lay on the card altogether was said to be "as good within 0.5%: attention on the processor"."""
    found = Search(ROOMY).run()
    assert found.policy.weights == found.policy.kv_cache == GPU
    if found.other is not None:
        evaluator = Evaluator(ROOMY)
        assert [evaluator.tok_per_s(one) for one in (found.policy, found.other.policy)]
        assert evaluator.tried == 2

"""A policy that fits, by a rule, for machines whose rates nobody has measured: load weights as rarely as possible.

If everything fits on the compute tier, it goes there. Otherwise streamed weight bytes per sequence are
(weights - resident) / block, so memory goes first to a block as large as the job, then to resident weights, and only
what does not fit goes a tier down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.search_space import SearchSpace

LARGEST_MICRO_BATCH = 32  # more sequences no longer make matrix products faster, but take workspace
# Up to this many sequences a layer's weights are read faster by the processor than moved and then read by an
# accelerator.
IN_PLACE_SEQUENCES = 4
SHARE_STEPS = 20  # weights are tried in steps of 5 %


def default_policy(space: SearchSpace) -> Policy:
    """The first of ``_candidates`` that fits. Raises the DoesNotFit of the most modest one if none does.

    Blocks are as large as the job, which has a number of prompts, or as ``space.block_size``; results are changed in
    the first of the ways there are.
    """
    hardware, most, lossy = space.job.hardware, space.largest_block, space.lossies[0]
    assert most is not None, "a job of open length has no block to aim at"
    model = space.models[lossy]

    def failing(candidate: Policy) -> DoesNotFit | None:
        try:
            space.plan_of(model, replace(candidate, lossy=lossy), most * space.ranks).check(space.available)
        except DoesNotFit as error:
            return error
        return None

    refusal: DoesNotFit | None = None
    for alike in _candidates(hardware, most):
        policy, refusal = _first_that_fits(alike, failing)
        if policy is not None:
            return replace(policy, lossy=lossy)
    assert refusal is not None
    raise refusal


def _first_that_fits(
    alike: Sequence[Policy], failing: Callable[[Policy], DoesNotFit | None]
) -> tuple[Policy | None, DoesNotFit | None]:
    """Of policies with ever more of the weights one tier lower; or the last one's refusal.

    The tier that is relieved refuses the first of them, up to one that is found by halving. What refuses that one,
    another tier, refuses all that follow. The first is looked at by itself: only if nothing is streamed is there no
    staging.
    """
    refusal = failing(alike[0])
    if refusal is None:
        return alike[0], None
    low, high = 1, len(alike)
    while low < high:
        middle = (low + high) // 2
        refused = failing(alike[middle])
        if refused is not None and refused.tier == refusal.tier:
            low = middle + 1
        else:
            high = middle
    if low < len(alike) and failing(alike[low]) is None:
        return alike[low], None
    return None, failing(alike[-1])


def _candidates(hardware: HardwareProfile, sequences: int) -> Iterator[list[Policy]]:
    """Best first, in lists that differ in nothing but how much of the weights is on the upper of two tiers. Nothing is
    streamed if everything fits beside one micro-batch: then larger blocks would only take memory. Otherwise large
    blocks before small ones, caches high before low, weights high before low.

    A cache below an accelerator is attended by the cpu: reading it there is faster than moving it first, on every host
    considered. For the same reason a few sequences have the layers that are not on the accelerator computed where they
    lie.
    """
    compute, below = (hardware.compute_tier, hardware.tiers[hardware.tiers.index(hardware.compute_tier) + 1])
    here = Placement.all_on(compute)
    yield [Policy(min(sequences, LARGEST_MICRO_BATCH), 1, here, here, here)]
    homes = [(compute, compute), (below, compute), (below, below)]
    if Tier.DISK is not below:
        homes.append((Tier.DISK, below))
    for block in _halvings(sequences):
        micro_batch = min(block, LARGEST_MICRO_BATCH)
        in_place = compute is Tier.GPU and block <= IN_PLACE_SEQUENCES
        for kv, hidden in homes:
            for placements in _weight_placements(hardware):
                yield [
                    Policy(
                        gpu_batch_size=micro_batch,
                        num_gpu_batches=-(-block // micro_batch),
                        weights=weights,
                        kv_cache=Placement.all_on(kv),
                        activations=Placement.all_on(hidden),
                        attention=AttentionSite.COMPUTE if kv is compute else AttentionSite.CPU,
                        offloaded=Offloaded.IN_PLACE if in_place else Offloaded.MOVE,
                    )
                    for weights in placements
                ]


def _halvings(count: int) -> Iterator[int]:
    while count > 1:
        yield count
        count = -(-count // 2)
    yield 1


def _weight_placements(hardware: HardwareProfile) -> Iterator[list[Placement]]:
    """From everything on the fastest tier to everything on disk: a list for every two neighbouring tiers."""
    for upper, lower in zip(hardware.tiers, hardware.tiers[1:], strict=False):
        shares = [step / SHARE_STEPS for step in range(SHARE_STEPS, 0, -1)]
        if lower is Tier.DISK:
            shares.append(0.0)
        yield [Placement(**{str(upper): share, str(lower): 1 - share}) for share in shares]

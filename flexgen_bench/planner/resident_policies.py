"""Policies that keep everything on the accelerator, with as many sequences as there is room for.

Linear programs miss them: weights that nearly fill the memory leave room for some odd number of sequences, and only for
prompts that are computed in small chunks, neither of which is among the shapes that are tried. An accelerator reads its
memory some fifty times faster than a link brings anything, so a few sequences may beat any number of streamed ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.search_space import SearchSpace

SMALLEST_CHUNK = 256  # prompt tokens: fewer, and products no longer run at an accelerator's speed
LARGEST_CHUNK = 16384
LARGEST_BLOCK, LARGEST_MICRO_BATCH = 1024, 128
_PARTS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64)  # of a prompt, computed one after the other


def resident_policies(space: SearchSpace) -> Iterator[Policy]:
    """Of every way of changing results, the largest block that fits, its prompts in as few equal chunks as fit."""
    if space.job.hardware.compute_tier is not Tier.GPU:
        return
    most = min(space.largest_block or LARGEST_BLOCK, LARGEST_BLOCK)
    for lossy in space.lossies:
        block = _largest_block(space, lossy, most)
        if not block:
            continue
        if space.largest_block is not None:
            blocks = -(-space.largest_block // block)
            block = -(-space.largest_block // blocks)  # a job's blocks should be equally full
        policies = (_resident(block, chunk, lossy) for chunk in _chunks(space, _micro_batch(block)))
        policy = next((one for one in policies if _fits(space, one)), None)
        if policy is not None:
            yield policy


def _resident(block: int, chunk: int | None, lossy: Lossy) -> Policy:
    here, size = Placement.all_on(Tier.GPU), _micro_batch(block)
    return Policy(size, -(-block // size), here, here, here, prefill_chunk=chunk, lossy=lossy)


def _micro_batch(block: int) -> int:
    """Of equal micro-batches of a block, as large as they may be."""
    return -(-block // -(-block // LARGEST_MICRO_BATCH))


def _chunks(space: SearchSpace, size: int) -> list[int | None]:
    """Equal ones of a micro-batch's prompts, largest first, and at last the smallest there may be."""
    prompt = space.job.prompt_len
    lengths = dict.fromkeys(-(-prompt // parts) for parts in _PARTS)
    chunks = [size * length for length in lengths if SMALLEST_CHUNK <= size * length <= LARGEST_CHUNK]
    whole = [None if chunk == size * prompt else chunk for chunk in chunks]
    return [*whole, *([] if whole else [SMALLEST_CHUNK])]


def _largest_block(space: SearchSpace, lossy: Lossy, most: int) -> int:
    """0: not even one sequence has room."""

    def fits(block: int) -> bool:
        return block <= most and _fits(space, _resident(block, _chunks(space, _micro_batch(block))[-1], lossy))

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(space: SearchSpace, policy: Policy) -> bool:
    try:
        space.plan(policy)
    except DoesNotFit:
        return False
    return True

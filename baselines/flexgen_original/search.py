"""Settings for a job that the authors published none for: the best of a small search, as its users would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from baselines.common.machine import largest_that_fits
from baselines.flexgen_original import memory, settings
from baselines.flexgen_original.block import Block
from baselines.flexgen_original.outcome import Outcome, outcome
from baselines.flexgen_original.settings import Settings
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.job import Job
from flexgen_bench.core.tiers import Tier

# What is published was chosen for a T4's 16 GB; it says nothing about other cards.
_PUBLISHED_GPU_BYTES = (15e9, 17.2e9)
_PUBLISHED_GEN_LEN = 32
# Models whose compressed run compresses the KV cache and leaves the weights as they are.
_CACHE_ALONE = ("opt-30b",)
# Weights on gpu and on cpu, in percent.
_WEIGHTS = ((100, 0), (50, 50), (20, 80), (0, 100), (0, 75), (0, 50), (0, 25), (0, 0))
# The authors' own search takes fewer than 20 GPU batches of a multiple of 4 sequences (paper, section 4.3); and batches
# of 1 and 2.
_GPU_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
_NUM_GPU_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 19)


# Where settings come from.
PUBLISHED = "settings: as published for this job"
GIVEN = "settings: as asked for"
LARGER = "settings: as published for this job, in the largest batches that fit"
SEARCHED = "settings: the best of a search, as nothing is published for exactly this job"


def published(job: Job) -> Settings | None:
    """What the authors published for exactly this: model, lengths, compression and number of GPUs, on a card like
    theirs."""
    memory_bytes = job.hardware.gpu_memory_bytes
    least, most = _PUBLISHED_GPU_BYTES
    if memory_bytes is None or not least <= memory_bytes <= most:
        return None
    if job.gen_len != _PUBLISHED_GEN_LEN:
        return None
    tables = {(512, 1): settings.PUBLISHED, (1024, 1): settings.PUBLISHED_1024, (512, 4): settings.PUBLISHED_4_GPUS}
    name, lossy = job.shape.name, job.lossy
    compressed = lossy.kv_cache is not None
    if (lossy.weights is not None) != (compressed and name not in _CACHE_ALONE):
        return None
    return tables.get((job.prompt_len, job.num_gpus), {}).get((name, compressed))


def choose(block: Block, job: Job, options: Mapping[str, Any]) -> tuple[Outcome, str]:
    """What was published if it fits, else the settings of the largest throughput; ``options`` that are not None hold
    anyway. With a word on where the settings come from.

    block: for any settings. Raises DoesNotFit if nothing fits.
    """
    known = published(job)
    given = {k: v for k, v in options.items() if v is not None}
    if given.get("gpu_batch_size") == settings.LARGEST:
        del given["gpu_batch_size"]
        if known is None and "percent" not in given:
            return _best(block, job, given), SEARCHED
        chosen = settings.overlaid(known or settings.DEFAULT, given, job.lossy)
        return in_largest_batches(replace(block, settings=chosen), job), LARGER if not given else GIVEN
    if known is not None:
        chosen = limited(settings.overlaid(known, given, job.lossy), job)
        try:
            return outcome(replace(block, settings=chosen)), PUBLISHED if not given else GIVEN
        except DoesNotFit:
            if {"percent", "gpu_batch_size"} <= set(given):
                raise
    if {"percent", "gpu_batch_size", "num_gpu_batches"} <= set(given):
        chosen = settings.overlaid(settings.DEFAULT, given, job.lossy)
        return outcome(replace(block, settings=limited(chosen, job))), GIVEN
    return _best(block, job, given), SEARCHED


def in_largest_batches(block: Block, job: Job) -> Outcome:
    """Of a block's settings, in as large batches as fit. Raises DoesNotFit."""
    most = memory.LARGEST_GPU_BATCH if job.num_prompts is None else max(1, job.num_prompts // job.num_gpus)
    largest = memory.in_largest_batches(block, min(most, memory.LARGEST_GPU_BATCH))
    return outcome(replace(largest, settings=limited(largest.settings, job)))


def limited(chosen: Settings, job: Job) -> Settings:
    """The same for a job with fewer prompts than a block holds: in batches as even as they can be."""
    prompts = job.num_prompts
    if prompts is None:
        return chosen
    each = max(1, prompts // job.num_gpus)
    count = -(-each // chosen.gpu_batch_size)
    if count > chosen.num_gpu_batches:
        return chosen
    return replace(chosen, gpu_batch_size=-(-each // count), num_gpu_batches=count)


def _best(block: Block, job: Job, given: Mapping[str, Any]) -> Outcome:
    best: Outcome | None = None
    refusal: DoesNotFit | None = None
    for candidate in _candidates(job.lossy, given):
        sizes = _gpu_batch_sizes(replace(block, settings=candidate), given)
        for shaped in _shapes(candidate, job, given, sizes):
            try:
                outcomes = _largest_blocks(replace(block, settings=shaped), given)
            except DoesNotFit as error:
                # The most modest that was tried says best what is missing.
                refusal = error if refusal is None or _is_nearer(error, refusal) else refusal
                break  # a larger batch fits no better
            for one in outcomes:
                if best is None or one.tok_per_s > best.tok_per_s:
                    best = one
    if best is None:
        assert refusal is not None
        raise refusal
    return best


def _is_nearer(error: DoesNotFit, other: DoesNotFit) -> bool:
    return error.need_bytes / error.capacity_bytes < other.need_bytes / other.capacity_bytes


def _candidates(lossy: Lossy, given: Mapping[str, Any]) -> Iterator[Settings]:
    """Placements, with batches of 1; attention on the cpu or not for caches that are below the GPU."""
    seen = set()
    for weights in _WEIGHTS:
        for cache in ((100, 0), (0, 100), (0, 0)):
            here = cache == (100, 0)
            hidden = (100, 0) if here else (0, 100)
            for on_cpu in (False,) if here or lossy.kv_cache else (False, True):
                overlap = not (here and weights == (100, 0))
                base = Settings(1, 1, (*weights, *cache, *hidden), on_cpu, overlap=overlap)
                candidate = settings.overlaid(base, given, lossy)
                if candidate not in seen:
                    seen.add(candidate)
                    yield candidate


def _gpu_batch_sizes(block: Block, given: Mapping[str, Any]) -> list[int]:
    """Those that are tried, small before large. With the whole cache on the GPU also the largest of which one batch
    fits."""
    if "gpu_batch_size" in given:
        return [block.settings.gpu_batch_size]
    if block.settings.percent[2] < 100:
        return list(_GPU_BATCH_SIZES)

    def check(size: int) -> None:
        settings = replace(block.settings, gpu_batch_size=size, num_gpu_batches=1, pin_weight=False)
        memory.check(replace(block, settings=settings))

    try:
        largest = largest_that_fits(check, memory.LARGEST_GPU_BATCH)
    except DoesNotFit:
        return [1]  # which says what is missing
    return sorted({*(size for size in _GPU_BATCH_SIZES if size < largest), largest})


def _shapes(candidate: Settings, job: Job, given: Mapping[str, Any], sizes: list[int]) -> Iterator[Settings]:
    """Batches of these sizes; where the number of prompts is stated, as even as they can be."""
    each = job.num_prompts and max(1, job.num_prompts // job.num_gpus)
    for size in sizes:
        if each is None:
            yield replace(candidate, gpu_batch_size=size, num_gpu_batches=_NUM_GPU_BATCHES[-1])
        elif size <= each or size == 1:
            count = -(-each // size)
            even = size if "gpu_batch_size" in given else -(-each // count)
            yield replace(candidate, gpu_batch_size=even, num_gpu_batches=count)


def _largest_blocks(block: Block, given: Mapping[str, Any]) -> list[Outcome]:
    """Blocks of one batch, and of the most that fit (up to the settings' own); also with weights that are not
    page-locked, if then more fit. Raises DoesNotFit."""
    most = block.settings.num_gpu_batches
    counts = [c for c in _NUM_GPU_BATCHES if c <= most]
    if "num_gpu_batches" in given:
        counts = [int(given["num_gpu_batches"])]
    pageable = replace(block, settings=replace(block.settings, pin_weight=False))
    may_unpin = "pin_weight" not in given and block.settings.percent[1] > 0
    try:
        outcomes = _up_to(block, counts)
    except DoesNotFit as error:
        if error.tier != Tier.CPU or not may_unpin:
            raise
        return _up_to(pageable, counts)
    if may_unpin and outcomes[-1].block.settings.num_gpu_batches < counts[-1]:
        outcomes += _up_to(pageable, counts)[1:]
    return outcomes


def _up_to(block: Block, counts: list[int]) -> list[Outcome]:
    """With the first of ``counts`` batches, and with the last that fits. Raises DoesNotFit if the first does not."""
    first = outcome(_with(block, counts[0]))
    for count in reversed(counts[1:]):
        larger = _with(block, count)
        try:
            memory.check(larger)
        except DoesNotFit:
            continue
        return [first, outcome(larger)]
    return [first]


def _with(block: Block, count: int) -> Block:
    return replace(block, settings=replace(block.settings, num_gpu_batches=count))

"""What the original needs per tier, and whether a machine has it."""

from __future__ import annotations

from baselines.flexgen_original.job import RELAY_BYTES, Job
from baselines.flexgen_original.placement import LayerKind
from flexgen_bench.core.tiers import Tier

Parts = dict[str, float]
_REMEDY = {
    Tier.GPU: "Lower system.options.gpu_batch_size, or move shares of system.options.percent to cpu.",
    Tier.CPU: "Lower the block, move shares to disk, or set system.options.pin_weight=false.",
    Tier.DISK: "Keep more in memory.",
}
# What a prompt's attention holds at once, in (batch, tokens, hidden) tensors: input, norm, Q, K, V, the next batch's
# input, the last batch's output; in (batch, heads, tokens, tokens) tensors: the scores, and what softmax makes of them.
HIDDEN_TENSORS, SCORE_TENSORS = 7, 2


def needed(job: Job) -> dict[Tier, Parts]:
    """Bytes per tier and part."""
    return {Tier.GPU: _gpu(job), Tier.CPU: _cpu(job), Tier.DISK: _disk(job)}


def check(job: Job) -> dict[Tier, Parts]:
    """The same. Raises DoesNotFit for the first tier that is too small."""
    parts = needed(job)
    for tier, named in parts.items():
        job.machine.check(tier, named, _REMEDY[tier])
    return parts


def _gpu(job: Job) -> Parts:
    outer = (LayerKind.EMBED, LayerKind.HEAD)
    inner = [layer for layer, _ in job.counted if layer.kind not in outer]
    # The layer that is computed and the one that comes next; in the worst place these are an attention and an MLP.
    buffers = sum(layer.moved_bytes for layer in inner) * (1 if len(inner) > 1 else 2)
    plain = max(layer.plain_bytes for layer, _ in job.counted) if job.settings.compress_weight else 0
    return {
        "weights": job.weight_bytes(Tier.GPU),
        "kv_cache": job.cache_bytes(Tier.GPU),
        "weight buffers": buffers,
        "unpacked weights": plain,
        "activations": _gpu_hidden(job),
        "workspace": max(_prefill_attention(job), _prefill_head(job), _decode_attention(job)),
        "driver and context": job.machine.process_bytes,
    }


def _gpu_hidden(job: Job) -> float:
    on_gpu = job.hidden_on is Tier.GPU
    return job.hidden_bytes * job.settings.num_gpu_batches if on_gpu else 0.0


def _prefill_attention(job: Job) -> float:
    batch, heads = job.settings.gpu_batch_size, job.size.shape.num_heads
    scores = job.size.bytes_of(batch * heads * job.prompt_len**2)
    return SCORE_TENSORS * scores + HIDDEN_TENSORS * job.hidden_bytes


def _prefill_head(job: Job) -> float:
    """Logits of every position, although the last one's are wanted."""
    logits = job.settings.gpu_batch_size * job.prompt_len * job.size.shape.vocab_size
    return job.size.bytes_of(logits) + 3 * job.hidden_bytes


def _decode_attention(job: Job) -> float:
    """Caches that were moved to the GPU, of this batch and the next, and this one's in the order of heads (float16)."""
    whole = job.kv_bytes(job.prompt_len + job.gen_len)
    below = 0.0 if job.settings.cpu_cache_compute else 1 - job.kv_shares[Tier.GPU]
    here = 0.0 if job.settings.cpu_cache_compute and not job.kv_shares[Tier.GPU] else 1.0
    unpacked = whole if job.settings.compress_cache else 0.0
    return 2 * below * whole * job.kv_packed + here * whole + here * unpacked


def _cpu(job: Job) -> Parts:
    settings = job.settings
    workspace = 0.0
    if settings.cpu_cache_compute:
        # In float32; a second pair of tensors if attention and MLP are one layer.
        pairs = 1 if settings.sep_layer else 2
        workspace = pairs * 2 * job.kv_bytes(job.prompt_len + job.gen_len - 1)
    hidden = job.hidden_bytes * settings.num_gpu_batches
    return {
        "weights": _cpu_weights(job),
        "kv_cache": job.cache_bytes(Tier.CPU),
        "activations": hidden if job.hidden_on is Tier.CPU else 0.0,
        "attention workspace": workspace,
        "relay buffers": RELAY_BYTES,
    }


def _cpu_weights(job: Job) -> float:
    """Page-locked tensors are rounded up to powers of two by torch's allocator."""
    if not job.settings.pin_weight:
        return job.weight_bytes(Tier.CPU)
    return float(
        sum(
            count * (1 << (int(size) - 1).bit_length())
            for layer, count in job.counted
            for size in layer.matrices[Tier.CPU]
        )
    )


def _disk(job: Job) -> Parts:
    hidden = job.hidden_bytes * job.settings.num_gpu_batches
    return {
        "weights": job.weight_bytes(Tier.DISK),
        "kv_cache": job.cache_bytes(Tier.DISK),
        "activations": hidden if job.hidden_on is Tier.DISK else 0.0,
    }

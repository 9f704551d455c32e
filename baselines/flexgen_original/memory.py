"""What the original needs per tier, and whether a machine has it."""

from __future__ import annotations

from dataclasses import replace

from baselines.common.machine import largest_that_fits
from baselines.flexgen_original.block import RELAY_BYTES, Block
from baselines.flexgen_original.placement import LayerKind
from flexgen_bench.core.tiers import Tier

Parts = dict[str, float]
# What its authors ran on the GPU alone was as large as fits (7, 76, 196: Tables 17 and 18), elsewhere at most 160.
LARGEST_GPU_BATCH = 256
_REMEDY = {
    Tier.GPU: "Lower system.options.gpu_batch_size, or move shares of system.options.percent to cpu.",
    Tier.CPU: "Lower the block, move shares to disk, or set system.options.pin_weight=false.",
    Tier.DISK: "Keep more in memory.",
}
# What a prompt's attention holds at once, in (batch, tokens, hidden) tensors: input, norm, Q, K, V, the next batch's
# input, the last batch's output; in (batch, heads, tokens, tokens) tensors: the scores, and what softmax makes of them.
HIDDEN_TENSORS, SCORE_TENSORS = 7, 2


def needed(block: Block) -> dict[Tier, Parts]:
    """Bytes per tier and part."""
    return {Tier.GPU: _gpu(block), Tier.CPU: _cpu(block), Tier.DISK: _disk(block)}


def check(block: Block) -> dict[Tier, Parts]:
    """The same. Raises DoesNotFit for the first tier that is too small."""
    parts = needed(block)
    for tier, named in parts.items():
        block.machine.check(tier, named, _REMEDY[tier])
    return parts


def in_largest_batches(block: Block, most: int = LARGEST_GPU_BATCH) -> Block:
    """The same placement and number of batches, with as many sequences (``most`` at most) in each as fit. Raises
    DoesNotFit if not even one does."""

    def sized(size: int) -> Block:
        return replace(block, settings=replace(block.settings, gpu_batch_size=size))

    return sized(largest_that_fits(lambda size: check(sized(size)), most))


def _gpu(block: Block) -> Parts:
    outer = (LayerKind.EMBED, LayerKind.HEAD)
    inner = [layer for layer, _ in block.counted if layer.kind not in outer]
    # The layer that is computed and the one that comes next; in the worst place these are an attention and an MLP.
    buffers = sum(layer.moved_bytes for layer in inner) * (1 if len(inner) > 1 else 2)
    unpacked = max(layer.plain_bytes for layer, _ in block.counted) if block.settings.compress_weight else 0
    return {
        "weights": block.weight_bytes(Tier.GPU),
        "kv_cache": block.cache_bytes(Tier.GPU),
        "weight buffers": buffers,
        "unpacked weights": unpacked,
        "activations": _gpu_hidden(block),
        "workspace": max(_prefill_attention(block), _prefill_head(block), _decode_attention(block)),
        "driver and context": block.machine.process_bytes,
    }


def _gpu_hidden(block: Block) -> float:
    on_gpu = block.hidden_on is Tier.GPU
    return block.hidden_bytes * block.settings.num_gpu_batches if on_gpu else 0.0


def _prefill_attention(block: Block) -> float:
    batch, heads = block.settings.gpu_batch_size, block.size.shape.num_heads
    scores = block.size.bytes_of(batch * heads * block.prompt_len**2)
    return SCORE_TENSORS * scores + HIDDEN_TENSORS * block.hidden_bytes


def _prefill_head(block: Block) -> float:
    """Logits of every position, although the last one's are wanted."""
    logits = block.settings.gpu_batch_size * block.prompt_len * block.size.shape.vocab_size
    return block.size.bytes_of(logits) + 3 * block.hidden_bytes


def _decode_attention(block: Block) -> float:
    """Caches that were moved to the GPU, of this batch and the next, and this one's in the order of heads (float16)."""
    whole = block.kv_bytes(block.prompt_len + block.gen_len)
    below = 0.0 if block.settings.cpu_cache_compute else 1 - block.kv_shares[Tier.GPU]
    here = 0.0 if block.settings.cpu_cache_compute and not block.kv_shares[Tier.GPU] else 1.0
    unpacked = whole if block.settings.compress_cache else 0.0
    return 2 * below * whole * block.kv_packed + here * whole + here * unpacked


def _cpu(block: Block) -> Parts:
    settings = block.settings
    workspace = 0.0
    if settings.cpu_cache_compute:
        # In float32; a second pair of tensors if attention and MLP are one layer.
        pairs = 1 if settings.sep_layer else 2
        workspace = pairs * 2 * block.kv_bytes(block.prompt_len + block.gen_len - 1)
    hidden = block.hidden_bytes * settings.num_gpu_batches
    return {
        "weights": _cpu_weights(block),
        "kv_cache": block.cache_bytes(Tier.CPU),
        "activations": hidden if block.hidden_on is Tier.CPU else 0.0,
        "attention workspace": workspace,
        "relay buffers": RELAY_BYTES,
    }


def _cpu_weights(block: Block) -> float:
    """Page-locked tensors are rounded up to powers of two by torch's allocator."""
    if not block.settings.pin_weight:
        return block.weight_bytes(Tier.CPU)
    return float(
        sum(
            count * (1 << (int(size) - 1).bit_length())
            for layer, count in block.counted
            for size in layer.matrices[Tier.CPU]
        )
    )


def _disk(block: Block) -> Parts:
    hidden = block.hidden_bytes * block.settings.num_gpu_batches
    return {
        "weights": block.weight_bytes(Tier.DISK),
        "kv_cache": block.cache_bytes(Tier.DISK),
        "activations": hidden if block.hidden_on is Tier.DISK else 0.0,
    }

"""Attention of a resident micro-batch's layers by the native kernel: what layers share is made once."""

from __future__ import annotations

import pytest
import torch

from flexgen_bench.core.score_mod import NO_MOD
from flexgen_bench.kernels.decode_native import NativeAttention, prepared
from flexgen_bench.kernels.native.build import library
from flexgen_bench.kernels.segments import PlainSegment


@pytest.mark.parametrize("prompt", [0, 3])
def test_moved_attention_is_that_of_the_other_layer(prompt: int) -> None:
    """It reads and appends where the other layer's cache lies, and nowhere else; one without tokens lies nowhere."""
    if library("attention") is None:
        pytest.skip("no native kernels here")
    layers, sequences, groups, tokens, dim = 3, 2, 2, 7, 16
    stored = torch.randn(layers, 2, sequences, groups, tokens, dim)
    q = torch.randn(sequences, 2 * groups, dim)
    new = (torch.randn(sequences, groups, dim), torch.randn(sequences, groups, dim))

    def ready(cache: torch.Tensor, layer: int) -> NativeAttention:
        keys, values = cache[layer].unbind(0)
        halves = [t.split((prompt, tokens - prompt), 2) for t in (keys, values)]
        segments = [PlainSegment(k, v) for k, v in zip(*halves, strict=True)]
        made = prepared(q.shape, q.dtype, segments, None, 0.25, mod=NO_MOD)
        assert made is not None
        return made

    own = stored.clone()
    moved = ready(stored, 0).moved(2 * stored.stride(0) * stored.element_size())
    expected = ready(own, 2)(q, new)
    assert torch.equal(moved(q, new), expected)
    assert torch.equal(stored, own)
    assert not torch.equal(stored[2, 0, :, :, -1], stored[1, 0, :, :, -1])

"""Attention kernels and precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flexgen_bench import LLM
from flexgen_bench.kernels.attention import Padding, PlainSegment, decode_attention, prefill_attention
from tests.support.tiny_models import MODELS, random_model, random_prompts, save


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([4, 7]),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_decode_attention_equals_sdpa(
    sequences: int, groups: int, per_group: int, dim: int, lengths: list[int], seed: int
) -> None:
    """Segments of any length, a ragged first one: the same as one masked attention over everything."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sequences, groups * per_group, dim, generator=generator)
    segments = [
        (
            torch.randn(sequences, groups, t, dim, generator=generator),
            torch.randn(sequences, groups, t, dim, generator=generator),
        )
        for t in lengths
    ]
    real = torch.randint(1, lengths[0] + 1, (sequences,), generator=generator)
    mask = torch.arange(lengths[0])[None, :] < real[:, None]
    plain = [PlainSegment(k, v) for k, v in segments]
    out = decode_attention(q, plain, Padding.of(real, lengths[0], q.device), 0.3)
    keys = torch.cat([k for k, _ in segments], dim=2)
    values = torch.cat([v for _, v in segments], dim=2)
    whole = torch.cat([mask, torch.ones(sequences, sum(lengths[1:]), dtype=torch.bool)], dim=1)
    expected = F.scaled_dot_product_attention(
        q[:, :, None], keys, values, attn_mask=whole[:, None, None], scale=0.3, enable_gqa=True
    )
    assert torch.allclose(out, expected.reshape(sequences, -1), atol=1e-5)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_prefill_attention_keeps_sequences_apart(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q = torch.randn(total, 4, 5, generator=generator)
    k, v = (torch.randn(total, 2, 5, generator=generator), torch.randn(total, 2, 5, generator=generator))
    out = prefill_attention(q, k, v, lengths, 0.4)
    row = 0
    for length in lengths:
        part = slice(row, row + length)
        alone = prefill_attention(q[part], k[part], v[part], [length], 0.4)
        assert torch.allclose(out[part], alone, atol=1e-5)
        row += length


@pytest.mark.parametrize("name", sorted(MODELS))
def test_bfloat16_is_as_close_to_float32_as_transformers_is(name: str, tmp_path: Path) -> None:
    """Log-probabilities in bfloat16: the error against float32 is at most twice that of transformers in bfloat16."""
    model = random_model(name)
    folder = save(model, tmp_path / "ckpt")
    prompts = random_prompts([24] * 8)
    with LLM(folder, dtype="bfloat16", gpu="cpu", cache_dir=tmp_path / "cache", threads=1) as llm:
        scores = llm.score([p[:1] for p in prompts], [p[1:] for p in prompts])
    ours = torch.tensor([s.token_logprobs for s in scores])
    ids = torch.tensor(prompts)
    with torch.no_grad():
        exact = _logprobs(model, ids)
        theirs = _logprobs(model.to(torch.bfloat16), ids)
    assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()


def _logprobs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]

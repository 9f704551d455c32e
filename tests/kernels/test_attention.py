"""Decode and chunk attention against a plain float64 reference."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexgen_bench.core.compression import Compression
from flexgen_bench.kernels.attention import (
    PackedSegment,
    Padding,
    PlainSegment,
    Segment,
    chunk_attention,
    decode_attention,
    prefill_attention,
)
from flexgen_bench.kernels.decode import attend_with_torch
from flexgen_bench.kernels.decode_native import attend_natively
from flexgen_bench.kernels.native import build
from flexgen_bench.kernels.quantization import quantize
from flexgen_bench.kernels.value_share import kept

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
Case = tuple[Tensor, list[Segment], Padding | None, float, list[int] | None]


def reference(
    q: Tensor,
    segments: Sequence[Segment],
    padding: Padding | None,
    scale: float,
    value_share: float = 1.0,
    slots: Sequence[int] | None = None,
) -> Tensor:
    """One head of one sequence at a time, in float64, straight from the definition."""
    _, heads, dim = q.shape
    groups = segments[0].heads
    keys = [s.keys(torch.float32).double() for s in segments]
    values = [s.values(torch.float32).double() for s in segments]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row, s in enumerate(range(q.shape[0]) if slots is None else slots):
        first = segments[0].tokens if padding is None else int(padding.lengths[s])
        for head in range(heads):
            g = head // (heads // groups)
            k = torch.cat([keys[0][s, g, :first], *(x[s, g] for x in keys[1:])])
            v = torch.cat([values[0][s, g, :first], *(x[s, g] for x in values[1:])])
            weights = torch.softmax(k @ q[row, head].double() * scale, 0)
            used = [len(weights) - 1]
            others = sorted(range(len(weights) - 1), key=lambda t: (-float(weights[t]), t))
            used += others[: kept(value_share, len(weights)) - 1]
            out[row, head] = weights[used] @ v[used]
    return out.view(-1, heads * dim)


def strided(x: Tensor, rng: random.Random) -> Tensor:
    """The same values, sometimes as a part of something larger: no stride but the last is what the shape suggests."""
    if rng.random() < 0.5:
        return x
    sequences, groups, tokens, dim = x.shape
    whole = torch.full((sequences, groups + 1, tokens + 3, dim), 7.0).to(x.dtype)
    part = whole[:, 1:, 2 : 2 + tokens]
    return part.copy_(x)


def random_case(seed: int, dtype: torch.dtype, bits: int | None = None) -> Case:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dim = rng.choice([12, 20, 64, 80, 128] if bits is None else [16, 24, 64, 80, 128])
    groups, ratio, sequences = rng.randint(1, 3), rng.randint(1, 8), rng.randint(1, 4)
    pieces = rng.randint(1, 3)
    segments: list[Segment] = []
    for _ in range(pieces):
        tokens = rng.choice([1, 2, 5, 17, 33, 70, 150])
        # Keys of some spread, so that the weights differ; a common part of values, so that a wrong sum shows.
        k = torch.randn(sequences, groups, tokens, dim).to(dtype)
        v = (torch.randn(sequences, groups, tokens, dim) + 0.5).to(dtype)
        if bits is None:
            segments.append(PlainSegment(strided(k, rng), strided(v, rng)))
        else:
            compression = Compression(bits, rng.choice([8, 32, 64]))
            codes, params = quantize(torch.stack((k, v)), compression)
            segments.append(PackedSegment(codes, params, compression, dim))
    first = segments[0].tokens
    padding = None
    if rng.random() < 0.6:
        lengths = torch.randint(1 if pieces == 1 else 0, first + 1, (sequences,), dtype=torch.int32)
        padding = Padding.of(lengths, first, torch.device("cpu"))
    slots = None
    if rng.random() < 0.4:
        slots = sorted(rng.sample(range(sequences), rng.randint(1, sequences)))
    rows = sequences if slots is None else len(slots)
    q = (torch.randn(rows, groups * ratio, dim) * 1.5).to(dtype)
    return q, segments, padding, dim**-0.5, slots


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute it; where nothing can be compiled, "native" is torch again."""
    name = str(request.param)
    monkeypatch.setenv(build.SWITCH, "0" if name == "torch" else "1")
    return name


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(25))
def test_decode_equals_the_definition(seed: int, dtype: torch.dtype, path: str) -> None:
    q, segments, padding, scale, slots = random_case(seed, dtype)
    out = decode_attention(q, segments, padding, scale, slots=slots)
    assert out.dtype == dtype
    expected = reference(q, segments, padding, scale, slots=slots)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.one_in(5)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("seed", range(20))
def test_decode_of_a_packed_cache(seed: int, bits: int, path: str) -> None:
    q, segments, padding, scale, slots = random_case(seed, torch.float32, bits)
    share = [1.0, 0.3][seed % 2]
    out = decode_attention(q, segments, padding, scale, share, slots)
    expected = reference(q, segments, padding, scale, share, slots)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("seed", range(100, 112))
def test_share_of_the_values(seed: int, share: float, path: str) -> None:
    q, segments, padding, scale, slots = random_case(seed, torch.float32)
    out = decode_attention(q, segments, padding, scale, share, slots)
    expected = reference(q, segments, padding, scale, share, slots)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_of_equal_weights_the_earlier_tokens_stay(path: str) -> None:
    """Equal keys: a quarter of 8 tokens is the last and the first, at an eighth of the weight each."""
    keys = torch.ones(1, 1, 8, 16)
    values = torch.arange(8.0)[None, None, :, None].expand(1, 1, 8, 16).contiguous()
    out = decode_attention(torch.ones(1, 2, 16), [PlainSegment(keys, values)], None, 1.0, 0.25)
    assert torch.allclose(out, torch.full((1, 32), (0 + 7) / 8))


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_padded_slots_do_not_matter(share: float, path: str) -> None:
    """Whatever lies in them, large numbers included, the result is the same to the bit."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 3, 2, 40, 32).unbind()
    tail = PlainSegment(torch.randn(3, 2, 5, 32), torch.randn(3, 2, 5, 32))
    q = torch.randn(3, 4, 32)
    padding = Padding.of(torch.tensor([40, 3, 0]), 40, q.device)
    assert padding is not None
    outs = []
    for garbage in (0.0, 1e30, -1e30):
        noisy = [torch.where(padding.mask[:, None, :, None], x, garbage) for x in (k, v)]
        segments = [PlainSegment(noisy[0], noisy[1]), tail]
        outs.append(decode_attention(q, segments, padding, 0.2, share))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_sequence_does_not_depend_on_the_others(path: str) -> None:
    q, segments, padding, scale, _ = random_case(7, torch.float32)
    together = decode_attention(q, segments, padding, scale)
    for s in range(q.shape[0]):
        alone = decode_attention(q[s : s + 1], segments, padding, scale, slots=[s])
        torch.testing.assert_close(together[s : s + 1], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_any_number_of_threads(threads: int, share: float, path: str) -> None:
    """One long sequence with one KV head has to be split over its tokens."""
    torch.manual_seed(1)
    segments: list[Segment] = [PlainSegment(torch.randn(1, 1, t, 64), torch.randn(1, 1, t, 64)) for t in (2000, 77)]
    q = torch.randn(1, 3, 64) * 2
    padding = Padding.of(torch.tensor([1900]), 2000, q.device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = decode_attention(q, segments, padding, 0.125, share)
    finally:
        torch.set_num_threads(before)
    expected = reference(q, segments, padding, 0.125, share)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_no_sequences(path: str) -> None:
    """All have left."""
    segment = PlainSegment(torch.randn(2, 2, 4, 16), torch.randn(2, 2, 4, 16))
    assert decode_attention(torch.randn(0, 4, 16), [segment], None, 0.2, slots=[]).shape == (0, 64)


@pytest.mark.parametrize("grouped", [False, True])
def test_chunks_of_prompts_equal_whole_prompts(grouped: bool) -> None:
    """Prompts cut into chunks at different places, some chunks empty: the rows of the whole prompts."""
    torch.manual_seed(0)
    lengths = [9, 9, 5, 12]
    groups = 2 if grouped else 4
    q = torch.randn(sum(lengths), 4, 16)
    k, v = torch.randn(2, sum(lengths), groups, 16).unbind()
    expected = prefill_attention(q, k, v, lengths, 0.3).split(lengths)
    cache = torch.full((2, len(lengths), groups, 12, 16), 1e6)  # slots that hold no token yet
    for s, (keys, values) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        cache[0, s, :, : lengths[s]] = keys.transpose(0, 1)
        cache[1, s, :, : lengths[s]] = values.transpose(0, 1)
    cuts = [[0, 4, 9], [0, 4, 9], [0, 5, 5], [0, 1, 12]]
    for chunk in (0, 1):
        ranges = [(cut[chunk], cut[chunk + 1]) for cut in cuts]
        rows = [x[a:b] for x, (a, b) in zip(q.split(lengths), ranges, strict=True)]
        out = chunk_attention(torch.cat(rows), cache[0], cache[1], ranges, 0.3)
        wanted = torch.cat([x[a:b] for x, (a, b) in zip(expected, ranges, strict=True)])
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    assert chunk_attention(q[:0], cache[0], cache[1], [(3, 3)] * 4, 0.3).shape == (0, 64)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no compiler")
def test_the_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that does not compile here would otherwise pass all tests, by way of torch."""
    monkeypatch.delenv(build.SWITCH, raising=False)
    assert build.library("attention") is not None
    q, segments, padding, scale, slots = random_case(3, torch.float32)
    assert attend_natively(q, segments, padding, scale, slots=slots) is not None


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLEXGEN_NATIVE=0: torch's result to the bit, and no library."""
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.library("attention") is None
    case = random_case(3, torch.bfloat16)
    assert torch.equal(decode_attention(*case[:4], slots=case[4]), attend_with_torch(*case[:4], slots=case[4]))


def test_without_a_compiler_torch_does_it(tmp_path: Path) -> None:
    code = (
        "import logging, torch; logging.basicConfig(format='%(name)s: %(message)s')\n"
        "from flexgen_bench.kernels.attention import PlainSegment, decode_attention\n"
        "segment = PlainSegment(torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8))\n"
        "for _ in range(2): print(decode_attention(torch.ones(1, 1, 8), [segment], None, 1.0).sum())\n"
    )
    env = {**os.environ, "CXX": "/nonexistent", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    env.pop(build.SWITCH, None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tensor(8.)"] * 2
    assert done.stderr.count("flexgen_bench.native: no native attention") == 1
    assert "/nonexistent" in done.stderr

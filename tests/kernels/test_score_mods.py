"""ALiBi, windows, soft caps and sinks against their definition in float64, in every kind of attention."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from flexgen_bench.core.score_mod import NO_MOD, ScoreMod, alibi_slopes
from flexgen_bench.kernels.attention import chunk_attention, decode_attention, prefill_attention
from flexgen_bench.kernels.decode_native import attend_natively
from flexgen_bench.kernels.native import build
from flexgen_bench.kernels.tree_attention import TreeMask, tree_attention
from flexgen_bench.kernels.value_share import kept
from flexgen_bench.schedule.prefix_tree import PrefixTree, ScoreRequest, grow
from tests.kernels.test_attention import TOLERANCE, Case, random_case

Modified = tuple[ScoreMod, Tensor | None]


def mods(heads: int, rng: random.Random) -> list[Modified]:
    slopes, window = alibi_slopes(heads), rng.choice([1, 2, 7, 40, 90])
    sinks = torch.randn(heads) * 3  # from what no head would notice to what leaves little for the keys
    return [
        (ScoreMod(window=window), None),
        (ScoreMod(soft_cap=1.5), None),
        (ScoreMod(slopes=slopes), None),
        (ScoreMod(window=window, soft_cap=2.0, slopes=slopes), sinks),
        (NO_MOD, sinks),
        (ScoreMod(window=window), sinks),
    ]


def changed(scores: Tensor, head: int, mod: ScoreMod) -> Tensor:
    """Scores (T) of the tokens up to and with the query itself."""
    behind = torch.arange(len(scores) - 1, -1, -1)
    if mod.soft_cap is not None:
        scores = mod.soft_cap * torch.tanh(scores / mod.soft_cap)
    if mod.slopes:
        scores = scores - mod.slopes[head] * behind
    if mod.window is not None:
        scores = scores.masked_fill(behind >= mod.window, -math.inf)
    return scores


def defined(q: Tensor, k: Tensor, v: Tensor, head: int, scale: float, mods: Modified, share: float) -> Tensor:
    """One query (D) over keys and values (T, D), of which the last are its own."""
    mod, sinks = mods
    scores = changed(k.double() @ q.double() * scale, head, mod)
    nothing = torch.tensor([-math.inf if sinks is None else float(sinks[head])], dtype=torch.float64)
    weights = torch.softmax(torch.cat((scores, nothing)), 0)[:-1]
    others = sorted(range(len(weights) - 1), key=lambda t: (-float(weights[t]), t))
    used = [len(weights) - 1, *others[: kept(share, mod.seen(len(weights))) - 1]]
    return weights[used] @ v[used].double()


def decoded(case: Case, mod: Modified, share: float) -> Tensor:
    q, segments, padding, scale, slots = case
    _, heads, dim = q.shape
    keys, values = ([x(torch.float32) for x in (getattr(s, n) for s in segments)] for n in ("keys", "values"))
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row, s in enumerate(range(q.shape[0]) if slots is None else slots):
        first = segments[0].tokens if padding is None else int(padding.lengths[s])
        for head in range(heads):
            g = head * segments[0].heads // heads
            k, v = (torch.cat([x[0][s, g, :first], *(y[s, g] for y in x[1:])]) for x in (keys, values))
            out[row, head] = defined(q[row, head], k, v, head, scale, mod, share)
    return out.view(-1, heads * dim)


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(build.SWITCH, "0" if request.param == "torch" else "1")
    return str(request.param)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("seed", range(8))
def test_decode(seed: int, bits: int | None, path: str) -> None:
    case = random_case(seed, torch.float32, bits)
    q, segments, padding, scale, slots = case
    rng = random.Random(seed)
    for mod in mods(q.shape[1], rng):
        share = rng.choice([1.0, 0.3])
        if path == "native" and build.library("attention") is not None:
            assert attend_natively(q, segments, padding, scale, share, slots, *mod) is not None
        out = decode_attention(q, segments, padding, scale, share, slots, *mod)
        torch.testing.assert_close(out.double(), decoded(case, mod, share), atol=1e-4, rtol=1e-4, msg=str(mod))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decode_in_16_bits(dtype: torch.dtype, path: str) -> None:
    case = random_case(3, dtype)
    q, segments, padding, scale, slots = case
    for mod in mods(q.shape[1], random.Random(3)):
        out = decode_attention(q, segments, padding, scale, 1.0, slots, *mod)
        expected = decoded(case, mod, 1.0)
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("threads", [1, 3])
def test_a_long_cache_is_shared_out(threads: int, path: str) -> None:
    """Several threads take pieces of one sequence's tokens, those in the window alone."""
    from flexgen_bench.kernels.attention import PlainSegment

    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 5000, 16)
    q, before = torch.randn(1, 4, 16), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sinks = torch.tensor([-3.0, 0.0, 8.0, 60.0])
        for mod in (
            (ScoreMod(window=3100), sinks),
            (ScoreMod(slopes=alibi_slopes(4)), None),
            (ScoreMod(window=2500, soft_cap=1.0), None),
        ):
            out = decode_attention(q, [PlainSegment(k, v)], None, 0.25, 1.0, None, *mod)
            expected = decoded((q, [PlainSegment(k, v)], None, 0.25, None), mod, 1.0)
            torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("small", [False, True], ids=["at once", "few rows at a time"])
@pytest.mark.parametrize("heads", [2, 6])
def test_prompts_and_chunks(heads: int, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexgen_bench.kernels import score_mod

    if small:
        monkeypatch.setattr(score_mod, "SCORES_AT_ONCE", 200)
    torch.manual_seed(heads)
    lengths = [1, 8, 8, 21]
    q, k, v = (torch.randn(sum(lengths), n, 10) for n in (heads, 2, 2))
    rng = random.Random(heads)
    for mod in mods(heads, rng):
        expected = torch.cat(
            [
                _prompt(q[a : a + n], k[a : a + n], v[a : a + n], mod)
                for a, n in zip([0, 1, 9, 17], lengths, strict=True)
            ]
        )
        out = prefill_attention(q, k, v, lengths, 0.3, *mod)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)
        a, n = 17, 21
        keys, values = (x[a : a + n].transpose(0, 1)[None] for x in (k, v))
        for start, stop in ((0, 4), (4, 11), (11, 21)):
            part = chunk_attention(q[a + start : a + stop], keys, values, [(start, stop)], 0.3, *mod)
            torch.testing.assert_close(part.double(), expected[a + start : a + stop], atol=1e-5, rtol=1e-4)


def _prompt(q: Tensor, k: Tensor, v: Tensor, mod: Modified) -> Tensor:
    ratio = q.shape[1] // k.shape[1]
    return torch.stack(
        [
            torch.cat(
                [
                    defined(q[t, h], k[: t + 1, h // ratio], v[: t + 1, h // ratio], h, 0.3, mod, 1.0)
                    for h in range(q.shape[1])
                ]
            )
            for t in range(len(q))
        ]
    )


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("chunk", [100, 7])
@pytest.mark.parametrize("seed", range(4))
def test_forests(seed: int, chunk: int, share: float) -> None:
    """Every row over its ancestors, whose number is its position; sparse ones where tokens are decoded."""
    tree, heads = _tree(seed), 6
    torch.manual_seed(seed)
    q, k, v = (torch.randn(tree.rows, n, 10) for n in (heads, 2, 2))
    for mod in [(NO_MOD, None), *mods(heads, random.Random(seed))]:
        mask = TreeMask(tree)
        out = torch.cat(
            [tree_attention(q[a : a + chunk], k, v, mask, a, 0.3, share, *mod) for a in range(0, tree.rows, chunk)]
        )
        expected = torch.stack([_row(tree, row, q, k, v, mod, share) for row in range(tree.rows)])
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4, msg=str(mod))


def _tree(seed: int) -> PrefixTree:
    rng = random.Random(seed)

    def some(count: int) -> list[int]:
        return [rng.randrange(100) for _ in range(count)]

    begin, other = some(30), some(4)
    tokens = [[*start, *some(n)] for start, n in ((begin, 5), (begin, 9), (begin[:22], 3), (other, 6), (other, 2))]
    starts = [len(begin), len(begin), 22, 4, 4]
    requests = [ScoreRequest(t, s) for t, s in zip(tokens, starts, strict=True)]
    found: Sequence[PrefixTree] = grow(requests, 1000)
    assert len(found) == 1
    return found[0]


def _row(tree: PrefixTree, row: int, q: Tensor, k: Tensor, v: Tensor, mod: Modified, share: float) -> Tensor:
    path = [row]
    while tree.parents[path[0]] >= 0:
        path.insert(0, tree.parents[path[0]])
    ratio, share = q.shape[1] // k.shape[1], share if row in tree.logit_rows else 1.0
    return torch.cat(
        [defined(q[row, h], k[path, h // ratio], v[path, h // ratio], h, 0.3, mod, share) for h in range(q.shape[1])]
    )


def test_slopes_are_those_of_transformers() -> None:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    for heads in (1, 2, 3, 5, 8, 12, 16, 112):
        theirs = _get_alibi_slopes(heads, torch.device("cpu"))
        assert torch.allclose(torch.tensor(alibi_slopes(heads)), theirs, rtol=1e-6), heads

"""Loss token by token: every figure against plain Python written from llama.cpp's definitions, and against what
llama.cpp's own arithmetic gives for the same GGUF weights and text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexgen_bench.accuracy.run.divergence import keep, loss_of
from flexgen_bench.accuracy.run.token_loss import (
    LEAST_POSITIONS,
    Positions,
    chunks,
    compare,
    first_scored,
    joined,
    token_loss,
)
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.token_loss import TokenLoss
from tests.support.llama_logits import llama_logits


def distributions(count: int, vocabulary: int, change: float, seed: int = 0) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    exact = 3 * torch.randn(count, vocabulary, generator=generator)
    other = exact + change * torch.randn(count, vocabulary, generator=generator)
    true = torch.randint(vocabulary, (count,), generator=generator)
    return exact.log_softmax(-1), other.log_softmax(-1), true


def tool_statistics(exact: Any, other: Any, true: Any) -> dict[str, float]:
    """As ``kl_divergence`` of llama.cpp's perplexity.cpp accumulates and prints them, position by position, in plain
    Python floats; percentages as shares."""
    sums: dict[str, float] = dict.fromkeys(
        ("nll", "nll2", "base", "base2", "both", "kld", "kld2", "p", "p2", "p4", "top"), 0.0
    )
    values = []
    for log_p, log_q, token in zip(exact.double().numpy(), other.double().numpy(), true.tolist(), strict=True):
        kld = math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        nll, base = -log_q[token], -log_p[token]
        delta = math.exp(-nll) - math.exp(-base)
        top = float(log_p.argmax() == log_q.argmax())
        added = (nll, nll * nll, base, base * base, nll * base, kld, kld * kld, delta, delta**2, delta**4, top)
        for name, value in zip(sums, added, strict=True):
            sums[name] += value
        values.append(kld)
    n = len(values)

    def mean(total: float, squares: float) -> tuple[float, float]:
        average = total / n
        return average, math.sqrt((squares / n - average**2) / (n - 1))

    def percentile(share: float) -> float:
        place = share * (n - 1)
        below = int(place)
        ordered = sorted(values)
        return (1 - (place - below)) * ordered[below] + (place - below) * ordered[min(below + 1, n - 1)]

    nll, nll_error = mean(sums["nll"], sums["nll2"])
    base, base_error = mean(sums["base"], sums["base2"])
    covariance = (sums["both"] / n - sums["nll"] / n * sums["base"] / n) / (n - 1)
    square, square_error = mean(sums["p2"], sums["p4"])
    same = sums["top"] / n
    return {
        "kld": mean(sums["kld"], sums["kld2"])[0],
        "kld_error": mean(sums["kld"], sums["kld2"])[1],
        "kld_median": percentile(0.5),
        "kld_99": percentile(0.99),
        "kld_999": percentile(0.999),
        "kld_max": max(values),
        "ln_ppl_ratio": nll - base,
        "ln_ppl_ratio_error": math.sqrt(nll_error**2 + base_error**2 - 2 * covariance),
        "correlation": covariance / (nll_error * base_error),
        "ppl": math.exp(nll),
        "ppl_error": math.exp(nll) * nll_error,
        "ppl_exact": math.exp(base),
        "ppl_exact_error": math.exp(base) * base_error,
        "delta_p": mean(sums["p"], sums["p2"])[0],
        "delta_p_error": mean(sums["p"], sums["p2"])[1],
        "rms_delta_p": math.sqrt(square),
        "rms_delta_p_error": 0.5 / math.sqrt(square) * square_error,
        "same_top": same,
        "same_top_error": math.sqrt(same * (1 - same) / (n - 1)),
    }


def flat(loss: TokenLoss) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, value in vars(loss).items():
        if hasattr(value, "error"):
            figures |= {name: value.value, f"{name}_error": value.error}
        else:
            figures[name] = value
    del figures["text"]
    return figures


@pytest.mark.parametrize("count", [101, 250])
def test_every_figure_is_the_tools(count: int) -> None:
    exact, other, true = distributions(count, 40, 0.5)
    loss = token_loss(compare(exact, other, true), 512, "text")
    assert loss is not None
    figures = flat(loss)
    for name, value in tool_statistics(exact, other, true).items():
        assert figures[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    reverse = (other.exp() * (other - exact)).double().sum(-1)
    assert loss.reverse_kld.value == pytest.approx(float(reverse.mean()), rel=1e-5)
    assert loss.positions == count


def test_the_direction_of_each_divergence() -> None:
    """P gives a token 1/2 that Q gives 1/8: KL(P || Q) = ln 2 + ln(4/7) / 2, and not the other one."""
    exact, other = (torch.tensor([[p, 1 - p]]).log().expand(100, 2) for p in (0.5, 0.125))
    loss = token_loss(compare(exact, other, torch.zeros(100, dtype=torch.long)), 512, "text")
    assert loss is not None
    assert loss.kld.value == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 7), abs=1e-6)
    assert loss.reverse_kld.value == pytest.approx(0.125 * math.log(1 / 4) + 0.875 * math.log(7 / 4), abs=1e-6)
    assert loss.delta_p.value == pytest.approx(-0.375)
    assert loss.rms_delta_p.value == pytest.approx(0.375)
    assert loss.ln_ppl_ratio.value == pytest.approx(math.log(4))
    assert loss.correlation is None, "neither log-loss changes"


def test_tokens_that_cannot_be_cost_nothing() -> None:
    """Padding of a vocabulary has probability 0 under both."""
    exact, other, true = distributions(100, 20, 0.3)
    cannot = torch.full((100, 1), -torch.inf)
    padded = [torch.cat([x, cannot], dim=1) for x in (exact, other)]
    with_padding, without = (
        token_loss(compare(*padded, true), 512, "text"),
        token_loss(compare(exact, other, true), 512, "text"),
    )
    assert with_padding is not None
    assert without is not None
    assert flat(with_padding) == pytest.approx(flat(without))


def test_equal_models_lose_nothing() -> None:
    exact, _, true = distributions(120, 20, 0.0)
    loss = token_loss(compare(exact, exact, true), 512, "text")
    assert loss is not None
    figures = flat(loss)
    for name in ("kld", "kld_max", "reverse_kld", "delta_p", "rms_delta_p", "rms_delta_p_error", "ln_ppl_ratio"):
        assert figures[name] == 0, name
    assert (figures["same_top"], figures["same_top_error"]) == (1, 0)


def test_too_few_positions_say_nothing() -> None:
    ones = np.ones(LEAST_POSITIONS - 1)
    assert token_loss(Positions(ones, ones, -ones, -ones, ones), 512, "text") is None


def test_chunks_are_whole_and_begin_as_texts_do() -> None:
    assert chunks(range(10), 10, 4, None) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert chunks(range(10), 7, 4, None) == [[0, 1, 2, 3]]
    assert chunks(range(10), 10, 4, 99) == [[99, 1, 2, 3], [99, 5, 6, 7]]
    assert chunks(range(3), 10, 4, None) == []


class Fixed:
    """A model whose distributions are known."""

    def __init__(self, tables: list[Any]) -> None:
        self._tables = tables

    def logprobs(self, texts: Any) -> Any:
        return iter(self._tables)


def test_the_second_half_of_each_chunk_counts(tmp_path: Path) -> None:
    """Of 8 tokens: the predictions of those after the fifth, 3 of 7, as in the tool (n_ctx - 1 - n_ctx / 2)."""
    texts = [[int(i) for i in np.random.default_rng(n).integers(0, 30, 80)] for n in range(4)]
    tables = [distributions(79, 30, 0.4, seed) for seed in range(4)]
    first = first_scored(80)
    assert first == 40
    keep(Fixed([exact for exact, _, _ in tables]), texts, tmp_path / "kept", first)
    loss = loss_of("text", Fixed([other for _, other, _ in tables]), texts, tmp_path / "kept")
    wanted = [
        compare(exact[40:], other[40:], torch.tensor(text[41:]))
        for (exact, other, _), text in zip(tables, texts, strict=True)
    ]
    assert loss == token_loss(joined(wanted), 80, "text")
    assert loss is not None
    assert loss.positions == 4 * 39


def test_the_record_is_read_as_it_was_written() -> None:
    exact, other, true = distributions(100, 20, 0.3)
    loss = token_loss(compare(exact, other, true), 512, "text")
    assert loss is not None
    assert from_json(TokenLoss, to_json(loss), "loss") == loss


def test_llama_cpp_gives_the_same_figures_for_the_same_file(tmp_path: Path) -> None:
    """Two GGUF files, one with coarser weights: llama.cpp's own logits through the tool's formulas, beside those of
    transformers through ours. llama.cpp keeps keys and values in float16, and the tool itself would keep the base in 16
    bits."""
    from flexgen_bench.checkpoints.gguf.file_types import BLOCK_TYPES
    from flexgen_bench.checkpoints.gguf.rounding import round_trip
    from tests.support.gguf_writing import byte_level, tiny_llama, write_llama

    vocabulary = byte_level(["a tiny text"], size=300)
    model = tiny_llama(len(vocabulary.tokens)).float()
    tokens = [int(i) for i in np.random.default_rng(0).integers(0, len(vocabulary.tokens), 220)]
    write_llama(tmp_path / "base.gguf", model, vocabulary)
    ours = []
    for name in ("base", "coarse"):
        if name == "coarse":
            with torch.no_grad():
                for layer in model.model.layers:
                    weight = layer.mlp.up_proj.weight
                    weight.copy_(torch.from_numpy(round_trip(weight.numpy(), BLOCK_TYPES["Q4_0"])))
            write_llama(tmp_path / "coarse.gguf", model, vocabulary)
        with torch.no_grad():
            ours.append(model(torch.tensor([tokens])).logits[0, 110:-1].log_softmax(-1))
    theirs = [
        torch.from_numpy(llama_logits(tmp_path / f"{name}.gguf", tokens))[110:-1].log_softmax(-1)
        for name in ("base", "coarse")
    ]
    true = torch.tensor(tokens[111:])
    loss = token_loss(compare(*ours, true), 220, "text")
    assert loss is not None
    assert loss.kld.value > 1e-6
    for name, value in tool_statistics(*theirs, true).items():
        # The largest divergences are those of single positions, where the cache's rounding shows.
        tolerance = 5e-2 if name in ("kld_99", "kld_999", "kld_max") else 1e-2
        # A mean of both signs is known to the cache's rounding, however near to 0 it is.
        least = 3e-4 if name in ("ln_ppl_ratio", "delta_p") else 2e-5
        assert flat(loss)[name] == pytest.approx(value, rel=tolerance, abs=least), name

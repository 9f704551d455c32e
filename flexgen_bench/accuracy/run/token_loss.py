"""What a mode loses token by token: KL divergence both ways, the likeliest token, the true token's probability; as
llama.cpp's ``llama-perplexity --kl-divergence`` computes and names them (``core.token_loss``).

Text is cut into whole chunks; of each only the second half is scored, so that every position has context. Other than in
that tool the uncompressed distributions are kept in float32 (there: 16 bits within 16 nats of the likeliest token,
tokens below e^-16 left out of the sum), so its figures differ from these by its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flexgen_bench.core.token_loss import TokenLoss, Uncertain

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
# Tokens of a chunk: the tool's own, where the model can see as many.
CHUNK = 512
# Of fewer positions the tool tells nothing, either.
LEAST_POSITIONS = 100
# Rows that are in float64 at once: 13 MB for each of a few copies, with 50,000 tokens.
_ROWS = 32


@dataclass(frozen=True)
class Positions:
    """Of N positions, float64 (N,) each. kl: KL(P || Q); reverse: KL(Q || P), nats. exact, other: log-probability of
    the true token under P and under Q. same: 1 where both have the same likeliest token, else 0."""

    kl: Floats
    reverse: Floats
    exact: Floats
    other: Floats
    same: Floats


def chunks(tokens: Sequence[int], count: int, length: int, start: int | None) -> list[list[int]]:
    """The first ``count`` tokens as whole chunks of ``length``. start: what a model's texts begin with; it takes the
    place of each chunk's first token, which is never scored."""
    whole = [list(tokens[i : i + length]) for i in range(0, min(count, len(tokens)) - length + 1, length)]
    return whole if start is None else [[start, *chunk[1:]] for chunk in whole]


def first_scored(length: int) -> int:
    """In a chunk of ``length`` tokens the first one whose prediction of the next counts."""
    return length // 2


def compare(exact: Tensor, other: Tensor, true: Tensor) -> Positions:
    """exact, other: log-probabilities (N, V) under P and Q. true: the tokens (N,) that follow."""
    pieces = [_compare(*rows) for rows in zip(exact.split(_ROWS), other.split(_ROWS), true.split(_ROWS), strict=True)]
    return joined(pieces)


def joined(pieces: Sequence[Positions]) -> Positions:
    """Positions of several texts, one after the other."""
    columns = ("kl", "reverse", "exact", "other", "same")
    return Positions(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in columns))


def token_loss(positions: Positions, chunk: int, text: str) -> TokenLoss | None:
    """None for fewer than ``LEAST_POSITIONS``. chunk: tokens of the chunks they are from; text: the name of what was
    cut into these."""
    count = len(positions.kl)
    if count < LEAST_POSITIONS:
        return None
    delta = np.exp(positions.other) - np.exp(positions.exact)
    squared = mean_and_error(delta**2)
    rms = math.sqrt(squared.value)
    median, high, higher = np.percentile(positions.kl, (50, 99, 99.9))
    other, exact = -positions.other, -positions.exact
    spread = float(other.std() * exact.std())
    return TokenLoss(
        text=text,
        chunk=chunk,
        positions=count,
        kld=mean_and_error(positions.kl),
        kld_median=float(median),
        kld_99=float(high),
        kld_999=float(higher),
        kld_max=float(positions.kl.max()),
        reverse_kld=mean_and_error(positions.reverse),
        same_top=mean_and_error(positions.same),
        delta_p=mean_and_error(delta),
        # The error of a root: d sqrt(x) = dx / (2 sqrt(x)).
        rms_delta_p=Uncertain(rms, squared.error / (2 * rms) if rms else 0.0),
        ppl=_exponential(mean_and_error(other)),
        ppl_exact=_exponential(mean_and_error(exact)),
        # Of the difference position by position: var(a) + var(b) - 2 cov(a, b).
        ln_ppl_ratio=mean_and_error(other - exact),
        correlation=float(np.mean((other - other.mean()) * (exact - exact.mean()))) / spread if spread else None,
    )


def mean_and_error(values: Floats) -> Uncertain:
    """The mean of N values and its standard error, sqrt((mean of squares - square of mean) / (N - 1))."""
    return Uncertain(float(values.mean()), float(values.std() / math.sqrt(len(values) - 1)))


def _compare(exact: Tensor, other: Tensor, true: Tensor) -> Positions:
    import torch

    p, q = exact.double(), other.double()
    # Where both say -inf the difference is none.
    change = torch.where(p == q, torch.zeros(()).double(), p - q)
    kl = torch.where(p > -torch.inf, p.exp() * change, torch.zeros(()).double()).sum(-1)
    reverse = torch.where(q > -torch.inf, q.exp() * -change, torch.zeros(()).double()).sum(-1)
    own = [x.gather(1, true[:, None])[:, 0] for x in (p, q)]
    same = (exact.argmax(-1) == other.argmax(-1)).double()
    return Positions(*(x.numpy() for x in (kl, reverse, *own, same)))


def _exponential(log: Uncertain) -> Uncertain:
    """d exp(x) = exp(x) dx."""
    value = math.exp(log.value)
    return Uncertain(value, value * log.error)

"""What is lost token by token, in the words of llama.cpp's ``llama-perplexity --kl-divergence``.

Definitions: tools/perplexity/perplexity.cpp of llama.cpp (``kl_divergence``). P is the uncompressed model's next-token
distribution, Q the compressed one's; a position is scored if it lies in the second half of its chunk of text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Uncertain:
    """A value and its standard error, as if positions were independent (those of one chunk are not quite)."""

    value: float
    error: float


@dataclass(frozen=True)
class TokenLoss:
    """Over ``positions`` positions of chunks of ``chunk`` tokens of a text, which has the name ``text``.

    kld: mean of KL(P || Q), nats; kld_median, kld_99, kld_999, kld_max: of its values position by position (percentiles
    interpolated between neighbours). reverse_kld: mean of KL(Q || P), which that tool does not print. same_top: share
    of positions whose likeliest token is the same. delta_p: mean of Q(true token) - P(true token), in 0..1; rms_delta_p
    its root mean square. ppl, ppl_exact: perplexities under Q and P; ln_ppl_ratio: ln(ppl / ppl_exact), nats a token;
    correlation: of the two log-losses, position by position (None if one of them never changes).
    """

    text: str
    chunk: int
    positions: int
    kld: Uncertain
    kld_median: float
    kld_99: float
    kld_999: float
    kld_max: float
    reverse_kld: Uncertain
    same_top: Uncertain
    delta_p: Uncertain
    rms_delta_p: Uncertain
    ppl: Uncertain
    ppl_exact: Uncertain
    ln_ppl_ratio: Uncertain
    correlation: float | None

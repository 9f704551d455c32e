"""What is lost token by token, as a table in the words of llama.cpp's ``llama-perplexity --kl-divergence``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from flexgen_bench.accuracy.compare.outcome import ModelOutcome, ModeOutcome
from flexgen_bench.core.digits import SINGLE, fixed, significant
from flexgen_bench.core.token_loss import TokenLoss, Uncertain
from flexgen_bench.report.accuracy.formatting import NOTHING, bits_interval

TITLE = "Loss token by token, as llama.cpp tells it"
HEADERS = (
    "Mode",
    "Bits per weight",
    "Mean KLD",
    "Median",
    "99 %",
    "99.9 %",
    "Maximum",
    "Reverse KLD",
    "Same top p, %",
    "RMS Δp, %",
    "Mean Δp, %",
    "ln(PPL(Q)/PPL(base))",
    "Added bits per byte of tasks (95 %)",
    "Verdict",
)
READING = """\
KLD is KL(base || Q) in nats, reverse KLD is KL(Q || base); Δp is the change in the probability of the true token; all \
as in llama.cpp's `llama-perplexity --kl-divergence`, with its standard errors (±), which take tokens for independent. \
The last two columns are this project's own, over the tasks below."""


def loss_rows(outcome: ModelOutcome) -> list[tuple[str, ...]]:
    """A row for each mode with such a record."""
    return [_row(mode, loss) for mode, loss in _with_loss(outcome)]


def basis(outcome: ModelOutcome) -> str:
    """What the figures were computed on: ``1,530 positions of passages: the second halves of 6 chunks of 512
    tokens``."""
    kinds = {(loss.text, loss.positions, loss.chunk): None for _, loss in _with_loss(outcome)}
    return "; or ".join(
        f"{positions:,} positions of {text}: the second halves of {positions // (chunk - 1 - chunk // 2)} chunks of "
        f"{chunk} tokens"
        for text, positions, chunk in kinds
    )


def loss_values(outcomes: Iterable[ModelOutcome]) -> Iterator[dict[str, object]]:
    """Every figure of every mode, as rows of a CSV file."""
    for outcome in outcomes:
        for mode, loss in _with_loss(outcome):
            row: dict[str, object] = {
                "model": outcome.model,
                "system": outcome.system,
                "dtype": outcome.dtype,
                "mode": mode.mode,
                "what": mode.subject.what,
                "bits_per_weight": _digits(_bits(mode)),
            }
            for name, value in vars(loss).items():
                if isinstance(value, Uncertain):
                    row |= {name: _digits(value.value), f"{name}_error": _digits(value.error)}
                else:
                    row[name] = value if isinstance(value, int | str) else _digits(value)
            yield row


def _with_loss(outcome: ModelOutcome) -> Sequence[tuple[ModeOutcome, TokenLoss]]:
    both = [(mode, mode.numbers.loss) for mode in outcome.modes if mode.numbers is not None]
    return [(mode, loss) for mode, loss in both if loss is not None]


def _row(mode: ModeOutcome, loss: TokenLoss) -> tuple[str, ...]:
    comparison, bits = mode.comparison, _bits(mode)
    return (
        mode.mode,
        NOTHING if bits is None else fixed(bits, 2),
        _pair(loss.kld, 4),
        *(fixed(value, 4) for value in (loss.kld_median, loss.kld_99, loss.kld_999, loss.kld_max)),
        _pair(loss.reverse_kld, 4),
        _percent(loss.same_top),
        _percent(loss.rms_delta_p),
        _percent(loss.delta_p, plus=True),
        _pair(loss.ln_ppl_ratio, 4, plus=True),
        bits_interval(comparison.bits if comparison else None),
        NOTHING if comparison is None or not comparison.tasks else str(comparison.verdict),
    )


def _bits(mode: ModeOutcome) -> float | None:
    """Of a stored weight, scales and what is not compressed included."""
    return None if mode.bytes_per_weight is None else 8 * mode.bytes_per_weight


def _pair(value: Uncertain, decimals: int, *, plus: bool = False) -> str:
    return f"{fixed(value.value, decimals, plus=plus)} ± {fixed(value.error, decimals)}"


def _percent(value: Uncertain, *, plus: bool = False) -> str:
    return _pair(Uncertain(100 * value.value, 100 * value.error), 2, plus=plus)


def _digits(value: float | None) -> str | None:
    return None if value is None else significant(value, SINGLE)

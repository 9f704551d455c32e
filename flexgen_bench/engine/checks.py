"""What a request must be for a model to compute it."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.registry import family as family_named
from flexgen_bench.schedule.prefix_tree import ScoreRequest


def check_prompt(shape: ModelShape, field: str, prompt: Sequence[int], new_tokens: int) -> None:
    """UserError if a prompt is empty, does not fit the model's positions, or holds ids it does not know."""
    if not prompt:
        raise UserError(field, list(prompt), "at least one token long")
    if len(prompt) + new_tokens - 1 > shape.max_positions:
        raise UserError(
            field,
            f"{len(prompt)} tokens, {new_tokens} to generate",
            f"at most {shape.max_positions} positions in all for {shape.name}",
            "Shorten the prompt or lower max_tokens.",
        )
    anew = family_named(shape.family).rotated_anew_beyond(shape)
    if anew is not None and len(prompt) <= anew < len(prompt) + new_tokens - 1:
        raise UserError(
            field,
            f"{len(prompt)} tokens, {new_tokens} to generate",
            f"at most {anew} positions in all, or a prompt longer than that, for {shape.name}",
            "Past this length the model rotates all keys of a sequence anew. Lower max_tokens.",
        )
    bad = [t for t in prompt if not 0 <= t < shape.vocab_size]
    if bad:
        raise UserError(field, bad[:5], f"token ids from 0 to {shape.vocab_size - 1} for {shape.name}")


def check_score_request(shape: ModelShape, field: str, request: ScoreRequest) -> None:
    """UserError if nothing is to be scored, or for what ``check_prompt`` refuses. The last token is not computed, so
    one more than the model has positions is allowed."""
    if not 1 <= request.start < len(request.tokens):
        raise UserError(
            f"{field}.start",
            request.start,
            f"from 1 to below the number of tokens ({len(request.tokens)})",
            "The first token has nothing before it that could predict it.",
        )
    check_prompt(shape, field, request.tokens, 0)
    steady = family_named(shape.family).steady_positions(shape)
    if len(request.tokens) - 1 > steady:
        raise UserError(
            field,
            f"{len(request.tokens)} tokens",
            f"at most {steady + 1} tokens long for {shape.name}",
            "Beyond its original length this model rotates every token by the length of its sequence "
            "(rope_type dynamic or longrope), so what sequences share cannot be computed once.",
        )

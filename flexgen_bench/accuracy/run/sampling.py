"""From a task's generation arguments to sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.sampling_params import SamplingParams

_KNOWN = ("max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "num_beams")


def sampling_of(options: Mapping[str, Any], stop: Sequence[str]) -> SamplingParams:
    """options: lm-eval's, normalised by it and without ``until``. Greedy unless they say ``do_sample``. UserError for
    what is not offered."""
    unknown = [name for name in options if name not in _KNOWN]
    if unknown:
        raise unknown_choice("generation_kwargs", unknown[0], _KNOWN)
    if options.get("num_beams") not in (None, 1):
        raise UserError("generation_kwargs.num_beams", options["num_beams"], "1: there is no beam search")
    sampled = bool(options.get("do_sample"))
    chosen = {name: options[name] for name in ("top_k", "top_p", "seed") if sampled and options.get(name) is not None}
    return SamplingParams(
        max_tokens=options["max_gen_toks"],
        temperature=float(options.get("temperature") or 0.0) if sampled else 0.0,
        repetition_penalty=options.get("repetition_penalty") or 1.0,
        stop=tuple(stop),
        **chosen,
    )

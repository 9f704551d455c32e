"""What the last rank has chosen, as it goes over the network: JSON, which can do no more than be read.

A list of [token] or [token, logprob, [[token, logprob], ...]]. Python writes each float so that the same one is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from flexgen_bench.engine.generation import Chosen
from flexgen_bench.engine.outputs import TokenLogprobs


def encoded(chosen: Sequence[Chosen]) -> bytes:
    """Of a micro-batch."""
    return json.dumps([_row(one) for one in chosen], separators=(",", ":")).encode()


def decoded(payload: bytes) -> list[Chosen]:
    """What was ``encoded``. Raises ValueError or TypeError for anything else."""
    return [_chosen(*row) for row in json.loads(payload)]


def _row(one: Chosen) -> list[object]:
    of_token = one.logprobs
    return [one.token] if of_token is None else [one.token, of_token.logprob, of_token.top]


def _chosen(token: int, logprob: float | None = None, top: Sequence[tuple[int, float]] = ()) -> Chosen:
    if logprob is None:
        return Chosen(int(token))
    return Chosen(int(token), TokenLogprobs(float(logprob), tuple((int(one), float(value)) for one, value in top)))

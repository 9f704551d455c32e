"""What is not finite is reported where it appears, by layer, and not as nonsense tokens later.

Keys and values of every layer, hidden states after the last one, and logits: anything that goes wrong reaches one of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_bench.core.errors import NotFinite
from flexgen_bench.schedule.steps import Step

_HIDDEN, _LOGITS = "hidden states", "logits"
Place = tuple[int, str]  # unit that made it, and what it is


class Watched(NamedTuple):
    """sums (N,) float32, each of one place; of an accelerator, until somebody needs to know."""

    sums: Tensor
    places: list[Place]


class Health:
    """Watches what layers make. In host memory it is judged at once; on an accelerator sums are kept and judged with
    the micro-batch's logits or tokens, so that the device is not waited for."""

    def __init__(self) -> None:
        self._sums: dict[int, list[Watched]] = {}  # by stage

    def watch(self, step: Step, k: Tensor, v: Tensor) -> None:
        """A layer has made these keys and values."""
        self._watch(step, k, (step.unit, "keys"), v, (step.unit, "values"))

    def watch_head(self, step: Step, x: Tensor, logits: Tensor) -> None:
        """The last layer has made these hidden states, of which nobody makes keys, and the head these logits."""
        self._watch(step, x, (step.unit - 1, _HIDDEN), logits, (step.unit, _LOGITS))

    def watch_cache(self, step: Step, sums: Tensor, units: Sequence[int]) -> None:
        """All layers of a pass have put keys and values into the cache: sums (L, 2) of both, for these units."""
        self._keep(step, sums.view(-1), [(u, n) for u in units for n in ("keys", "values")])

    def gather(self, step: Step) -> Watched | None:
        """All that was watched of a micro-batch, whose HEAD this is, and has not been judged; on its lane, which may be
        at the next pass before this one's tokens have come down."""
        watched = self._sums.pop(step.buffer_index, None)
        if not watched:
            return None
        return Watched(torch.cat([one.sums for one in watched]), [place for one in watched for place in one.places])

    def judge(self, watched: Watched | None) -> None:
        """On the host: raise NotFinite if anything was not."""
        if watched is not None:
            _judge(watched.sums.tolist(), watched.places)

    def _watch(self, step: Step, a: Tensor, of_a: Place, b: Tensor, of_b: Place) -> None:
        """A sum is finite only if all of them are (in float32: no overflow)."""
        sums = torch.stack((a.sum(dtype=torch.float32), b.sum(dtype=torch.float32)))
        self._keep(step, sums, [of_a, of_b])

    def _keep(self, step: Step, sums: Tensor, places: list[Place]) -> None:
        """sums (N,) of what is watched; to be judged now, or with the logits."""
        if sums.is_cuda:
            self._sums.setdefault(step.buffer_index, []).append(Watched(sums, places))
        else:
            _judge(sums.tolist(), places)


def _judge(sums: list[float], places: list[Place]) -> None:
    for value, (unit, name) in zip(sums, places, strict=True):
        if value - value != 0:  # infinite or NaN
            raise NotFinite(None if name == _LOGITS else unit - 1, name)

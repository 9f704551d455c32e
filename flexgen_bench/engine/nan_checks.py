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
        self._keep(step, self.sums_of(k, v), [(step.unit, "keys"), (step.unit, "values")])

    def watch_head(self, step: Step, x: Tensor, logits: Tensor) -> None:
        """The last layer has made these hidden states, of which nobody makes keys, and the head these logits."""
        self.watch_sums(step, self.sums_of(x, logits))

    @staticmethod
    def sums_of(x: Tensor, logits: Tensor) -> Tensor:
        """(2,) float32, each finite only if all of them are (in float32: no overflow)."""
        return torch.stack((x.sum(dtype=torch.float32), logits.sum(dtype=torch.float32)))

    def watch_sums(self, step: Step, sums: Tensor) -> None:
        """The same of such sums (2,)."""
        self._keep(step, sums, [(step.unit - 1, _HIDDEN), (step.unit, _LOGITS)])

    def watch_cache(self, step: Step, sums: Tensor, units: Sequence[int]) -> None:
        """All layers of a pass have put keys and values into the cache: sums (L, 2) of both, for these units."""
        self._keep(step, sums.view(-1), [(u, n) for u in units for n in ("keys", "values")])

    def gather(self, step: Step) -> list[Watched]:
        """All that was watched of a micro-batch, whose HEAD this is, and has not been judged; on its lane, which may be
        at the next pass before this one's tokens have come down."""
        return self._sums.pop(step.buffer_index, [])

    @staticmethod
    def judge(sums: Tensor, watched: Sequence[Watched]) -> None:
        """On the host: raise NotFinite if anything was not. sums: of all of them, one after the other."""
        if watched:
            _judge(sums.tolist(), [place for one in watched for place in one.places])

    def _keep(self, step: Step, sums: Tensor, places: list[Place]) -> None:
        """sums (N,) of what is watched; to be judged now, or with the logits."""
        if sums.is_cuda:
            self._sums.setdefault(step.buffer_index, []).append(Watched(sums, places))
        else:
            _judge(sums.tolist(), places)


def _judge(sums: list[float], places: list[Place]) -> None:
    # Infinite or NaN. Layers with caches of one kind are watched before those of another.
    found = [place for value, place in zip(sums, places, strict=True) if value - value != 0]
    if found:
        unit, name = min(found, key=lambda place: place[0])
        raise NotFinite(None if name == _LOGITS else unit - 1, name)

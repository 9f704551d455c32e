"""What is not finite is reported where it appears, by layer, and not as nonsense tokens later.

Keys and values of every layer, hidden states after the last one, and logits: anything that goes wrong reaches one of
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen_bench.core.errors import NotFinite
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.schedule.steps import Step

_HIDDEN, _LOGITS = "hidden states", "logits"
Watched = tuple[int, str]  # unit that made it, and what it is


class Health:
    """Watches what layers make. In host memory it is judged at once; on an accelerator sums are kept and judged with
    the micro-batch's logits, so that the device is not waited for."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._sums: dict[int, list[tuple[Tensor, list[Watched]]]] = {}  # by stage
        self._on_host: dict[int, tuple[Tensor, list[Watched]]] = {}

    def watch(self, step: Step, k: Tensor, v: Tensor) -> None:
        """A layer has made these keys and values."""
        self._watch(step, k, (step.unit, "keys"), v, (step.unit, "values"))

    def watch_head(self, step: Step, x: Tensor, logits: Tensor) -> None:
        """The last layer has made these hidden states, of which nobody makes keys, and the head these logits."""
        self._watch(step, x, (step.unit - 1, _HIDDEN), logits, (step.unit, _LOGITS))

    def watch_cache(self, step: Step, sums: Tensor, units: Sequence[int]) -> None:
        """All layers of a pass have put keys and values into the cache: sums (L, 2) of both, for these units."""
        self._keep(step, sums.view(-1), [(u, n) for u in units for n in ("keys", "values")])

    def move(self, step: Step) -> None:
        """MOVE_LOGITS: what was watched of this micro-batch goes to the host with its logits."""
        watched = self._sums.pop(step.buffer_index, None)
        if watched:
            moved = self._device.to_host(torch.cat([crossing(sums) for sums, _ in watched]))
            self._on_host[step.buffer_index] = (moved, [place for _, places in watched for place in places])

    def judge(self, step: Step) -> None:
        """SAMPLE: raise NotFinite if anything was not."""
        sums, places = self._on_host.pop(step.buffer_index, (None, []))
        if sums is not None:
            _judge(sums.tolist(), places)

    def _watch(self, step: Step, a: Tensor, of_a: Watched, b: Tensor, of_b: Watched) -> None:
        """A sum is finite only if all of them are (in float32: no overflow)."""
        sums = torch.stack((a.sum(dtype=torch.float32), b.sum(dtype=torch.float32)))
        self._keep(step, sums, [of_a, of_b])

    def _keep(self, step: Step, sums: Tensor, places: list[Watched]) -> None:
        """sums (N,) of what is watched; to be judged now, or with the logits."""
        if sums.is_cuda:
            self._sums.setdefault(step.buffer_index, []).append((sums, places))
        else:
            _judge(sums.tolist(), places)


def _judge(sums: list[float], places: list[Watched]) -> None:
    # Infinite or NaN. Layers with caches of one kind are watched before those of another.
    found = [place for value, place in zip(sums, places, strict=True) if value - value != 0]
    if found:
        unit, name = min(found, key=lambda place: place[0])
        raise NotFinite(None if name == _LOGITS else unit - 1, name)

"""Keys and values that are not finite are reported where they appear, by layer, and not as nonsense tokens later."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen_bench.core.errors import NotFinite
from flexgen_bench.engine.device import Device
from flexgen_bench.schedule.steps import Step

_NAMES = ("keys", "values")


class Health:
    """Watches what enters the KV cache. In host memory it is judged at once; on an accelerator sums are kept and
    judged with the micro-batch's logits, so that the device is not waited for."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._sums: dict[int, list[Tensor]] = {}  # by stage
        self._units: dict[int, list[int]] = {}
        self._on_host: dict[int, tuple[Tensor, list[int]]] = {}

    def watch(self, step: Step, k: Tensor, v: Tensor) -> None:
        """A layer has made these keys and values. A sum is finite only if all of them are (in float32: no overflow)."""
        sums = torch.stack((k.sum(dtype=torch.float32), v.sum(dtype=torch.float32)))
        if not sums.is_cuda:
            _judge(sums.tolist(), [step.unit])
            return
        self._sums.setdefault(step.stage, []).append(sums)
        self._units.setdefault(step.stage, []).append(step.unit)

    def move(self, step: Step) -> None:
        """MOVE_LOGITS: what was watched of this micro-batch goes to the host with its logits."""
        sums = self._sums.pop(step.stage, None)
        if sums:
            moved = self._device.to_host(torch.cat(sums))
            self._on_host[step.stage] = (moved, self._units.pop(step.stage))

    def judge(self, step: Step) -> None:
        """SAMPLE: raise NotFinite if anything was not."""
        sums, units = self._on_host.pop(step.stage, (None, []))
        if sums is not None:
            _judge(sums.tolist(), units)


def _judge(sums: list[float], units: list[int]) -> None:
    for place, value in enumerate(sums):
        if value - value != 0:  # infinite or NaN
            raise NotFinite(units[place // 2] - 1, _NAMES[place % 2])

"""A system that generates with a transformers model, however its weights are held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from baselines import hf_generate as hf
from flexgen_bench.systems.contract import Generation, Progress, System


class HFSystem(System):
    """``check`` sets the device, ``load`` the model and the batch size; generation is the same for all."""

    _device: torch.device
    _batch_size: int
    _model: Any = None

    def generate(
        self, prompts: Sequence[Sequence[int]], gen_len: int, progress: Progress
    ) -> Generation:
        return hf.generate_batches(
            self._model,
            prompts,
            gen_len,
            batch_size=self._batch_size,
            device=self._device,
            progress=progress,
        )

    def close(self) -> None:
        self._model = None

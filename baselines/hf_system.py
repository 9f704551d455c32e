"""A system that generates with a transformers model, however its weights are held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from baselines import hf_generate as hf
from baselines.hf_scorer import HFScorer
from flexgen_bench.core.progress import Progress
from flexgen_bench.systems.contract import Generation, System
from flexgen_bench.systems.scorer import Scorer

# Sequences scored or continued at once where nobody says how many: on two cores larger batches score no faster
# (docs/notes/accuracy_scoring.md), on a GPU they do.
SCORED_ON_CPU, SCORED_ON_GPU = 8, 64


class HFSystem(System):
    """``check`` sets the device, ``load`` the model and the batch size; generation is the same for all."""

    _device: torch.device
    _batch_size: int
    _model: Any = None

    def generate(self, prompts: Sequence[Sequence[int]], gen_len: int, progress: Progress) -> Generation:
        return hf.generate_batches(
            self._model, prompts, gen_len, batch_size=self._batch_size, device=self._device, progress=progress
        )

    def scorer(self, batch_size: int | None) -> Scorer:
        usual = SCORED_ON_GPU if self._device.type == "cuda" else SCORED_ON_CPU
        self.load(batch_size or usual)
        return HFScorer(self._model, self._device, self._batch_size, self.files.checkpoint)

    def close(self) -> None:
        self._model = None

"""Layers that go wrong at a chosen step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from flexgen_bench.engine.layers import Layer, Layers
from flexgen_bench.schedule.steps import Step

Projected = tuple[Tensor, Tensor, Tensor]


def poison(
    monkeypatch: pytest.MonkeyPatch, is_wrong: Callable[[Step], bool], change: Callable[[Projected], None]
) -> None:
    """Let ``change`` spoil q, k, v of the steps that ``is_wrong`` says, however their layer is carried out."""
    of, decoding = Layers.of, Layers.decoding

    def poisoned(step: Step, layer: Layer) -> Layer:
        def project(x: Tensor, angles: Any) -> Projected:
            made = layer.project(x, angles)
            change(made)
            return made

        return Layer(project, layer.output) if is_wrong(step) else layer

    def poisoned_of(self: Layers, step: Step) -> Layer:
        return poisoned(step, of(self, step))

    def poisoned_decoding(self: Layers, step: Step, x: Tensor, tables: Any) -> Layer:
        return poisoned(step, decoding(self, step, x, tables))

    monkeypatch.setattr(Layers, "of", poisoned_of)
    monkeypatch.setattr(Layers, "decoding", poisoned_decoding)

"""The two halves of every decoder layer as functions of hidden states alone, their weights in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from flexgen_bench.core.model import ModelShape
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.weights import Weights
from flexgen_bench.kernels import ops
from flexgen_bench.kernels.formula import Traced, trace
from flexgen_bench.models.family import ModelFamily
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.steps import Step

Shapes = Mapping[str, tuple[int, ...]]


class Layer(NamedTuple):
    """project: (x, angles) -> q, k, v; output: (x, attention's output) -> x. Formulas of the family, see
    ``models/family.py``."""

    project: Callable[[Tensor, Any], tuple[Tensor, Tensor, Tensor]]
    output: Callable[[Tensor, Tensor], Tensor]


class Formulas:
    """A family's formulas for a model, each traced once for all layers whose weights have the same shapes, and for all
    jobs."""

    def __init__(self, family: ModelFamily, shape: ModelShape) -> None:
        self.family, self.shape = family, shape
        self._traced: dict[tuple[object, ...], tuple[Traced | None, Traced | None]] = {}

    def layer(self, weights: Mapping[str, Any], lower: bool) -> Layer:
        """Those of a layer with these weights. lower: for a device to which every operator is a launch."""
        lower = lower and all(isinstance(w, Tensor) for w in weights.values())
        shapes = {name: tuple(w.shape) for name, w in weights.items()}
        key = (lower, *shapes.items())
        if key not in self._traced:
            self._traced[key] = (
                self._trace(self.family.project, "angles", shapes, lower),
                self._trace(self.family.output, "attended", shapes, lower),
            )
        project, output = self._traced[key]
        return Layer(
            self._as_it_is(self.family.project, weights) if project is None else project.bind(weights),
            self._as_it_is(self.family.output, weights) if output is None else output.bind(weights),
        )

    def _as_it_is(self, formula: Callable[..., Any], weights: Mapping[str, Any]) -> Any:
        return functools.partial(formula, ops, self.shape, weights)

    def _trace(self, formula: Callable[..., Any], beside: str, shapes: Shapes, lower: bool) -> Traced | None:
        def of_weights(ops: Any, w: Any, *inputs: Any) -> Any:
            return formula(ops, self.shape, w, *inputs)

        return trace(of_weights, shapes, ("x", beside), lower)


class Layers:
    """The layers of a job, made at their first use. A formula that cannot be traced is called as it is."""

    def __init__(self, formulas: Formulas, weights: Weights, job: ScheduledJob, device: Device) -> None:
        self._formulas, self._weights, self._job, self._device = formulas, weights, job, device
        self._bound: dict[tuple[int, int, int], Layer] = {}

    def of(self, step: Step) -> Layer:
        """The layer of a step, with its weights where the step finds them."""
        try:  # a lookup alone: this is asked for every layer and micro-batch
            return self._bound[step.unit, step.weight_buffer, step.dequantized_buffer]
        except KeyError:
            site = self._job.units[step.unit].site
            lower = site.is_accelerator and self._device.launches_kernels
            layer = self._formulas.layer(self._weights.of(step), lower)
            self._bound[step.unit, step.weight_buffer, step.dequantized_buffer] = layer
            return layer

    def clear(self) -> None:
        """Let go of the weights."""
        self._bound.clear()

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
from flexgen_bench.models import formulas
from flexgen_bench.models.family import ModelFamily
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.steps import Step

Shapes = Mapping[str, tuple[int, ...]]


class Layer(NamedTuple):
    """project: (x, tables of angles) -> q, k, v; output: (x, attention's output) -> x. See ``models/formulas.py``.

    is_fixed: which operators they are does not depend on values.
    """

    project: Callable[[Tensor, Any], tuple[Tensor, Tensor, Tensor]]
    output: Callable[[Tensor, Tensor], Tensor]
    is_fixed: bool = True


class Formulas:
    """The formulas of a model, each traced once for all layers that are made of the same parts and whose weights have
    the same shapes, and for all jobs."""

    def __init__(self, family: ModelFamily, shape: ModelShape) -> None:
        self.decoder, self.shape = family.decoder(shape), shape
        self._traced: dict[tuple[object, ...], tuple[Traced | None, Traced | None]] = {}

    def layer(self, number: int, weights: Mapping[str, Any], lower: bool) -> Layer:
        """Those of the ``number``-th layer, from 0, with these weights. lower: for a device to which every operator is
        a launch."""
        lower = lower and all(isinstance(w, Tensor) for w in weights.values())
        shapes = {name: tuple(w.shape) for name, w in weights.items()}
        layer = self.decoder.layers[number]
        key = (lower, layer, *shapes.items())

        def project(ops: Any, w: Any, x: Any, tables: Any) -> Any:
            return formulas.project(ops, self.decoder, layer, w, x, tables)

        def output(ops: Any, w: Any, x: Any, attended: Any) -> Any:
            return formulas.output(ops, layer, w, x, attended)

        if key not in self._traced:
            self._traced[key] = (
                trace(project, shapes, ("x", "tables"), lower),
                trace(output, shapes, ("x", "attended"), lower),
            )
        traced_project, traced_output = self._traced[key]
        is_fixed = traced_project is not None and traced_output is not None
        return Layer(_bound(project, traced_project, weights), _bound(output, traced_output, weights), is_fixed)


def _bound(formula: Callable[..., Any], traced: Traced | None, weights: Mapping[str, Any]) -> Any:
    """A formula with its weights: as it was traced, or as it is."""
    return functools.partial(formula, ops, weights) if traced is None else traced.bind(weights)


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
            layer = self._formulas.layer(step.unit - 1, self._weights.of(step), lower)
            self._bound[step.unit, step.weight_buffer, step.dequantized_buffer] = layer
            return layer

    def clear(self) -> None:
        """Let go of the weights."""
        self._bound.clear()

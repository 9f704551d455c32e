"""The two halves of every decoder layer as functions of hidden states alone, their weights in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from flexgen_bench.core.model import ModelShape
from flexgen_bench.engine.decode_programs import DecodePrograms
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.weights import Weights
from flexgen_bench.kernels import ops
from flexgen_bench.kernels.formula import Formula, Traced, trace
from flexgen_bench.models import formulas, parts
from flexgen_bench.models.family import ModelFamily
from flexgen_bench.models.parts import Decoder, Experts
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.steps import Step

Shapes = Mapping[str, tuple[int, ...]]


class Layer(NamedTuple):
    """project: (x, tables of angles) -> q, k, v; output: (x, attention's output) -> x, or what ``formulas.routed``
    makes, where experts are placed apart. See ``models/formulas.py``.

    is_fixed: which operators they are does not depend on values.
    """

    project: Callable[[Tensor, Any], tuple[Tensor, Tensor, Tensor]]
    output: Callable[[Tensor, Tensor], Any]
    is_fixed: bool = True


class LayerSlice(NamedTuple):
    """Of a layer that several ranks share, what follows this rank's heads; each function makes its part of a sum.

    output: (x, attention's output) -> part; mlp: (x, sum behind the attention) -> x, part; add: (x, last sum) -> x.
    """

    output: Callable[[Tensor, Tensor], Tensor]
    mlp: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    add: Callable[[Tensor, Tensor], Tensor]


class Formulas:
    """The formulas of a model, each traced once for all layers that are made of the same parts and whose weights have
    the same shapes, and for all jobs. decoder: of a slice; None: that of the shape."""

    def __init__(self, family: ModelFamily, shape: ModelShape, decoder: Decoder | None = None) -> None:
        self.decoder, self.shape = decoder or family.decoder(shape), shape
        kinds = {layer: number for number, layer in enumerate(self.decoder.kinds)}
        self._kinds = [kinds[layer] for layer in self.decoder.layers]  # looked up: a layer takes a while to hash
        self._traced: dict[tuple[object, ...], Traced | None] = {}

    def layer(self, number: int, weights: Mapping[str, Any], lower: bool) -> Layer:
        """Those of the ``number``-th layer, from 0, with these weights. lower: for a device to which every operator is
        a launch."""
        lower = lower and all(isinstance(w, Tensor) for w in weights.values())
        layer = self.decoder.layers[number]
        mixture = isinstance(layer.mlp, Experts)
        dense, of_experts = formulas.apart(weights) if mixture else (weights, [])

        def project(ops: Any, w: Any, x: Any, tables: Any) -> Any:
            return formulas.project(ops, self.decoder, layer, w, x, tables)

        def output(ops: Any, w: Any, x: Any, attended: Any) -> Any:
            return formulas.output(ops, layer, w, x, attended)

        bind = functools.partial(self._bound, (lower, self._kinds[number]))
        [projected] = bind(project, [dense], ("x", "tables"))
        if isinstance(layer.mlp, Experts):
            return Layer(projected, self._mixture(bind, layer, layer.mlp, dense, of_experts), is_fixed=False)
        [made] = bind(output, [dense], ("x", "attended"))
        is_called = [made.func is formula for made, formula in ((projected, project), (made, output))]
        return Layer(projected, made, not any(is_called))

    def slice(self, number: int, weights: Mapping[str, Any], lower: bool) -> LayerSlice:
        """The ``number``-th layer, from 0, of which these weights are a slice."""
        lower = lower and all(isinstance(w, Tensor) for w in weights.values())
        layer = self.decoder.layers[number]

        def slice_output(ops: Any, w: Any, x: Any, attended: Any) -> Any:
            out = formulas.attention_out(ops, w, attended)
            if layer.sums > 1:
                return out
            return out + formulas.made(ops, layer, w, formulas.mlp_input(ops, layer, w, x))

        def slice_mlp(ops: Any, w: Any, x: Any, out: Any) -> Any:
            state = formulas.after_output(ops, layer, w, x, out)
            return state[0], formulas.made(ops, layer, w, state[1])

        def slice_add(ops: Any, w: Any, x: Any, out: Any) -> Any:
            return formulas.after_mlp(ops, layer, w, x, out)

        inputs = ((slice_output, ("x", "attended")), (slice_mlp, ("x", "out")), (slice_add, ("x", "out")))
        if isinstance(layer.mlp, Experts):  # what is called depends on what is chosen
            return LayerSlice(*(functools.partial(formula, ops, weights) for formula, _ in inputs))
        bind = functools.partial(self._bound, (lower, self._kinds[number]))
        return LayerSlice(*(bind(formula, [weights], names)[0] for formula, names in inputs))

    def experts(self, number: int, weights: Mapping[str, Any], lower: bool) -> list[Callable[[Tensor], Tensor]]:
        """Those of the ``number``-th layer: each (N, hidden) -> (N, hidden)."""
        lower = lower and all(isinstance(w, Tensor) for w in weights.values())
        layer = self.decoder.layers[number]
        part = layer.mlp
        assert isinstance(part, Experts), "a dense layer has no experts"
        bind = functools.partial(self._bound, (lower, self._kinds[number]))
        return self._each(bind, part, formulas.apart(weights)[1])

    def _mixture(
        self,
        bind: Callable[..., list[Any]],
        layer: parts.Layer,
        part: Experts,
        dense: Mapping[str, Any],
        of_experts: Sequence[Mapping[str, Any]],
    ) -> Callable[[Tensor, Tensor], Any]:
        """What follows the attention, in pieces that can be traced; without experts, up to them."""

        def routed(ops: Any, w: Any, x: Any, attended: Any) -> Any:
            return formulas.routed(ops, layer, w, x, attended)

        def after(ops: Any, w: Any, *given: Any) -> Any:
            return formulas.after_mlp(ops, layer, w, *given)

        route: Callable[[Tensor, Tensor], Any]
        [route] = bind(routed, [dense], ("x", "attended"))
        if not of_experts:
            return route
        [join] = bind(after, [dense], ("x", "out", "shared") if part.shared else ("x", "out"))
        return Mixture(route, self._each(bind, part, of_experts), join)

    def _each(
        self, bind: Callable[..., list[Any]], part: Experts, of_experts: Sequence[Mapping[str, Any]]
    ) -> list[Callable[[Tensor], Tensor]]:
        def expert(ops: Any, w: Any, x: Any) -> Any:
            return formulas.mlp(ops, part.expert, w, x)

        return bind(expert, of_experts, ("x",))

    def _bound(
        self, of: tuple[object, ...], formula: Formula, weights: Sequence[Mapping[str, Any]], inputs: tuple[str, ...]
    ) -> list[Any]:
        """A formula with each of these weights, all of the same shapes: as it was traced, or as it is."""
        shapes = {name: tuple(w.shape) for name, w in weights[0].items()}
        key = (formula.__name__, *of, *shapes.items())
        if key not in self._traced:
            self._traced[key] = trace(formula, shapes, inputs, bool(of[0]))
        traced = self._traced[key]
        return [functools.partial(formula, ops, w) if traced is None else traced.bind(w) for w in weights]


class Mixture:
    """What follows the attention in a layer with experts: (x, attention's output) -> x. Nothing can be traced through
    it, since what is called depends on what was chosen."""

    def __init__(
        self,
        routed: Callable[[Tensor, Tensor], Any],
        experts: Sequence[Callable[[Tensor], Tensor]],
        after: Callable[..., Tensor],
    ) -> None:
        self._routed, self._experts, self._after = routed, experts, after

    def __call__(self, x: Tensor, attended: Tensor) -> Tensor:
        x, read, chosen, shares, *shared = self._routed(x, attended)
        return self._after(x, ops.through_experts(read, chosen, shares, self._experts), *shared)


class Layers:
    """The layers of a job, made at their first use. A formula that cannot be traced is called as it is. most_rows: of a
    micro-batch that decodes."""

    def __init__(self, formulas: Formulas, weights: Weights, job: ScheduledJob, device: Device, most_rows: int) -> None:
        self._formulas, self._weights, self._job, self._device = formulas, weights, job, device
        self._bound: dict[tuple[int, int, int], Layer] = {}
        self._experts: dict[tuple[int, int], list[Callable[[Tensor], Tensor]]] = {}
        self._slices: dict[tuple[int, int, int], LayerSlice] = {}
        self._recorded: dict[tuple[int, int, int, int], Layer] = {}  # and for so many rows
        self._programs = DecodePrograms(formulas.decoder, most_rows)

    def of(self, step: Step) -> Layer:
        """The layer of a step, with its weights where the step finds them."""
        try:  # a lookup alone: this is asked for every layer and micro-batch
            return self._bound[step.unit, step.weight_buffer, step.dequantized_buffer]
        except KeyError:
            layer = self._formulas.layer(step.unit - 1, self._weights.of(step), self._lower(step))
            self._bound[step.unit, step.weight_buffer, step.dequantized_buffer] = layer
            return layer

    def slice_of(self, step: Step) -> LayerSlice:
        """What this rank has of a step's layer, with its weights where the step finds them."""
        key = step.unit, step.weight_buffer, step.dequantized_buffer
        if key not in self._slices:
            self._slices[key] = self._formulas.slice(step.unit - 1, self._weights.of(step), self._lower(step))
        return self._slices[key]

    def experts_of(self, step: Step) -> list[Callable[[Tensor], Tensor]]:
        """The experts of a step's unit, each in its place, whether it has been loaded or not."""
        key = step.unit, step.weight_buffer
        if key not in self._experts:
            layer = self._job.units[step.unit].companion
            self._experts[key] = self._formulas.experts(layer - 1, self._weights.of(step), self._lower(step))
        return self._experts[key]

    def _lower(self, step: Step) -> bool:
        return self._job.units[step.unit].site.is_accelerator and self._device.launches_kernels

    def decoding(self, step: Step, x: Tensor, tables: Any) -> Layer:
        """The layer of a LAYER step of these hidden states (N, hidden). What it makes of them to project is gone with
        the next step of its lane."""
        key = (step.unit, step.weight_buffer, step.dequantized_buffer, x.shape[0])
        try:
            return self._recorded[key]
        except KeyError:
            layer = self.of(step)
            if not self._job.units[step.unit].site.is_accelerator:
                both = (layer.project, layer.output)
                layer = Layer(*self._programs.layer(step.unit - 1, self._weights.of(step), x, tables, *both))
            self._recorded[key] = layer
            return layer

    def clear(self) -> None:
        """Let go of the weights."""
        self._bound.clear()
        self._slices.clear()
        self._experts.clear()
        self._recorded.clear()

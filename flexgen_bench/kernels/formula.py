"""A family's formula as one flat function: traced once, with torch.fx, and then called for every layer and micro-batch.

A formula looks up its weights by name, its options in a mapping, and calls functions that call functions; beside a
small product on an accelerator that costs more than the work does. What is left of it after tracing is a list of
operators. For an accelerator these are also joined where torch has one for several (``lower``).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flexgen_bench.kernels import ops

Formula = Callable[..., Any]  # (ops, weights by name, *inputs) -> what it makes
# How a weight is handed to a traced formula: as it is, or transposed.
Handed = Mapping[str, bool]


@dataclass(frozen=True)
class Traced:
    """A flat function of the weights and then the inputs. handed: names of the weights in this order, and whether each
    is transposed."""

    function: Callable[..., Any]
    handed: Handed

    def bind(self, weights: Mapping[str, Any]) -> Callable[..., Any]:
        """The function of the inputs alone."""
        given = [weights[name].t() if transposed else weights[name] for name, transposed in self.handed.items()]
        return functools.partial(self.function, None, *given)


def trace(formula: Formula, shapes: Mapping[str, Sequence[int]], inputs: Sequence[str], lower: bool) -> Traced | None:
    """A formula with weights of these shapes. None if it looks at values of its inputs: then it can only be called as
    it is.

    lower: all weights are plain tensors, on a device to which every operator is a launch.
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    names = {name: f"w_{name.replace('.', '_')}" for name in shapes}
    weights = {name: fx.Proxy(graph.placeholder(own), tracer) for name, own in names.items()}
    given = [fx.Proxy(graph.placeholder(name), tracer) for name in inputs]
    try:
        made = formula(_Recorder(tracer), weights, *given)
        graph.output(fx.node.map_aggregate(made, lambda a: a.node if isinstance(a, fx.Proxy) else a))
    except (
        Exception
    ):  # of any type: whatever the formula does with a value; called as it is, it raises what it has to say
        return None
    handed = dict.fromkeys(shapes, False)
    if lower:
        places = {weights[name].node: name for name in shapes}
        _Lowering(graph, places, shapes, handed).run()
    graph.lint()
    module = fx.GraphModule({}, graph)
    return Traced(type(module).forward, handed)


_ROW_BY_ROW = (
    ops.linear,
    ops.layer_norm,
    ops.rms_norm,
    torch.layer_norm,
    torch.rms_norm,
    torch.addmm,
    torch.mm,
    "addmm_",
    torch._addmm_activation,
)


class _Recorder:
    """``kernels.ops`` while a formula is traced: its functions are written down, not carried out."""

    def __init__(self, tracer: fx.proxy.TracerBase) -> None:
        self._tracer = tracer

    def __getattr__(self, name: str) -> Any:
        function = getattr(ops, name)

        def write_down(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(a, fx.Proxy) for a in (*args, *kwargs.values())):
                return function(*args, **kwargs)  # of what is known now
            return self._tracer.create_proxy("call_function", function, args, kwargs)

        return write_down if callable(function) else function


class _Lowering:
    """Rewrites a graph so that an accelerator is given fewer and larger operators. The same sums, rounded in fewer
    places."""

    def __init__(
        self,
        graph: fx.Graph,
        places: Mapping[fx.Node, str],
        shapes: Mapping[str, Sequence[int]],
        handed: dict[str, bool],
    ) -> None:
        self._graph, self._places, self._shapes, self._handed = graph, places, shapes, handed

    def run(self) -> None:
        rules = (self._residual, self._activated, self._product, self._norm, self._activation, self._split)
        for rule in rules:
            for node in list(self._graph.nodes):
                with self._graph.inserting_before(node):
                    made = rule(node)
                if made is not None:
                    node.replace_all_uses_with(made)
                    self._graph.erase_node(node)
                    self._graph.eliminate_dead_code()

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._graph.call_function(function, args, kwargs)

    def _linear(self, node: Any) -> tuple[Any, fx.Node, Any] | None:
        """(x, weight, bias) of a product that nobody else wants."""
        only = _calls(node, ops.linear) and len(node.users) == 1
        return _product_of(node) if only else None

    def _transposed(self, weight: fx.Node) -> fx.Node:
        self._handed[self._places[weight]] = True
        return weight

    def _residual(self, node: fx.Node) -> fx.Node | None:
        """r + x W^T + b: the product adds itself to what is there."""
        if not _calls(node, operator.add):
            return None
        args: Any = node.args
        for product, other in (args[::-1], args):
            operands = self._linear(product)
            if operands is None or not self._is_rows(other):
                continue
            x, weight, bias = operands
            if bias is None and not self._is_spent(other, node):
                return self._call(torch.addmm, other, x, self._transposed(weight))
            into = other if bias is None else self._call(torch.add, other, bias)
            return self._graph.call_method("addmm_", (into, x, self._transposed(weight)))
        return None

    def _is_rows(self, value: Any) -> bool:
        """Whether a value is known to have a row for each of the inputs', as a product has: an input, or what is made
        of one row by row."""
        if not isinstance(value, fx.Node) or value in self._places:
            return False
        if value.op == "placeholder":
            return True
        if value.target in (operator.add, operator.mul, torch.add):
            return any(self._is_rows(a) for a in value.args[:2])
        return value.target in _ROW_BY_ROW

    def _is_spent(self, value: fx.Node, by: fx.Node) -> bool:
        """Whether a sum that was made here is not looked at after ``by``: then it may be written to, which saves
        copying it."""
        sums = (torch.addmm, "addmm_", operator.add)
        others = [user for user in value.users if user is not by]
        # Methods may make views, which would be written to as well.
        return value.target in sums and all(u < by and u.op == "call_function" for u in others)

    def _activated(self, node: fx.Node) -> fx.Node | None:
        """relu(x W^T + b): what cuBLASLt does in a product's epilogue."""
        if not _calls(node, ops.activation) or node.args[0] != "relu":
            return None
        operands = self._linear(node.args[1])
        if operands is None or operands[2] is None:
            return None
        x, weight, bias = operands
        return self._call(torch._addmm_activation, bias, x, self._transposed(weight))

    def _product(self, node: fx.Node) -> fx.Node | None:
        if not _calls(node, ops.linear):
            return None
        x, weight, bias = _product_of(node)
        if bias is None:
            return self._call(torch.mm, x, self._transposed(weight))
        return self._call(torch.addmm, bias, x, self._transposed(weight))

    def _norm(self, node: fx.Node) -> fx.Node | None:
        args: Any = node.args
        for known, direct in ((ops.layer_norm, torch.layer_norm), (ops.rms_norm, torch.rms_norm)):
            if _calls(node, known) and not node.kwargs and args[1] in self._places:
                width = tuple(self._shapes[self._places[args[1]]])
                return self._call(direct, args[0], width, *args[1:])
        return None

    def _activation(self, node: fx.Node) -> fx.Node | None:
        if not _calls(node, ops.activation):
            return None
        args: Any = node.args
        return self._call(ops.activation_function(args[0]), args[1])

    def _split(self, node: fx.Node) -> fx.Node | None:
        """The method that ``Tensor.split`` calls after a look at its arguments."""
        if (node.op, node.target) != ("call_method", "split") or not isinstance(node.args[1], tuple):
            return None
        return self._graph.call_method("split_with_sizes", node.args, node.kwargs)


def _calls(node: Any, function: Callable[..., Any]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is function


def _product_of(node: Any) -> tuple[Any, fx.Node, Any]:
    """(x, weight, bias) of a call of ``ops.linear``."""
    given = dict(zip(("x", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return given["x"], given["weight"], given.get("bias")

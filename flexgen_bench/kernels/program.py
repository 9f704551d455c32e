"""A formula as native calls that follow each other, for few rows on the processor.

Between two small products Python and torch take as long as a product does. So a formula is carried out once on buffers
of its own, with operators that write down the native call instead of making it; after that, one call from Python makes
all of them. A formula that needs anything else cannot be recorded. Weights are not copied: a program is for these
weights, where they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flexgen_bench.kernels.narrow_linear import is_fast_here, product
from flexgen_bench.kernels.native import matrices, row_jobs
from flexgen_bench.kernels.native.build import library

MOST_ROWS = 64  # with more, products take so long that it does not matter who calls them
_LIBRARIES = {"linear": "linear", "norm": "norms", "elements": "elements", "rotation": "elements"}


class NotRecordable(Exception):
    """The formula does something that is no native call."""


class Buffers:
    """Memory for what formulas make, shared by programs of which one runs at a time: what one of them leaves is gone
    when the next is called."""

    def __init__(self, rows: int) -> None:
        self.rows = min(rows, MOST_ROWS)  # at most
        self._made: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}

    def get(self, number: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The number-th buffer of a program, (N, ...)."""
        rows, *rest = shape
        assert rows <= self.rows, (rows, self.rows)
        key = (number, tuple(rest), dtype)
        if key not in self._made:
            self._made[key] = torch.zeros(self.rows, *rest, dtype=dtype)
        return self._made[key][:rows]


class _Call(ctypes.Structure):
    """``Call`` of native/program.cpp."""

    _fields_ = (("function", ctypes.c_void_p), ("job", ctypes.c_void_p))


class Program:
    """inputs: buffers to fill before ``run``; outputs: where it leaves what it makes, in the form the formula has."""

    def __init__(self, calls: Sequence[tuple[int, ctypes.Structure]], inputs: Any, outputs: Any, kept: object) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._jobs, self._kept = [job for _, job in calls], kept
        self._calls = (_Call * len(calls))(*(_Call(function, ctypes.addressof(job)) for function, job in calls))
        native = library("program")
        assert native is not None
        native.run.argtypes, native.run.restype = [ctypes.c_void_p, ctypes.c_int64], None
        self._run, self._count = native.run, len(calls)

    def run(self) -> None:
        self._run(self._calls, self._count)


def record(
    formula: Callable[..., Any], weights: Mapping[str, Any], inputs: Sequence[Any], buffers: Buffers, first: int = 0
) -> tuple[Program, int] | None:
    """formula(ops, weights, *inputs) as a program, and the number of the next free buffer. inputs: tensors of the
    shapes to come, or tuples of them. first: number of the first buffer that may be written to. None: it cannot be
    recorded."""
    functions = _functions()
    if functions is None:
        return None
    recorder = _Recorder(buffers, first, functions)
    try:
        own = pytree.tree_map(lambda t: recorder.new(t.shape, t.dtype) if isinstance(t, Tensor) else t, tuple(inputs))
        outputs = pytree.tree_map(_plain, formula(recorder, weights, *own))
    except NotRecordable:
        return None
    return Program(recorder.calls, pytree.tree_map(_plain, own), outputs, (weights, buffers)), recorder.number


_OPERATORS = {"add": "add", "__add__": "add", "mul": "multiply", "__mul__": "multiply"}


class _Placed(Tensor):
    """A buffer or a view of one. Sums and products are written down, views are views; whatever else would compute with
    its values is not recordable."""

    recorder: _Recorder

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        given = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        recorder = next(a.__dict__["recorder"] for a in given if isinstance(a, _Placed))
        if name in _OPERATORS and len(args) == 2 and not kwargs:
            return getattr(recorder, _OPERATORS[name])(*args)
        if name.endswith("_") and not name.endswith("__"):
            raise NotRecordable(name)
        made = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        places = {_plain(a).untyped_storage().data_ptr() for a in given}
        for out in pytree.tree_leaves(made):
            if isinstance(out, Tensor) and _plain(out).untyped_storage().data_ptr() not in places:
                raise NotRecordable(name)
            if isinstance(out, _Placed):
                out.__dict__["recorder"] = recorder
        return made


def _plain(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, _Placed) else x


class _Recorder:
    """The names of ``kernels.ops`` of which native code exists."""

    def __init__(self, buffers: Buffers, first: int, functions: Mapping[str, int]) -> None:
        self._buffers, self._functions = buffers, functions
        self.number = first
        self.calls: list[tuple[int, ctypes.Structure]] = []

    def __getattr__(self, name: str) -> Any:
        raise NotRecordable(name)

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        made = self._buffers.get(self.number, shape, dtype)
        self.number += 1
        placed = made.as_subclass(_Placed)
        placed.__dict__["recorder"] = self
        return placed

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        x = _rows(x)
        if not is_fast_here(x, weight) or not (bias is None or bias.is_contiguous()):
            raise NotRecordable("linear")
        y = self.new((x.shape[0], weight.shape[0]), x.dtype)
        self._write_down("linear", product(x, weight, bias, _plain(y)))
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, weight, None, eps, row_jobs.RMS)

    def rms_norm_around_one(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, weight, None, eps, row_jobs.RMS_AROUND_ONE)

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return self._norm(x, weight, bias, eps, row_jobs.LAYER)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
        y = self.new(x.shape, x.dtype)
        x, cos, sin = map(_plain, (x, cos, sin))
        if x.stride(2) != 1 or not cos.is_contiguous() or not sin.is_contiguous():
            raise NotRecordable("rotate")
        self._write_down("rotation", row_jobs.rotation(x, cos, sin, _plain(y), interleaved))
        return y

    def activation(self, name: str, x: Tensor) -> Tensor:
        if name not in row_jobs.ACTIVATIONS:
            raise NotRecordable(name)
        return self._elements(x, None, row_jobs.ACTIVATIONS[name])

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._elements(a, b, row_jobs.ADD)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return self._elements(a, b, row_jobs.MULTIPLY)

    def _norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: int) -> Tensor:
        x = _plain(x)
        if x.dim() not in (2, 3) or x.stride(-1) != 1 or not row_jobs.can_norm(x, weight, bias):
            raise NotRecordable("norm")
        y = self.new(x.shape, x.dtype)
        self._write_down("norm", row_jobs.norm(x, weight, bias, _plain(y), eps, kind))
        return y

    def _elements(self, a: Tensor, b: Tensor | None, operation: int) -> Tensor:
        a, b = _rows(a), None if b is None else _rows(b)
        if b is not None and (a.shape, a.dtype) != (b.shape, b.dtype):
            raise NotRecordable("elements")
        y = self.new(a.shape, a.dtype)
        self._write_down("elements", row_jobs.elements(a, b, _plain(y), operation))
        return y

    def _write_down(self, name: str, job: ctypes.Structure) -> None:
        self.calls.append((self._functions[name], job))


def _rows(x: Any) -> Tensor:
    """A plain tensor (N, n) with contiguous rows."""
    x = _plain(x)
    if not isinstance(x, Tensor) or x.dim() != 2 or x.stride(1) != 1 or x.dtype not in matrices.TYPES:
        raise NotRecordable("rows")
    return x


def _functions() -> Mapping[str, int] | None:
    """Addresses of the native functions; None if any of them is missing."""
    found = {}
    for name, where in _LIBRARIES.items():
        native = library(where)
        if native is None:
            return None
        found[name] = ctypes.cast(getattr(native, name), ctypes.c_void_p).value or 0
    return found if library("program") is not None else None

"""Jobs of native/norms.cpp and native/elements.cpp: what they read and write, as these files have it. N rows, H heads,
D head dim.

None of them keeps its tensors alive.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexgen_bench.kernels.native import matrices

RMS, RMS_AROUND_ONE, LAYER = range(3)  # kinds of norms
ADD, MULTIPLY = range(2)  # operations of two tensors, and of one:
ACTIVATIONS = {"relu": 2, "silu": 3, "gelu": 4, "gelu_new": 5, "gelu_pytorch_tanh": 5}


class Norm(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("outer", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("x_outer", ctypes.c_int64),
        ("x_inner", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    )


class Elements(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("a_row", ctypes.c_int64),
        ("b_row", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("operation", ctypes.c_int32),
    )


class Rotation(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("rotated", ctypes.c_int64),
        ("x_row", ctypes.c_int64),
        ("x_head", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("interleaved", ctypes.c_int32),
    )


def can_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> bool:
    """Whether ``norm`` can take these."""
    if x.device.type != "cpu" or x.dtype not in matrices.TYPES or x.shape[-1] == 0:
        return False
    return all(w is None or (w.dtype == x.dtype and w.is_contiguous()) for w in (weight, bias))


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, eps: float, kind: int) -> Norm:
    """x (N, n) or (N, H, n) with contiguous rows -> y without gaps."""
    outer, inner = (x.shape[0], 1) if x.dim() == 2 else x.shape[:2]
    return Norm(
        x.data_ptr(),
        None if weight is None else weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        outer,
        inner,
        x.shape[-1],
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        torch.get_num_threads(),
        eps,
        matrices.TYPES[x.dtype],
        kind,
    )


def elements(a: Tensor, b: Tensor | None, y: Tensor, operation: int) -> Elements:
    """a and b (N, n) with contiguous rows -> y (N, n) without gaps."""
    return Elements(
        a.data_ptr(),
        None if b is None else b.data_ptr(),
        y.data_ptr(),
        a.shape[0],
        a.shape[1],
        a.stride(0),
        0 if b is None else b.stride(0),
        torch.get_num_threads(),
        matrices.TYPES[a.dtype],
        operation,
    )


def rotation(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, interleaved: bool) -> Rotation:
    """x (N, H, D) with contiguous heads, cos and sin (N, 1, R) -> y (N, H, D) without gaps."""
    return Rotation(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        *x.shape,
        cos.shape[-1],
        x.stride(0),
        x.stride(1),
        torch.get_num_threads(),
        matrices.TYPES[x.dtype],
        interleaved,
    )


@functools.cache
def function(native: ctypes.CDLL, name: str) -> Callable[..., Any]:
    """A library's function of one job."""
    found: Callable[..., Any] = getattr(native, name)
    found.argtypes, found.restype = [ctypes.c_void_p], None  # type: ignore[attr-defined]
    return found

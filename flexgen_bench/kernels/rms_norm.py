"""RMSNorm on the processor by native/norms.cpp; torch takes it apart into seven operators, 150 microseconds for one
row."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from flexgen_bench.kernels.native import matrices
from flexgen_bench.kernels.native.build import library


class _Norm(ctypes.Structure):
    """``Norm`` of native/norms.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., n) / rms(x) * weight (n) (Zhang & Sennrich 2019), computed in float32 and rounded once."""
    if not _is_native(x, weight) or (native := library("norms")) is None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    columns = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, columns).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    job = _Norm(
        rows.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        columns,
        torch.get_num_threads(),
        eps,
        matrices.TYPES[x.dtype],
    )
    _declared(native).rms_norm(ctypes.byref(job))
    return y


def _is_native(x: Tensor, weight: Tensor) -> bool:
    usable = x.device.type == "cpu" and x.dtype in matrices.TYPES and x.shape[-1] > 0
    return usable and weight.dtype == x.dtype and weight.is_contiguous()


@functools.cache
def _declared(native: ctypes.CDLL) -> ctypes.CDLL:
    """Argument types, once per library."""
    native.rms_norm.argtypes, native.rms_norm.restype = [ctypes.c_void_p], None
    return native

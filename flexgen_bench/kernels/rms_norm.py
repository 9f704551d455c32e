"""RMSNorm on the processor by native/norms.cpp; torch takes it apart into seven operators, 150 microseconds for one
row."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from flexgen_bench.kernels.native import row_jobs
from flexgen_bench.kernels.native.build import library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., n) / rms(x) * weight (n) (Zhang & Sennrich 2019), computed in float32 and rounded once."""
    if not row_jobs.can_norm(x, weight) or (native := library("norms")) is None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    job = row_jobs.norm(rows, weight, None, y, eps, row_jobs.RMS)
    row_jobs.function(native, "norm")(ctypes.byref(job))
    return y

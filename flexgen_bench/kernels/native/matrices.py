"""What native/numbers.h calls a Matrix: rows of plain or quantized values somewhere in memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flexgen_bench.core.microscaling import Codes, Microscaling

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Matrix(ctypes.Structure):
    """Mirrors the structure of native/numbers.h, field by field. Does not keep the tensors alive."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        ("params_row", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("micro", ctypes.c_int32),
    )


def plain(values: Tensor) -> Matrix:
    """values (rows, columns) with contiguous rows."""
    assert values.stride(1) == 1 or values.shape[1] == 1, values.stride()
    row = values.stride(0) * values.element_size()
    return Matrix(values.data_ptr(), None, row, 0, values.shape[1], TYPES[values.dtype], 0, 8, 0)


def quantized(codes: Tensor, params: Tensor, columns: int, compression: Codes, dtype: torch.dtype) -> Matrix:
    """codes (rows, bytes) and params (rows, groups, 2), of MXFP4 (rows, groups), rows contiguous; ``dtype``: what
    values are rounded to."""
    assert codes.stride(1) == 1 or codes.shape[1] == 1, codes.stride()
    is_micro = isinstance(compression, Microscaling)
    assert params.stride(-1) == 1 or params.shape[-1] == 1, params.stride()
    assert is_micro or params.stride(1) == 2 or params.shape[1] == 1, params.stride()
    return Matrix(
        codes.data_ptr(),
        params.data_ptr(),
        codes.stride(0),
        params.stride(0),
        columns,
        TYPES[dtype],
        compression.bits,
        compression.group_size,
        is_micro,
    )

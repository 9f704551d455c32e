"""llama.cpp's own functions, in the extension module of the ``xllamacpp`` wheel: what ours must agree with."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray


def library() -> ctypes.CDLL:
    """The library with ggml's and llama.cpp's C functions. Skips the test where it is not installed, or keeps them to
    itself."""
    spec = find_spec("xllamacpp.xllamacpp") if find_spec("xllamacpp") else None
    if spec is None or spec.origin is None:
        pytest.skip("xllamacpp is not installed")
    loaded = ctypes.CDLL(spec.origin)
    if not hasattr(loaded, "quantize_q4_K"):
        pytest.skip("this xllamacpp does not export ggml's functions")
    return loaded


def quantized(values: NDArray[np.float32], name: str, row_bytes: int) -> NDArray[np.uint8]:
    """What ggml makes of rows of float32 (rows, columns) in a type such as Q4_K."""
    spelled = f"q{name[1:]}" if name.endswith("_K") else name.lower()
    function: Any = getattr(library(), f"quantize_{spelled}")
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    rows, columns = values.shape
    out = np.zeros((rows, row_bytes), np.uint8)
    written = function(values.ctypes.data, out.ctypes.data, rows, columns, None)
    assert written == out.nbytes
    return out

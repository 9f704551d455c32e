"""llama.cpp's own logits, from the xllamacpp wheel, in a process of its own (see ``llama_cpp``)."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray


class _Params(ctypes.Structure):
    """More room than llama.cpp's parameters take. Of a context's the first three are its tokens, and those of a
    batch."""

    _fields_ = (("room", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    """llama_batch of llama.h."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def llama_logits(file: Path, tokens: Sequence[int]) -> NDArray[np.float32]:
    """After each of T tokens, (T, V). Skips the test where llama.cpp is not installed."""
    if find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not here to compare with (pip install xllamacpp)")
    out = file.with_suffix(".npy")
    query = json.dumps([str(file), str(out), list(tokens)])
    answer = subprocess.run(
        [sys.executable, __file__], input=query.encode(), capture_output=True, check=False, timeout=300
    )
    assert answer.returncode == 0, answer.stderr.decode(errors="replace")[-2000:]
    return np.asarray(np.load(out))


def main() -> None:
    file, out, tokens = json.loads(sys.stdin.read())
    spec = find_spec("xllamacpp.xllamacpp")
    assert spec is not None
    library: Any = ctypes.CDLL(spec.origin)
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", _Params, []),
        ("llama_context_default_params", _Params, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Params]),
        ("llama_init_from_model", pointer, [pointer, _Params]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_batch_init", _Batch, [number] * 3),
        ("llama_decode", number, [pointer, _Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_set_n_threads", None, [pointer, number, number]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    model = library.llama_model_load_from_file(file.encode(), library.llama_model_default_params())
    assert model, f"{file} cannot be loaded"
    count, params = len(tokens), library.llama_context_default_params()
    params.room[0:3] = [count] * 3
    context = library.llama_init_from_model(model, params)
    assert context, "no context"
    library.llama_set_n_threads(context, 1, 1)
    batch = library.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert library.llama_decode(context, batch) == 0
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    np.save(out, np.ctypeslib.as_array(library.llama_get_logits(context), shape=(count, size)))


if __name__ == "__main__":
    main()

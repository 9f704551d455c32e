"""llama.cpp's C interface (``llama.h``, ``ggml.h``), out of the library that the ``xllamacpp`` wheel brings.

The wheel's Python interface is a server, which samples token by token through a chain of samplers and answers in JSON.
The library under it exports the C functions that llama.cpp's own programs are made of; those are used here, as
``llama-batched-bench`` uses them (benchmarks/llama_cpp_check.py compares the two).

Structures are those of the version in ``VERSION``. Their defaults are compared when the library is loaded, so that
another version with other structures is refused instead of being given numbers in wrong places.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_void_p,
)
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import CannotRun

MODULE = "xllamacpp"
VERSION = "2026.10.11549"  # whose llama.h the structures below are of
# Of a wheel that knows CUDA (the wheel of the package index computes on processors alone).
CUDA_WHEEL = (
    "pip install --force-reinstall --no-deps xllamacpp --index-url https://xorbitsai.github.io/xllamacpp/whl/cu128"
)
# Sequences that a context can hold (LLAMA_MAX_SEQ, src/llama-cparams.h).
MAX_SEQUENCES = 256
# Room behind a structure: a version that has more in it is refused, not given memory that is not its own.
_ROOM = ("room", c_uint8 * 1024)


class ModelParams(Structure):
    """``llama_model_params``."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        _ROOM,
    )


class ContextParams(Structure):
    """``llama_context_params``."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        _ROOM,
    )


class Rows(Structure):
    """``llama_batch``."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    )


class Counters(Structure):
    """``llama_perf_context_data``."""

    _fields_ = (
        ("t_start_ms", c_double),
        ("t_load_ms", c_double),
        ("t_p_eval_ms", c_double),
        ("t_eval_ms", c_double),
        ("n_p_eval", c_int32),
        ("n_eval", c_int32),
        ("n_reused", c_int32),
    )


# What the two structures hold at first (src/llama-model.cpp, src/llama-context.cpp).
_MODEL_DEFAULTS = {"n_gpu_layers": -1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "flash_attn_type": -1,
    "defrag_thold": -1.0,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "no_perf": True,
    "kv_unified": False,
    "ctx_other": None,
}
_FUNCTIONS: tuple[tuple[str, Any, list[Any]], ...] = (
    ("llama_model_default_params", ModelParams, []),
    ("llama_context_default_params", ContextParams, []),
    ("llama_model_load_from_file", c_void_p, [c_char_p, ModelParams]),
    ("llama_model_free", None, [c_void_p]),
    ("llama_model_size", ctypes.c_uint64, [c_void_p]),
    ("llama_init_from_model", c_void_p, [c_void_p, ContextParams]),
    ("llama_free", None, [c_void_p]),
    ("llama_n_ctx", c_uint32, [c_void_p]),
    ("llama_n_batch", c_uint32, [c_void_p]),
    ("llama_n_ubatch", c_uint32, [c_void_p]),
    ("llama_n_seq_max", c_uint32, [c_void_p]),
    ("llama_set_n_threads", None, [c_void_p, c_int32, c_int32]),
    ("llama_get_memory", c_void_p, [c_void_p]),
    ("llama_memory_clear", None, [c_void_p, c_bool]),
    ("llama_decode", c_int32, [c_void_p, Rows]),
    ("llama_synchronize", None, [c_void_p]),
    ("llama_get_logits", POINTER(c_float), [c_void_p]),
    ("llama_perf_context", Counters, [c_void_p]),
    ("llama_perf_context_reset", None, [c_void_p]),
    ("llama_supports_gpu_offload", c_bool, []),
    ("ggml_quantize_chunk", c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
)
LOG_CALLBACK = CFUNCTYPE(None, c_int, c_char_p, c_void_p)
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
errors: list[str] = []  # what llama.cpp has said at that level


@cache
def library() -> Any:
    """The library, its functions declared; loaded once. Raises CannotRun if it is not there or is another version."""
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise CannotRun(f"not installed: {MODULE}. Install it with: pip install {MODULE}=={VERSION}")
    try:
        loaded = ctypes.CDLL(str(next(Path(spec.origin).parent.glob(f"{MODULE}*.so"))))
    except (OSError, StopIteration) as error:
        again = f"pip install --force-reinstall --no-deps {MODULE}=={VERSION}"
        raise CannotRun(f"the library of {MODULE} cannot be loaded ({error!r}). Install it again: {again}") from error
    try:
        for name, result, arguments in _FUNCTIONS:
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise _other_version(str(error)) from error
    for made, defaults in (
        (loaded.llama_model_default_params(), _MODEL_DEFAULTS),
        (loaded.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        for field, value in defaults.items():
            if getattr(made, field) != value:
                raise _other_version(f"{type(made).__name__}.{field} is {getattr(made, field)!r}, not {value!r}")
    callback = LOG_CALLBACK(_heard)
    vars(loaded)["heard"] = callback  # must outlive the library's use of it
    loaded.llama_log_set(callback, None)
    loaded.llama_backend_init()
    return loaded


def _heard(level: int, text: bytes, _: Any) -> None:
    if level == ERROR_LEVEL:
        errors.append(text.decode(errors="replace").strip())


def last_error() -> str:
    """The last line of what llama.cpp has said was wrong."""
    return errors[-1] if errors else "it does not say why"


def has_cuda() -> bool:
    """Whether this build can put layers on a GPU."""
    return bool(library().llama_supports_gpu_offload())


def _other_version(what: str) -> CannotRun:
    return CannotRun(
        f"the installed {MODULE} has another C interface than version {VERSION} ({what}). "
        f"Install that with: pip install {MODULE}=={VERSION}"
    )

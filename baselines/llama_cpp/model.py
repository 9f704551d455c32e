"""A model in llama.cpp and a context of it: rows of tokens in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from baselines.llama_cpp.library import Rows, errors, last_error, library

BATCH = 2048  # rows of one call, llama.cpp's own choice
Array = np.ndarray[Any, Any]


class Model:
    """A GGUF file, loaded. load_mode: ``llama_load_mode``; gpu_layers: how many layers a GPU holds; the rest is
    computed by the cpu. Raises MemoryError or RuntimeError with llama.cpp's own words."""

    def __init__(self, file: Path, load_mode: int, repack: bool, gpu_layers: int = 0) -> None:
        self._library = library()
        params = self._library.llama_model_default_params()
        params.load_mode, params.use_extra_bufts, params.n_gpu_layers = load_mode, repack, gpu_layers
        errors.clear()
        self.pointer = self._library.llama_model_load_from_file(str(file).encode(), params)
        if not self.pointer:
            raise _failure(f"llama.cpp cannot load {file}: {last_error()}")

    def close(self) -> None:
        if self.pointer:
            self._library.llama_model_free(self.pointer)
        self.pointer = None


class Context:
    """Room for ``sequences`` sequences of ``tokens`` tokens each, every one with a cache of its own."""

    def __init__(
        self,
        model: Model,
        *,
        sequences: int,
        tokens: int,
        vocab: int,
        threads: int,
        ubatch: int = 512,
        kv_type: int = 1,
    ) -> None:
        self._library, self._vocab = library(), vocab
        params = self._library.llama_context_default_params()
        params.n_ctx = sequences * tokens
        params.n_seq_max = sequences
        self._most = params.n_batch = max(BATCH, ubatch)
        params.n_ubatch = ubatch
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = kv_type
        params.no_perf = False
        errors.clear()
        self._pointer = self._library.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise _failure(f"llama.cpp cannot hold {sequences} sequences of {tokens} tokens: {last_error()}")
        room = self._library.llama_n_ctx(self._pointer)
        if self._library.llama_n_seq_max(self._pointer) != sequences or room < sequences * tokens:
            raise RuntimeError(f"llama.cpp has made room for {room} tokens instead of {sequences} times {tokens}")
        self._sequence = np.zeros(self._most, np.int32)
        first = self._sequence.ctypes.data
        self._pointers = first + 4 * np.arange(self._most, dtype=np.uint64)
        self._counts = np.ones(self._most, np.int32)

    def clear(self) -> None:
        """Forget all tokens."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._pointer), False)
        self._library.llama_perf_context_reset(self._pointer)

    def compute(self, tokens: Array, positions: Array, sequences: Array, wanted: Array) -> Array:
        """The most likely next token (N,) of every row that is ``wanted``. All (R,): ids and positions int32, the
        number of each row's sequence int32, wanted int8 of 0 and 1. Raises RuntimeError if the cache has no room."""
        found: list[Array] = []
        for first in range(0, len(tokens), self._most):
            part = slice(first, first + self._most)
            chosen = self._decode(*(np.ascontiguousarray(a[part]) for a in (tokens, positions, sequences, wanted)))
            if chosen is not None:
                found.append(chosen)
        if not found:
            self._library.llama_synchronize(self._pointer)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _decode(self, tokens: Array, positions: Array, sequences: Array, wanted: Array) -> Array | None:
        self._sequence[: len(tokens)] = sequences
        rows = Rows(
            len(tokens),
            tokens.ctypes.data,
            None,
            positions.ctypes.data,
            self._counts.ctypes.data,
            self._pointers.ctypes.data,
            wanted.ctypes.data,
        )
        status = self._library.llama_decode(self._pointer, rows)
        if status:
            raise RuntimeError(f"llama.cpp did not compute {len(tokens)} rows (status {status}): {last_error()}")
        count = int(wanted.sum())
        if not count:
            return None
        logits = self._library.llama_get_logits(self._pointer)  # waits for the computation
        table: Array = np.ctypeslib.as_array(logits, shape=(count, self._vocab)).argmax(axis=1)
        return table

    def own_seconds(self) -> float:
        """By llama.cpp's own counters, since ``clear``. A step of several sequences counts as a prompt there, so only
        the sum of both means something."""
        counters = self._library.llama_perf_context(self._pointer)
        return float(counters.t_p_eval_ms + counters.t_eval_ms) / 1e3

    def close(self) -> None:
        if self._pointer:
            self._library.llama_free(self._pointer)
        self._pointer = None


def _failure(text: str) -> Exception:
    """llama.cpp says in words that memory has run out."""
    is_memory = any(word in line.lower() for line in errors for word in ("alloc", "out of memory"))
    return MemoryError(text) if is_memory else RuntimeError(text)


def rows_of(prompts: Sequence[Sequence[int]]) -> tuple[Array, Array, Array, Array]:
    """The prompts as rows for ``Context.compute``, the last one of each wanted."""
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    sequences = np.repeat(np.arange(len(prompts), dtype=np.int32), lengths)
    wanted = np.zeros(len(tokens), np.int8)
    wanted[np.cumsum(lengths) - 1] = 1
    return tokens, positions, sequences, wanted

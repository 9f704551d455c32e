"""llama.cpp beside this engine: a GGUF file of a Llama shape with random values, and its batched benchmark.

llama.cpp comes with the ``xllamacpp`` wheel, whose library exports the C interface of ``llama.h``. What is run is what
its
``llama-batched-bench`` runs: all prompts in batches, then steps of one token for each sequence, with the wheel's
defaults (repacked weights, flash attention where llama.cpp thinks it helps, no unified cache). Nothing is sampled.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexgen_bench.core.model import ModelShape

# Where fields of llama_context_params lie, in 32-bit words (llama.h); checked against what the context says of itself.
_CONTEXT, _BATCH, _SEQUENCES = 0, 1, 3
_WORDS = 512  # room for the parameter structures, which are only handed on
# Bytes of a block and values in it (ggml-common.h). Scales come first in Q4_0 and Q8_0, last in Q6_K.
_BLOCKS = {"Q4_0": (18, 32), "Q8_0": (34, 32), "Q6_K": (210, 256)}
_SCALE = np.float16(0.002)
TYPES = ("BF16", "F16", "Q8_0", "Q4_0")


def is_here() -> bool:
    """Whether llama.cpp and the writer of its files are installed."""
    return all(importlib.util.find_spec(name) for name in ("xllamacpp", "gguf"))


def write_gguf(shape: ModelShape, kind: str, target: Path) -> Path:
    """A file of this shape with random weights of a type of ``TYPES``; kept, and returned if it is there.

    As ``llama-quantize`` writes them: norms in float32, the head of a Q4_0 file in Q6_K.
    """
    if target.exists():
        return target
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf_writer(target, shape, 1e-5)

    def matrix(name: str, rows: int, columns: int, kind: str) -> None:
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", _random(rng, rows, columns, kind), raw_dtype=raw)

    h, f = shape.hidden_size, shape.ffn_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    matrix("token_embd", shape.vocab_size, h, kind)
    for i in range(shape.num_layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(h, np.float32))
        for name, rows, columns in (
            ("attn_q", queries, h),
            ("attn_k", keys, h),
            ("attn_v", keys, h),
            ("attn_output", h, queries),
            ("ffn_gate", f, h),
            ("ffn_up", f, h),
            ("ffn_down", h, f),
        ):
            matrix(f"blk.{i}.{name}", rows, columns, kind)
    writer.add_tensor("output_norm.weight", np.ones(h, np.float32))
    if not shape.tied_embeddings:
        matrix("output", shape.vocab_size, h, "Q6_K" if kind == "Q4_0" else kind)
    return finish_gguf(writer, target)


def gguf_writer(target: Path, shape: ModelShape, norm_eps: float, **how: Any) -> Any:
    """A writer of a file of Llama's form without a tokenizer, beside where it is to be; ``how``: see the package."""
    import gguf

    target.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(_unfinished(target), "llama", **how)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.ffn_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_layer_norm_rms_eps(norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_tokenizer_model("none")
    return writer


def finish_gguf(writer: Any, target: Path) -> Path:
    """What the writer holds, as the file that it was opened for."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _unfinished(target).rename(target)


def _unfinished(target: Path) -> Path:
    return target.with_suffix(".part")


def _random(rng: np.random.Generator, rows: int, columns: int, kind: str) -> Any:
    """Values of about 0.02, which the time does not depend on, as long as they are ordinary numbers."""
    if kind in _BLOCKS:
        size, values = _BLOCKS[kind]
        raw = rng.integers(0, 256, (rows, columns // values, size), np.uint8)
        scale = np.frombuffer(_SCALE.tobytes(), np.uint8)
        raw[..., -2:] = scale
        if kind != "Q6_K":
            raw[..., :2] = scale
        return raw.reshape(rows, -1)
    values16 = rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)
    if kind == "F16":
        return values16.astype(np.float16)
    return (values16.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


@dataclass(frozen=True)
class Batch:
    """Seconds of a batched run. step_s: of each step of one token per sequence."""

    prefill_s: float
    step_s: tuple[float, ...]

    @property
    def wall_s(self) -> float:
        return self.prefill_s + sum(self.step_s)


class _Params(ctypes.Structure):
    _fields_ = (("words", ctypes.c_int32 * _WORDS),)


class _Tokens(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class LlamaCpp:
    """A model in llama.cpp, for up to ``sequences`` sequences of ``tokens`` tokens each."""

    def __init__(self, file: Path, threads: int, sequences: int, tokens: int) -> None:
        self._library = _library()
        library = self._library
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot read {file}")
        params = library.llama_context_default_params()
        params.words[_CONTEXT] = sequences * max(256, tokens)
        params.words[_SEQUENCES] = sequences
        self._context = library.llama_init_from_model(self._model, params)
        if not self._context or library.llama_n_seq_max(self._context) != sequences:
            raise RuntimeError("llama.cpp's parameters lie elsewhere in this version")
        library.llama_set_n_threads(self._context, threads, threads)
        self._most = min(2048, sequences * max(256, tokens))
        self._batch = library.llama_batch_init(self._most, 0, 1)
        self.run(1, 16, 2)  # warm-up, as its own benchmark does

    def run(self, sequences: int, prompt: int, new: int) -> Batch:
        """``sequences`` prompts of ``prompt`` tokens, then ``new`` - 1 steps: the prefill gives the first new token."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), ctypes.c_bool(False))
        rows = [(s, t, t == prompt - 1) for s in range(sequences) for t in range(prompt)]
        start = time.perf_counter()
        for first in range(0, len(rows), self._most):
            self._decode(rows[first : first + self._most])
        prefill = time.perf_counter() - start
        steps = []
        for position in range(prompt, prompt + new - 1):
            start = time.perf_counter()
            self._decode([(s, position, True) for s in range(sequences)])
            steps.append(time.perf_counter() - start)
        return Batch(prefill, tuple(steps))

    def _decode(self, rows: list[tuple[int, int, bool]]) -> None:
        """Rows are (sequence, position, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (sequence, position, has_logits) in enumerate(rows):
            batch.token[i] = (7 * position + sequence) % 1000 + 5
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = has_logits
        if self._library.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp has no room for these rows")
        self._library.llama_synchronize(self._context)


def _library() -> Any:
    import xllamacpp

    folder = Path(str(xllamacpp.__file__)).parent
    library = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", _Params, []),
        ("llama_context_default_params", _Params, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Params]),
        ("llama_init_from_model", pointer, [pointer, _Params]),
        ("llama_n_seq_max", ctypes.c_uint32, [pointer]),
        ("llama_set_n_threads", None, [pointer, number, number]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_batch_init", _Tokens, [number, number, number]),
        ("llama_decode", number, [pointer, _Tokens]),
        ("llama_synchronize", None, [pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    vars(library)["quiet"] = quiet  # must outlive the library's use of it
    library.llama_log_set(quiet, None)
    return library

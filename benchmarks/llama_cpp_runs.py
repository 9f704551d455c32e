"""llama.cpp beside this engine: GGUF files with random values of any shape, and the runs of its batched benchmark.

The library, the file's header and the context are those of the system (``baselines/llama_cpp``). What is run is what
``llama-batched-bench`` runs: all prompts in batches, then steps of one token for each sequence, with llama.cpp's
defaults (repacked weights, flash attention where it thinks it helps, no unified cache). Nothing is sampled.
``llama_cpp_check.py`` holds these figures against that program itself.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baselines.llama_cpp.formats import BF16, F16, F32, Format, TensorType
from baselines.llama_cpp.gguf_file import add_info, gguf_writer
from baselines.llama_cpp.layout import plan
from baselines.llama_cpp.model import Context, Model
from baselines.llama_cpp.settings import Load, context_tokens
from flexgen_bench.core.model import ModelShape

# Where a block has its scales: at its beginning, or at its end (ggml-common.h).
_FIRST, _LAST = ("Q4_0", "Q8_0", "Q5_0"), ("Q6_K",)
_SCALE = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)


def is_here() -> bool:
    """Whether llama.cpp and the writer of its files are installed."""
    return all(importlib.util.find_spec(name) for name in ("xllamacpp", "gguf"))


def write_random(shape: ModelShape, form: Format, target: Path) -> Path:
    """A file of this shape with random weights; kept, and returned if it is there. (One with the weights of a
    checkpoint: ``baselines/llama_cpp/gguf_file.py``.)"""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    rng, part = np.random.default_rng(0), target.with_suffix(".part")
    writer = gguf_writer(part, shape, form)
    planned = plan(shape, form)
    for tensor in planned:
        add_info(writer, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in planned:
        writer.write_tensor_data(_random(rng, tensor.shape, tensor.type))
    writer.close()
    return part.rename(target)


def _random(rng: np.random.Generator, shape: tuple[int, ...], kind: TensorType) -> Any:
    """Values of about 0.02, which the time does not depend on, as long as they are ordinary numbers; norms of 1."""
    if len(shape) == 1:
        return np.ones(shape, np.float32).view(np.uint8)
    if kind.name in (*_FIRST, *_LAST):
        raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // kind.values, kind.bytes), np.uint8)
        raw[..., -2:] = _SCALE
        if kind.name in _FIRST:
            raw[..., :2] = _SCALE
        return raw.reshape(-1)
    values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    if kind is F32:
        return values.view(np.uint8).reshape(-1)
    if kind is F16:
        return values.astype(np.float16).view(np.uint8).reshape(-1)
    assert kind is BF16, kind
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)


@dataclass(frozen=True)
class Batch:
    """Seconds of a batched run. step_s: of each step of one token per sequence."""

    prefill_s: float
    step_s: tuple[float, ...]

    @property
    def wall_s(self) -> float:
        return self.prefill_s + sum(self.step_s)


class LlamaCpp:
    """A model in llama.cpp, for up to ``sequences`` sequences of ``tokens`` tokens each."""

    def __init__(
        self, file: Path, vocab: int, threads: int, sequences: int, tokens: int, load: Load = Load.RESIDENT
    ) -> None:
        self._model = Model(file, load.mode, repack=True)
        room = context_tokens(tokens)
        self._context = Context(self._model, sequences=sequences, tokens=room, vocab=vocab, threads=threads)
        self.run(1, 16, 2)  # warm-up, as its own benchmark does

    def run(self, sequences: int, prompt: int, new: int) -> Batch:
        """``sequences`` prompts of ``prompt`` tokens, then ``new`` - 1 steps: the prefill gives the first new token."""
        self._context.clear()
        numbers = np.arange(sequences, dtype=np.int32)
        positions = np.tile(np.arange(prompt, dtype=np.int32), sequences)
        each = np.repeat(numbers, prompt)
        wanted = (positions == prompt - 1).astype(np.int8)
        start = time.perf_counter()
        self._context.compute(token_at(positions, each), positions, each, wanted)
        prefill = time.perf_counter() - start
        steps = []
        for position in range(prompt, prompt + new - 1):
            at = np.full(sequences, position, np.int32)
            start = time.perf_counter()
            self._context.compute(token_at(at, numbers), at, numbers, np.ones(sequences, np.int8))
            steps.append(time.perf_counter() - start)
        return Batch(prefill, tuple(steps))

    def close(self) -> None:
        self._context.close()
        self._model.close()


def token_at(positions: Any, sequences: Any) -> Any:
    """Some token of the first thousand."""
    return ((7 * positions + sequences) % 1000 + 5).astype(np.int32)

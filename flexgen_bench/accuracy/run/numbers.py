"""What a mode does to a model's numbers: weights, cache, and next-token distributions on plain text."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from flexgen_bench.accuracy.run.divergence import WINDOW, divergence, keep, loss_of, windows
from flexgen_bench.accuracy.run.kv_error import kv_errors
from flexgen_bench.accuracy.run.options import Request
from flexgen_bench.accuracy.run.token_loss import CHUNK, chunks, first_scored
from flexgen_bench.accuracy.run.weight_error import WeightErrors, rounding_errors, weight_errors
from flexgen_bench.checkpoints.gguf.rounding import Rounded
from flexgen_bench.core.accuracy import LayerError, ModeRecord, Subject
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.model import DType
from flexgen_bench.machine.environment import describe_environment
from flexgen_bench.runner.prompts import read_passages

_TEXT = "passages"
# Of the cache's error, where distributions are not compared.
_KV_TOKENS = 512


def plain_text() -> str:
    """What distributions are compared on: public-domain prose."""
    return "\n\n".join(read_passages())


def text_hash(text: str) -> str:
    """Part of the key of what was computed on a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def loss_text(request: Request) -> str:
    """What loss is measured on token by token: the plain text, or a file of the user's."""
    return plain_text() if request.loss_text is None else request.loss_text.read_text(encoding="utf-8")


class NumbersOf:
    """Compares modes with the uncompressed model, whose distributions it keeps in ``folder``."""

    def __init__(self, request: Request, folder: Path) -> None:
        self._request, self._folder = request, folder
        self._texts: list[list[int]] = []
        self._chunks: list[list[int]] = []
        self._loss_name = _TEXT if request.loss_text is None else request.loss_text.name

    def keep_exact(self, lm: Any) -> None:
        """Remember the uncompressed model's distributions."""
        if self._request.text_tokens:
            self._texts = _cut(lm, self._request.text_tokens)
            keep(lm, self._texts, self._folder / "windows")
        if self._request.loss_tokens:
            self._chunks = _chunks(lm, loss_text(self._request), self._request.loss_tokens)
            length = len(self._chunks[0]) if self._chunks else CHUNK
            keep(lm, self._chunks, self._folder / "chunks", first_scored(length))

    def of(
        self,
        lm: Any,
        subject: Subject,
        lossy: Lossy,
        folder: Path,
        key: str,
        command: str,
        rounded: Rounded | None = None,
    ) -> ModeRecord:
        """One mode. folder: the checkpoint. rounded: what was done to its weights beforehand."""
        begin = _now()
        dtype = DType(subject.dtype)
        weights = self._weights(folder, dtype, lossy.weights) if rounded is None else rounding_errors(rounded)
        kv: tuple[LayerError, ...] = ()
        if lossy.kv_cache is not None:
            texts: Sequence[Sequence[int]] = self._texts or _cut(lm, _KV_TOKENS)
            kv = kv_errors(folder, texts, lossy.kv_cache)
        compared = [divergence(_TEXT, lm, self._texts, self._folder / "windows")] if self._texts else []
        return ModeRecord(
            run_id=f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid4().hex[:8]}",
            key=key,
            subject=subject,
            weight_bytes=weights.bytes,
            weight_values=weights.values,
            weights=weights.tensors,
            grid_error=weights.by_grid,
            kv=kv,
            divergence=compared,
            loss=loss_of(self._loss_name, lm, self._chunks, self._folder / "chunks"),
            started_utc=begin,
            ended_utc=_now(),
            rerun_command=command,
            environment=describe_environment(self._request.cache, self._request.results_dir, dict(os.environ)),
        )

    def _weights(self, folder: Path, dtype: DType, compression: Compression | None) -> WeightErrors:
        """Of an uncompressed mode the sizes alone."""
        from flexgen_bench.accuracy.run.rtn_baseline import round_to_nearest

        return weight_errors(folder, dtype, self._request.cache, compression, round_to_nearest)


def _cut(lm: Any, count: int) -> list[list[int]]:
    """The first tokens of the plain text, in sequences that the model can see at once."""
    return windows(lm.tok_encode(plain_text()), count, min(WINDOW, int(lm.max_length)))


def _chunks(lm: Any, text: str, count: int) -> list[list[int]]:
    """The first tokens of a text, as ``token_loss`` scores them."""
    tokens, bare = lm.tok_encode(text), lm.tok_encode(text, add_special_tokens=False)
    start = tokens[0] if len(tokens) > len(bare) else None
    return chunks(tokens, count, min(CHUNK, int(lm.max_length)), start)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

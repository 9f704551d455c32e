"""Writing a GGUF file with exactly the weights of a checkpoint, one tensor in memory at a time.

Numbers go from the checkpoint's dtype to the file's types by ggml's own quantizer (``ggml_quantize_chunk``), so a file
is what llama.cpp's converter and ``llama-quantize`` make of the same checkpoint, but for the tokenizer: prompts are
ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baselines.llama_cpp.formats import BF16, F16, F32, FILE_TYPES, Format, TensorType
from baselines.llama_cpp.layout import Planned, check_family, plan
from baselines.llama_cpp.library import library
from baselines.llama_cpp.metadata import keys_of, rope_factors
from flexgen_bench.checkpoints.gguf.names import RowOrder
from flexgen_bench.checkpoints.gguf_shape import gguf_shape
from flexgen_bench.checkpoints.prepared import files_fingerprint
from flexgen_bench.checkpoints.source import Source, open_source
from flexgen_bench.core.errors import CannotRun, StoreError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.units import format_bytes
from flexgen_bench.models.activations import activation_of

_stage = logging.getLogger("flexgen_bench.stage")
_VERSION = 1  # part of every file's name; a change of what is written must change it
_PIECE_VALUES = 2**21  # that are in single precision at once, per thread
_FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
Array = np.ndarray[Any, Any]
_YARN_USUAL = (("beta_fast", 32.0), ("beta_slow", 1.0))


def gguf_path(checkpoint: Path, form: Format, cache: Path) -> Path:
    """Where the file of a checkpoint is kept, in a folder of its own: by the files it is made of, and its format."""
    identity = [_VERSION, str(checkpoint.absolute()), files_fingerprint(checkpoint), form.value]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
    return cache / "gguf" / f"{checkpoint.name}-{form}-{digest}" / "model.gguf"


def write_gguf(checkpoint: Path, form: Format, target: Path, threads: int, progress: Progress) -> Path:
    """Write ``target`` unless it is there. progress: of bytes, as ("gguf", done, total).

    Raises CannotRun for a family without a writer or a disk without room, StoreError if what has been written does not
    read as the same model.
    """
    if target.exists():
        return target
    with open_source(checkpoint) as source:
        planned = plan(source.shape, form)
        total = sum(tensor.nbytes for tensor in planned)
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if total > free:
            raise CannotRun(f"{target} would take {format_bytes(total)}, the disk has {format_bytes(free)} left")
        with _replacing(target) as part, ThreadPoolExecutor(threads) as pool:
            writer = gguf_writer(part, source.shape, form)
            for tensor in planned:
                add_info(writer, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            progress("gguf", done, total)
            for tensor in planned:
                writer.write_tensor_data(np.concatenate(list(_encoded(source, tensor, pool.map))))
                done += tensor.nbytes
                progress("gguf", done, total)
            writer.close()
            _check_same_model(part, source.shape)
    return target


def gguf_writer(file: Path, shape: ModelShape, form: Format) -> Any:
    """The ``gguf`` package's writer with all keys of a model, without a tokenizer; tensors are the caller's."""
    import gguf

    architecture = check_family(shape)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(shape.name)
    writer.add_file_type(FILE_TYPES[form])
    for key, value in keys_of(shape, architecture):
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("none")
    return writer


def add_info(writer: Any, tensor: Planned) -> None:
    """Announce a tensor: all of them come before the first one's data."""
    import gguf

    kind = gguf.GGMLQuantizationType(tensor.type.number)
    in_bytes = (*tensor.shape[:-1], tensor.shape[-1] // tensor.type.values * tensor.type.bytes)
    writer.add_tensor_info(tensor.name, in_bytes, np.dtype(np.uint8), tensor.nbytes, raw_dtype=kind)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A file beside the target that takes its name when it is complete; a second process writes one of its own."""
    part = target.with_suffix(f".part{os.getpid()}")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _encoded(source: Source, planned: Planned, each: Callable[..., Iterator[Array]]) -> Iterator[Array]:
    """The bytes of a tensor, piece by piece. each: ``map``, of several threads."""
    if not planned.sources:  # of the model's shape, not of its weights
        yield np.asarray(rope_factors(source.shape), np.float32).view(np.uint8)
        return
    for name in planned.sources:
        rows = _in_file_order(source.tensor(name), planned)
        rows = rows.reshape(-1, rows.shape[-1]) if rows.dim() > 1 else rows[None]
        at_once = max(1, _PIECE_VALUES // rows.shape[1])
        pieces = [rows[first : first + at_once] for first in range(0, len(rows), at_once)]
        yield from each(
            lambda piece: encode(piece.float() + planned.added if planned.added else piece, planned.type), pieces
        )


def _in_file_order(tensor: Tensor, planned: Planned) -> Tensor:
    """ggml rotates neighbours, transformers the two halves of a head."""
    if planned.order is not RowOrder.PAIRS:
        return tensor
    halves = tensor.view(planned.heads, 2, tensor.shape[0] // planned.heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def encode(rows: Tensor, kind: TensorType, added: float = 0.0) -> Array:
    """Rows (N, M) of any float type as bytes of ``kind``, ``added`` to each value. Raises StoreError for values that a
    16-bit type lacks."""
    if added:
        rows = rows.float() + added
    if kind in _FLOATS:
        values = rows.to(_FLOATS[kind]).contiguous()
        if kind is F16 and not values.isfinite().all() and rows.isfinite().all():
            raise StoreError("the checkpoint holds values beyond the largest of f16; use system.options.format=bf16")
        return values.view(torch.uint8).numpy().reshape(-1)
    values = rows.float().contiguous()
    made = np.empty(kind.nbytes(tuple(values.shape)), np.uint8)
    library().ggml_quantize_chunk(kind.number, values.data_ptr(), made.ctypes.data, 0, *values.shape, None)
    return made


def _check_same_model(file: Path, shape: ModelShape) -> None:
    """The file's header, read as any other: what it says is what the checkpoint says."""
    written, wanted = _comparable(gguf_shape(file)), _comparable(shape)
    if written != wanted:
        raise StoreError(f"{file} reads as {written}, the checkpoint is {wanted}")


def _comparable(shape: ModelShape) -> ModelShape:
    """Without what a file says in another way: Mistral's window, which is checked by length (``metadata.py``), so that
    the file is a Llama's; Llama 3.1's scaling, which is stored as its factors; what has its usual value."""
    options = dict(shape.options)
    scaling = {k: v for k, v in (options.get("rope_scaling") or {}).items() if (k, v) not in _YARN_USUAL}
    if scaling.get("rope_type") in ("llama3", "longrope"):
        scaling = {}
    for name in ("window", "full_layers"):
        options.pop(name, None)
    options |= {
        "rope_scaling": scaling,
        "attention_bias": bool(options.get("attention_bias")),
        "mlp_bias": bool(options.get("mlp_bias")),
        "activation": activation_of("activation", options.get("activation", "silu")),
    }
    kind = "llama" if shape.family == "mistral" else shape.family
    return replace(shape, name="", family=kind, options=options, max_positions=1)

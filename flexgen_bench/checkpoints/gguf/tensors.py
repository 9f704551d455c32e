"""The tensors of a GGUF file under the names of transformers, read and dequantized one at a time.

The file is never held, nor is a whole tensor in single precision: rows are read, dequantized and turned into the wanted
dtype a few megabytes at a time. The formulas of the quantized types are those of the ``gguf`` package, the converter's
own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flexgen_bench.checkpoints.gguf.header import GGUFHeader, TensorInfo
from flexgen_bench.checkpoints.gguf.names import RowOrder, Stored, architecture_of
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.model import DType

if TYPE_CHECKING:
    import numpy as np
    import torch

_PIECE_BYTES = 8 * 2**20  # of single precision that are in memory at once
_SHOWN = 5


class GGUFTensors:
    """The tensors of a model. num_heads, num_kv_heads: query and key heads, whose rows some architectures have in
    another order."""

    def __init__(self, header: GGUFHeader, num_heads: int, num_kv_heads: int, dtype: DType) -> None:
        self._header, self._dtype = header, dtype
        self._architecture, self._heads = architecture_of(header), (num_heads, num_kv_heads)

    def _stored(self, name: str) -> Stored:
        return self._architecture.stored(name, *self._heads)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the file's own list with what the model needs: names and shapes of transformers.

        Raises StoreError naming missing tensors, those that the model would not use, wrong shapes, types of
        quantization that cannot be read, and tensors that lie behind the end of the file.
        """
        header = self._header
        needed = self._needed(expected)
        missing = [name for name in needed if name not in header.tensors]
        if missing:
            raise StoreError(
                f"{header.path} lacks {len(missing)} of {len(needed)} tensors: {_some(missing)}. Fetch or convert it "
                "again."
            )
        of_config = self._architecture.of_config
        others = [name for name in header.tensors if name not in needed and name not in of_config]
        if others:
            raise StoreError(
                f"{header.path} holds {len(others)} tensors that a {self._architecture.name} "
                f"model does not have: {_some(others)}. "
                "The model would be computed without them, so it is refused."
            )
        for name, shape in needed.items():
            if header.tensors[name].shape != shape:
                raise StoreError(
                    f"{header.path}: tensor {name} has shape {header.tensors[name].shape}, the model needs {shape}."
                )
        check_readable(header)

    def get(self, name: str) -> torch.Tensor:
        """The tensor that transformers calls ``name``, in the dtype wanted; ``check`` has found it."""
        import torch

        stored = self._stored(name)
        info = self._header.tensors[stored.name]
        shape = info.shape if stored.expert is None else info.shape[1:]
        made = torch.empty(shape, dtype=getattr(torch, self._dtype.value))
        rows = made.view(-1, shape[-1])
        first = len(rows) * (stored.expert or 0)
        start = 0
        for piece in _pieces(info, first, len(rows)):
            values = piece - piece.dtype.type(stored.added) if stored.added else piece
            rows[start : start + len(piece)] = torch.from_numpy(values)
            self._check_range(info, rows[start : start + len(piece)], piece)
            start += len(piece)
        if stored.is_vector:
            return made[None]
        if stored.order is RowOrder.PAIRS:
            return _halves(made, stored.heads)
        return _by_head(made, stored.heads) if stored.order is RowOrder.BY_KIND else made

    def _needed(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the file's tensors that these are in: experts are stacked."""
        needed: dict[str, tuple[int, ...]] = {}
        for one, shape in expected.items():
            stored = self._stored(one)
            if stored.expert is None:
                needed[stored.name] = shape[1:] if stored.is_vector else shape
            else:
                count = max(stored.expert + 1, needed.get(stored.name, (0,))[0])
                needed[stored.name] = (count, *shape)
        return needed

    def _check_range(self, info: TensorInfo, made: torch.Tensor, piece: np.ndarray[Any, Any]) -> None:
        import numpy as np

        if self._dtype is DType.FLOAT16 and not made.isfinite().all() and np.isfinite(piece).all():
            raise StoreError(
                f"{info.file}: tensor {info.name} holds values beyond the largest of float16. "
                "Use dtype=bfloat16 or float32."
            )


def single_precision(info: TensorInfo) -> np.ndarray[Any, Any]:
    """A small tensor as it is, in float32."""
    import numpy as np

    return np.concatenate(list(_pieces(info))).reshape(info.shape)


def check_readable(header: GGUFHeader) -> None:
    """Raise StoreError naming a tensor of a type that cannot be dequantized, or whose bytes are not in the file."""
    sizes = {file: file.stat().st_size for file in {t.file for t in header.tensors.values()}}
    for info in header.tensors.values():
        row_bytes = _row_bytes(info)
        end = info.offset + row_bytes * _num_rows(info)
        if end > sizes[info.file]:
            raise StoreError(
                f"{info.file} is truncated: tensor {info.name} ends at byte {end}, the file at {sizes[info.file]}. "
                "Fetch it again."
            )
    for kind in {t.kind for t in header.tensors.values()}:
        first = next(t for t in header.tensors.values() if t.kind == kind)
        _try_kind(first)


def _pieces(info: TensorInfo, start: int = 0, count: int | None = None) -> Iterator[np.ndarray[Any, Any]]:
    """``count`` rows of a tensor (along its last dimension; None: all) in order, in float32, a few megabytes at a
    time."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    row_bytes, num_rows = _row_bytes(info), _num_rows(info) if count is None else count
    at_once = max(1, _PIECE_BYTES // (4 * info.shape[-1]))
    with info.file.open("rb") as file:
        file.seek(info.offset + start * row_bytes)
        for first in range(0, num_rows, at_once):
            now = min(at_once, num_rows - first)
            raw = np.fromfile(file, dtype=np.uint8, count=now * row_bytes)
            if raw.size != now * row_bytes:
                raise StoreError(f"{info.file} ends inside tensor {info.name}. Fetch it again.")
            # Scales of a damaged file; the engine checks what it computes.
            with np.errstate(over="ignore", invalid="ignore"):
                values = dequantize(raw.reshape(now, row_bytes), GGMLQuantizationType(info.kind))
            yield np.ascontiguousarray(values).reshape(now, info.shape[-1])


def _num_rows(info: TensorInfo) -> int:
    return math.prod(info.shape[:-1])


def _row_bytes(info: TensorInfo) -> int:
    """Bytes of one row. StoreError for a type that is not known, or rows that are not whole blocks of it."""
    sizes = _known_sizes()
    if info.kind not in sizes:
        raise StoreError(
            f"{info.file}: tensor {info.name} is of ggml type {info.kind}, which the installed gguf package does not "
            "know. "
            "Update it (pip install -U gguf), or use a file of another quantization."
        )
    if not info.shape or 0 in info.shape:
        raise StoreError(f"{info.file}: tensor {info.name} has shape {info.shape}.")
    block, block_bytes = sizes[info.kind]
    if info.shape[-1] % block:
        raise StoreError(
            f"{info.file}: tensor {info.name} has rows of {info.shape[-1]} values, which are not blocks of {block}."
        )
    return info.shape[-1] // block * block_bytes


def _try_kind(info: TensorInfo) -> None:
    """Dequantize one block of zeros: the package says which types it can."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    _, block_bytes = _known_sizes()[info.kind]
    kind = GGMLQuantizationType(info.kind)
    try:
        dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
    except NotImplementedError as error:
        raise StoreError(
            f"{info.file}: tensor {info.name} is stored as {kind.name}, which the installed gguf package cannot "
            "dequantize. "
            "Use a file of another quantization (Q4_K_M, Q8_0, F16, ...)."
        ) from error


def _known_sizes() -> dict[int, tuple[int, int]]:
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise StoreError(
            f"reading GGUF files needs one more package: pip install 'flexgen-bench[gguf]' ({error})"
        ) from error
    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def _halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in transformers' order: ggml rotates neighbours, transformers the two halves of a
    head."""
    pairs = rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _by_head(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of queries, keys and values, which ggml has one kind after the other, head by head."""
    kinds = rows.view(3, heads, rows.shape[0] // heads // 3, *rows.shape[1:])
    return kinds.swapaxes(0, 1).reshape(rows.shape)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")

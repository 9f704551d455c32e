"""A checkpoint whose weights are what is left of a model's after quantizing them to a GGUF file type: plain numbers
again, for any system to compute with, so that what the format costs is measured apart from who computes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flexgen_bench.checkpoints.gguf.file_types import BlockType, FileType, Model, tensor_types
from flexgen_bench.checkpoints.gguf.k_quants import SUPER_BLOCK, quantize_blocks
from flexgen_bench.checkpoints.gguf.names import ARCHITECTURES, Architecture, Stored
from flexgen_bench.checkpoints.writer import is_complete, needed_bytes, new_folder, write_weights
from flexgen_bench.core.errors import CannotRun, StoreError, UserError
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.core.model import DType
from flexgen_bench.core.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from flexgen_bench.checkpoints.source import Source

# By the name of transformers, that of the architecture in whose files llama.cpp has the family.
_ARCHITECTURE_OF = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "bloom": "bloom",
}
# Part of the names of folders that are made here; a change of what is written must change it.
ROUNDING_VERSION = 1
_SUMMARY = "rounding.json"
# Of single precision, that are worked on at once.
_PIECE_BYTES = 8 * 2**20
_WEIGHT_FILES = (".safetensors", ".bin", ".index.json")


@dataclass(frozen=True)
class RoundedTensor:
    """A tensor of the model. name: ggml's. type: of its numbers in such a file. bytes: it has there. error: of the
    change, relative (Frobenius norms)."""

    name: str
    type: str
    values: int
    bytes: int
    error: float


@dataclass(frozen=True)
class Rounded:
    """folder: the checkpoint."""

    folder: Path
    tensors: tuple[RoundedTensor, ...]


def check_format(folder: Path, file_type: FileType, dtype: DType) -> None:
    """Raises UserError if the checkpoint in ``folder`` cannot be had in this format: its family is none that llama.cpp
    has files of (as far as is known here), or a matrix cannot be cut into blocks; CannotRun if the ``gguf`` package is
    missing, or too old for one of the types."""
    from flexgen_bench.checkpoints.hf_config import expected_tensors, hf_config
    from flexgen_bench.checkpoints.source import open_source

    with open_source(folder) as source:
        expected = expected_tensors(source.shape, hf_config(source.shape, dtype))
        types = _types(source, file_type, expected, _places(source, expected))
    if find_spec("gguf") is None:
        raise CannotRun(f"what quantizes to {file_type} is {how_to_install('gguf')}")
    from gguf.constants import GGMLQuantizationType

    unknown = {kind.name for kind in types.values()} - set(GGMLQuantizationType.__members__)
    if unknown:
        raise CannotRun(f"this gguf package does not know {', '.join(sorted(unknown))}: pip install --upgrade gguf")


def rounded_checkpoint(folder: Path, file_type: FileType, dtype: DType, target: Path, progress: Progress) -> Rounded:
    """Quantize the checkpoint in ``folder`` and write what is left of it, as ``dtype``, into ``target``, if it is not
    there yet. The caller sees to it that nobody else does.

    Raises UserError as ``check_format`` does; StoreError for a damaged checkpoint or a full disk.
    """
    from flexgen_bench.checkpoints.hf_config import expected_tensors, hf_config
    from flexgen_bench.checkpoints.source import open_source
    from flexgen_bench.models.stored_names import locate

    if is_complete(target):
        return Rounded(target, _read(target / _SUMMARY))
    with open_source(folder) as source:
        expected = expected_tensors(source.shape, hf_config(source.shape, dtype))
        own = locate(source.names, source.family.prefixes, expected).found
        name_of = {full: name for name, full in own.items()}
        places = _places(source, expected)
        types = _types(source, file_type, expected, places)
        tensors: dict[str, RoundedTensor] = {}

        def get(full: str) -> Tensor:
            tensor, kind = source.tensor(name_of[full]), types[full]
            left, error = _left(tensor, kind, dtype)
            size = expected[full][-1]
            tensors[full] = RoundedTensor(
                places[full].name, kind.name, tensor.numel(), tensor.numel() // size * kind.row_bytes(size), error
            )
            return left

        with new_folder(target, needed_bytes(expected, dtype)) as made:
            for file in folder.iterdir():
                if file.is_file() and not file.name.endswith(_WEIGHT_FILES):
                    shutil.copyfile(file, made / file.name)
            config = source.written_config() | {"dtype": dtype.value}
            (made / "config.json").write_text(json.dumps(config, indent=2))
            write_weights(made, expected, dtype, get, progress)
            (made / _SUMMARY).write_text(json.dumps([vars(tensors[full]) for full in expected], indent=0))
    return Rounded(target, _read(target / _SUMMARY))


def round_trip(values: NDArray[np.float32], kind: BlockType) -> NDArray[np.float32]:
    """What is left of rows (N, columns) after quantizing and reading them back. Columns are a multiple of the block."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return np.asarray(dequantize(packed(values, kind), GGMLQuantizationType[kind.name]), np.float32)


def packed(values: NDArray[np.float32], kind: BlockType) -> NDArray[np.uint8]:
    """Rows (N, columns) as a file has them, (N, bytes of a row)."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.ascontiguousarray(values, np.float32)
    if kind.values < SUPER_BLOCK:
        made = quantize(values, GGMLQuantizationType[kind.name])
        return np.asarray(made).view(np.uint8).reshape(len(values), -1)
    return quantize_blocks(values.reshape(-1, SUPER_BLOCK), kind.name).reshape(len(values), -1)


def _left(tensor: Tensor, kind: BlockType, dtype: DType) -> tuple[Tensor, float]:
    """What is left of a tensor, in float32, and how far it is from it as the model computes with it (``dtype``)."""
    import torch

    original = tensor.float()
    if kind.name == "F32":
        return original, 0.0
    rows = original.reshape(-1, original.shape[-1])
    left, change = torch.empty_like(rows), 0.0
    for start, piece in _pieces(rows):
        made = torch.from_numpy(round_trip(piece.numpy(), kind))
        left[start : start + len(piece)] = made
        change += float((made.to(getattr(torch, dtype.value)).float() - piece).norm()) ** 2
    norm = float(original.norm())
    return left.view_as(original), change**0.5 / norm if norm else 0.0


def _pieces(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, _PIECE_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(rows), step):
        yield start, rows[start : start + step]


def _places(source: Source, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Where a GGUF file would have each tensor."""
    architecture = _architecture(source)
    return {full: architecture.stored(full, source.shape.num_heads, source.shape.num_kv_heads) for full in expected}


def _architecture(source: Source) -> Architecture:
    named = _ARCHITECTURE_OF.get(source.family.model_type)
    if named is None:
        raise UserError(
            "mode",
            f"a GGUF format, of a {source.family.model_type} model",
            f"a model of {', '.join(_ARCHITECTURE_OF)}",
            "The types of its tensors follow from their names in GGUF files, and no such files of this family are "
            "known here.",
        )
    return ARCHITECTURES[named]


def _types(
    source: Source, file_type: FileType, expected: Mapping[str, tuple[int, ...]], places: Mapping[str, Stored]
) -> dict[str, BlockType]:
    """By transformers' names. Experts are stacked in files, vectors of one row are rows there."""
    experts = 1 + max((place.expert for place in places.values() if place.expert is not None), default=-1)
    shape = source.shape
    stored = {place.name: expected[full][1:] if place.is_vector else expected[full] for full, place in places.items()}
    model = Model(shape.num_layers, shape.num_kv_heads < shape.num_heads, experts)
    types = tensor_types(file_type, model, stored)
    return {full: types[place.name] for full, place in places.items()}


def _read(path: Path) -> tuple[RoundedTensor, ...]:
    try:
        return tuple(RoundedTensor(**one) for one in json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path} cannot be read ({error}). Delete {path.parent}; it is made again.") from error

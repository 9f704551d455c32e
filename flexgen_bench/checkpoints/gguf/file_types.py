"""GGUF's file types: which type of numbers each tensor of a model has in a file of, say, Q4_K_M.

The rules are those of llama.cpp's ``llama-quantize`` without an importance matrix and without options
(src/llama-quant.cpp: ``tensor_allows_quantization``, ``llama_tensor_get_type_impl``, ``tensor_type_fallback``). MXFP4
is not one of its file types (there, experts alone have it): every matrix has MXFP4, and token table and head have Q8_0,
as in its type for experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from flexgen_bench.core.errors import UserError


class FileType(StrEnum):
    """A published format of weights, by the name that people know."""

    Q8_0 = "Q8_0"
    Q4_0 = "Q4_0"
    Q4_K_M = "Q4_K_M"
    MXFP4 = "MXFP4"


@dataclass(frozen=True)
class BlockType:
    """A type of tensors. values: that share their parameters; a row has a whole number of such blocks. bytes: of one
    block."""

    name: str
    values: int
    bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many values."""
        return columns // self.values * self.bytes


# ggml-common.h: codes, scales and smallest values of a block.
BLOCK_TYPES = {
    one.name: one
    for one in (
        BlockType("F32", 1, 4),
        BlockType("F16", 1, 2),
        BlockType("Q4_0", 32, 18),
        BlockType("Q5_0", 32, 22),
        BlockType("Q5_1", 32, 24),
        BlockType("Q8_0", 32, 34),
        BlockType("MXFP4", 32, 17),
        BlockType("Q4_K", 256, 144),
        BlockType("Q5_K", 256, 176),
        BlockType("Q6_K", 256, 210),
    )
}
_USUAL = {FileType.Q8_0: "Q8_0", FileType.Q4_0: "Q4_0", FileType.Q4_K_M: "Q4_K", FileType.MXFP4: "MXFP4"}
# Where a row is no whole number of super-blocks.
_NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_TABLE, _HEAD = "token_embd.weight", "output.weight"
_LEFT_ALONE = ("_norm.weight", "ffn_gate_inp.weight")
# Models of 80 layers whose keys serve several queries (Llama 2 70B): their values are few, and get more bits.
_LARGEST = 80
_MIXTRAL_EXPERTS = 8


@dataclass(frozen=True)
class Model:
    """What the rules look at. grouped: whether several queries share a key. experts: of a layer; 0 for a dense
    model."""

    layers: int
    grouped: bool
    experts: int


def tensor_types(file_type: FileType, model: Model, tensors: Mapping[str, tuple[int, ...]]) -> Mapping[str, BlockType]:
    """The type of each of a model's tensors, by ggml's names; shapes as torch has them, (..., out, in).

    Raises UserError for a matrix whose rows cannot be cut into blocks, which llama.cpp cannot quantize either.
    """
    tied = _HEAD not in tensors
    return {name: _type(file_type, model, name, shape, tied) for name, shape in tensors.items()}


def _type(file_type: FileType, model: Model, name: str, shape: tuple[int, ...], tied: bool) -> BlockType:
    if len(shape) < 2 or not name.endswith("weight") or name.endswith(_LEFT_ALONE):
        return BLOCK_TYPES["F32"]
    usual, columns = _USUAL[file_type], shape[-1]
    if name == _HEAD or (tied and name == _TABLE):
        chosen = _of_head(file_type, usual, columns)
    elif file_type is FileType.MXFP4 and name == _TABLE:
        chosen = "Q8_0"
    else:
        chosen = _of_matrix(model, name) if file_type is FileType.Q4_K_M else usual
    if columns % BLOCK_TYPES[chosen].values and chosen in _NARROWER:
        chosen = _NARROWER[chosen]
        chosen = "F16" if columns % BLOCK_TYPES[chosen].values else chosen
    if columns % BLOCK_TYPES[chosen].values:
        allowed = f"a multiple of {BLOCK_TYPES[chosen].values} for {file_type}"
        raise UserError(f"columns of {name}", columns, allowed, "llama.cpp cannot quantize this model to it, either.")
    return BLOCK_TYPES[chosen]


def _of_head(file_type: FileType, usual: str, columns: int) -> str:
    """The head has more bits than the rest; so has a token table that is the head, too."""
    if file_type in (FileType.Q8_0, FileType.MXFP4) or columns % BLOCK_TYPES[usual].values:
        return "Q8_0"
    return "Q6_K"


def _of_matrix(model: Model, name: str) -> str:
    """Q4_K_M: values, and what comes back from the inner layer, have six bits in every third layer and in the first
    and last eighth of them."""
    many = model.experts == _MIXTRAL_EXPERTS
    if "attn_v.weight" in name or "attn_qkv.weight" in name:
        chosen = "Q6_K" if _more_bits(name, model.layers) else "Q4_K"
        if model.layers == _LARGEST and model.grouped and chosen == "Q4_K":
            chosen = "Q5_K"
        return "Q8_0" if many else chosen
    if "attn_k.weight" in name:
        return "Q8_0" if many else "Q4_K"
    if "ffn_down" in name:
        return "Q6_K" if _more_bits(name, model.layers) else "Q4_K"
    if "attn_output.weight" in name:
        return "Q5_K" if many else "Q4_K"
    return "Q4_K"


def _more_bits(name: str, layers: int) -> bool:
    match = re.match(r"blk\.(\d+)\.", name)
    assert match is not None, f"{name} is in no layer"
    layer, eighth = int(match[1]), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2

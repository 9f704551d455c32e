"""The file formats a model can be put into for llama.cpp, and of which type each of its tensors then is.

As llama.cpp's converter and ``llama-quantize`` choose them, without an importance matrix (conversion/base.py and
src/llama-quant.cpp: ``llama_tensor_get_type_impl``, ``tensor_type_fallback``): what has one dimension, and routers,
stay in float32; the head is kept in 6 bits where the rest has fewer; Q4_K_M keeps half of what feeds the residual
stream in 6 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.model import DType, ModelShape


@dataclass(frozen=True)
class TensorType:
    """A type of ggml. number: its own (ggml.h); values: of a block, ``bytes`` long (ggml-common.h)."""

    name: str
    number: int
    values: int
    bytes: int

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Of a tensor whose rows are whole blocks."""
        count = 1
        for extent in shape:
            count *= extent
        return count // self.values * self.bytes


F32, F16, BF16 = TensorType("F32", 0, 1, 4), TensorType("F16", 1, 1, 2), TensorType("BF16", 30, 1, 2)
Q4_0, Q5_0, Q5_1 = TensorType("Q4_0", 2, 32, 18), TensorType("Q5_0", 6, 32, 22), TensorType("Q5_1", 7, 32, 24)
Q8_0 = TensorType("Q8_0", 8, 32, 34)
Q4_K, Q5_K = TensorType("Q4_K", 12, 256, 144), TensorType("Q5_K", 13, 256, 176)
Q6_K = TensorType("Q6_K", 14, 256, 210)
# What rows get that are no whole blocks of 256 values.
_SMALLER = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}


class Format(StrEnum):
    """A whole file's."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    Q4_K_M = "q4_k_m"

    @property
    def usual(self) -> TensorType:
        """Of most of its matrices."""
        return _USUAL[self]

    @property
    def is_quantized(self) -> bool:
        return self.usual.values > 1


_USUAL = {
    Format.F32: F32,
    Format.F16: F16,
    Format.BF16: BF16,
    Format.Q8_0: Q8_0,
    Format.Q4_0: Q4_0,
    Format.Q4_K_M: Q4_K,
}
# ``general.file_type`` (llama.h: llama_ftype).
FILE_TYPES = {Format.F32: 0, Format.F16: 1, Format.Q4_0: 2, Format.Q8_0: 7, Format.Q4_K_M: 15, Format.BF16: 32}
_EXACT = {DType.FLOAT32: Format.F32, DType.FLOAT16: Format.F16, DType.BFLOAT16: Format.BF16}
_BITS = {4: Format.Q4_0, 8: Format.Q8_0}


def usual_format(dtype: DType, lossy: Lossy) -> Format:
    """The cell's own: its dtype, or llama.cpp's simplest form of as many bits as its weights may have. Q4_0 has 4.5
    bits a value like ours, in groups of 32. Raises CannotRun for bits that it does not have."""
    if lossy.weights is None:
        return _EXACT[dtype]
    if lossy.weights.bits not in _BITS:
        raise CannotRun(
            f"llama.cpp has no weights of {lossy.weights.bits} bits here; policy.lossy.weights may have "
            f"{' or '.join(map(str, _BITS))}"
        )
    return _BITS[lossy.weights.bits]


def type_of(name: str, shape: tuple[int, ...], model: ModelShape, form: Format) -> TensorType:
    """The type of the tensor that GGUF calls ``name``. shape: of its matrix, of one expert where several are
    stacked."""
    if len(shape) < 2 or "_norm." in name or "ffn_gate_inp" in name or not name.endswith(".weight"):
        return F32
    if not form.is_quantized:
        return form.usual
    return _that_fits(_mixed(name, shape, model, form), shape[-1])


def _mixed(name: str, shape: tuple[int, ...], model: ModelShape, form: Format) -> TensorType:
    usual, experts, number = form.usual, model.options.get("experts"), _layer(name)
    if name == "output.weight" or (name == "token_embd.weight" and model.tied_embeddings):
        return Q8_0 if usual is Q8_0 or shape[-1] % usual.values else Q6_K
    is_mixed = form is Format.Q4_K_M
    if "attn_v." in name:
        chosen = Q6_K if is_mixed and _has_more_bits(number, model.num_layers) else usual
        # Of the model with 70e9 weights, eight heads share one.
        if chosen is Q4_K and model.num_layers == 80 and model.num_heads != model.num_kv_heads:
            chosen = Q5_K
        return Q8_0 if experts == 8 else chosen
    if "attn_k." in name and experts == 8:
        return Q8_0
    if is_mixed and "attn_output." in name and experts == 8:
        return Q5_K
    if is_mixed and "ffn_down" in name and _has_more_bits(number, model.num_layers):
        return Q6_K
    return usual


def _layer(name: str) -> int:
    """The number in ``blk.<number>.``; 0 where there is none."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else 0


def _has_more_bits(number: int, layers: int) -> bool:
    """The first eighth, the last one, and every third layer between."""
    return number < layers // 8 or number >= 7 * layers // 8 or (number - layers // 8) % 3 == 2


def _that_fits(kind: TensorType, columns: int) -> TensorType:
    if columns % kind.values:
        kind = _SMALLER.get(kind, kind)
    return kind if columns % kind.values == 0 else F16

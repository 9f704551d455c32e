"""The options of the system, checked, and how much memory a choice takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from baselines.common.constants import only_options, read_count
from baselines.llama_cpp.formats import BF16, F16, F32, Q8_0, Format, TensorType, usual_format
from baselines.llama_cpp.layout import file_bytes
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.units import MIB

AUTO = "auto"
# Tokens computed together, of a prompt: llama.cpp's own choice, and where each such pass reads the weights again.
RESIDENT_UBATCH, STREAMED_UBATCH = 512, 2048
LEAST_CONTEXT = 256  # a sequence's cache is rounded up to so many tokens (src/llama-context.cpp)
# Of the process beside weights, cache and activations: MEASURED, 437 MiB of one with torch, transformers and the
# library (8 MiB of them the library's), after a model of some kilobytes has run.
PROCESS_BYTES = 450 * MIB


class Load(StrEnum):
    """How weights get to where they are computed.

    mmap: the file is mapped, and its pages are whatever the page cache keeps. resident: read into memory of its own.
    direct: the same, read around the page cache.
    """

    MMAP = "mmap"
    RESIDENT = "resident"
    DIRECT = "direct"

    @property
    def mode(self) -> int:
        """``llama_load_mode``."""
        return {Load.RESIDENT: 0, Load.MMAP: 1, Load.DIRECT: 4}[self]


_BITS_OF = {Format.Q4_0: 4, Format.Q4_K_M: 4, Format.Q8_0: 8}
KV_TYPES: Mapping[str, TensorType] = {"f16": F16, "bf16": BF16, "f32": F32, "q8_0": Q8_0}
E_ = TypeVar("E_", bound=StrEnum)


@dataclass(frozen=True)
class Settings:
    """load None: resident where it fits, else mmap. ubatch, repack, gpu_layers None: chosen by how weights are loaded
    and by what fits."""

    format: Format
    load: Load | None = None
    kv: str = "f16"
    ubatch: int | None = None
    repack: bool | None = None
    gpu_layers: int | None = None

    @staticmethod
    def of(options: Mapping[str, Any], dtype: DType, lossy: Lossy) -> Settings:
        """Raises UserError naming an option, CannotRun for weights in bits that llama.cpp does not have here."""
        only_options(options, ("format", "load", "kv", "ubatch", "repack", "gpu_layers", "batch_size"))
        form = _choice(options, "format", Format)
        kv = str(options.get("kv") or "f16")
        if kv not in KV_TYPES:
            raise unknown_choice("system.options.kv", kv, tuple(KV_TYPES))
        repack = options.get("repack")
        if repack not in (None, True, False):
            raise UserError("system.options.repack", repack, "true, false or null")
        layers = options.get("gpu_layers")
        if layers is not None and (not isinstance(layers, int) or isinstance(layers, bool) or layers < 0):
            raise UserError("system.options.gpu_layers", layers, "an integer of at least 0, or null")
        return Settings(
            usual_format(dtype, lossy) if form is None else form,
            _choice(options, "load", Load),
            kv,
            read_count(options, "ubatch"),
            repack,
            layers,
        )

    def check_declared(self, lossy: Lossy) -> None:
        """Refuse weights or a cache of fewer bits than the cell allows: its record would call them exact. Raises
        UserError."""
        bits = _BITS_OF.get(self.format)
        if bits is not None and (lossy.weights is None or lossy.weights.bits > bits):
            allowed = "a format of the cell's dtype, since the cell's weights may not have so few bits"
            remedy = f"Add policy.lossy.weights={bits}."
            raise UserError("system.options.format", self.format.value, allowed, remedy)
        if self.kv == "q8_0" and lossy.kv_cache is None:
            raise UserError("system.options.kv", self.kv, "f16, bf16 or f32, since the cell's cache is not compressed")

    def ubatch_of(self, load: Load) -> int:
        """Tokens of a prompt that are computed together. More of them need more memory, and read mapped weights less
        often."""
        return self.ubatch or (STREAMED_UBATCH if load is Load.MMAP else RESIDENT_UBATCH)

    def repacks(self, load: Load) -> bool:
        """Whether ggml brings quantized weights into an order that this processor multiplies faster. They are copied
        into memory for that, so what is to stay in a mapped file cannot be."""
        return load is not Load.MMAP if self.repack is None else self.repack


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory, with all weights in it."""

    weights: int
    kv_cache: int
    workspace: int
    process: int = PROCESS_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.workspace + self.process

    @property
    def besides_weights(self) -> int:
        return self.total - self.weights


def footprint(shape: ModelShape, settings: Settings, load: Load, batch: int, tokens: int) -> Footprint:
    """Of ``batch`` sequences of up to ``tokens`` tokens. workspace: what a pass over ``ubatch`` tokens holds at once:
    hidden states (4 of them), an MLP's two inner ones, scores of a block, and logits of every sequence, in float32."""
    rows = settings.ubatch_of(load)
    inner = shape.ffn_size * int(shape.options.get("experts_per_token") or 1)
    workspace = 4 * (rows * (4 * shape.hidden_size + 2 * inner) + batch * shape.vocab_size)
    return Footprint(file_bytes(shape, settings.format), kv_bytes(shape, settings, batch, tokens), workspace)


def kv_bytes(shape: ModelShape, settings: Settings, batch: int, tokens: int) -> int:
    """Of the cache of ``batch`` sequences."""
    values = shape.num_layers * shape.kv_values_per_token_layer * batch * context_tokens(tokens)
    return KV_TYPES[settings.kv].nbytes((values,))


def context_tokens(tokens: int) -> int:
    """What a sequence's cache is rounded up to."""
    return -(-tokens // LEAST_CONTEXT) * LEAST_CONTEXT


def chosen_load(shape: ModelShape, settings: Settings, batch: int, tokens: int, memory_bytes: int | None) -> Load:
    """The one asked for, or resident where everything fits (None: no limit), else mmap."""
    if settings.load is not None:
        return settings.load
    need = footprint(shape, settings, Load.RESIDENT, batch, tokens).total
    return Load.RESIDENT if memory_bytes is None or need <= memory_bytes else Load.MMAP


def _choice(options: Mapping[str, Any], name: str, kind: type[E_]) -> E_ | None:
    """None for auto, or where nothing is said."""
    value = options.get(name)
    if value is None or value == AUTO:
        return None
    if value not in list(kind):
        raise unknown_choice(f"system.options.{name}", value, (AUTO, *kind))
    return kind(value)

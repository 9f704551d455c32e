"""Which tensors a model's GGUF file has, of which type, and from which tensors of its checkpoint each is made.

Names and orders of rows are those that this project reads GGUF files by (``checkpoints/gguf/names.py``), the other way
round. Needs neither weights nor torch, so that what a file will take is known before it is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from baselines.llama_cpp.formats import F32, Format, TensorType, type_of
from flexgen_bench.checkpoints.gguf.names import ARCHITECTURES, ROPE_FACTORS, RowOrder, Stored
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.registry import family
from flexgen_bench.models.stored_names import expected_sources

# Architectures of GGUF files by our families: those whose every option the file can say, or whose options are refused
# where it cannot (metadata.py). llama.cpp computes no OPT at all.
OF_FAMILY: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
}


@dataclass(frozen=True)
class Planned:
    """One tensor of the file. sources: the checkpoint's, by the family's own names: one, or those of all experts, which
    are stacked. shape: as numpy has it, rows before columns. order, heads, added: as in ``Stored``."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    type: TensorType
    order: RowOrder = RowOrder.SAME
    heads: int = 0
    added: float = 0.0

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(self.shape)

    @property
    def layer(self) -> int | None:
        """Of which layer it is part; None: of the vocabulary's ends."""
        match = re.match(r"blk\.(\d+)\.", self.name)
        return int(match[1]) if match else None


def check_family(shape: ModelShape) -> str:
    """The architecture of this model's file. Raises CannotRun for a family that cannot be written."""
    architecture = OF_FAMILY.get(shape.family)
    if architecture is not None:
        return architecture
    known = ", ".join(OF_FAMILY)
    if shape.family == "opt":
        why = "llama.cpp does not compute OPT models"
    else:
        why = f"GGUF files of {shape.family} models are not written here"
    raise CannotRun(f"{why}; choose a model of one of these families: {known}")


def plan(shape: ModelShape, form: Format) -> tuple[Planned, ...]:
    """All tensors, in the order in which they are written. Raises CannotRun as ``check_family`` does."""
    kind, architecture = family(shape.family), ARCHITECTURES[check_family(shape)]
    together: dict[str, tuple[list[str], tuple[int, ...], Stored]] = {}
    for source, extents in expected_sources(kind.inventory(shape)).items():
        full = source if source.startswith("lm_head.") else kind.prefixes[0] + source
        stored = architecture.stored(full, shape.num_heads, shape.num_kv_heads)
        together.setdefault(stored.name, ([], extents, stored))[0].append(source)
    planned = [
        Planned(
            name,
            tuple(sources),
            extents if stored.expert is None else (len(sources), *extents),
            type_of(name, extents, shape, form),
            stored.order,
            stored.heads,
            stored.added,
        )
        for name, (sources, extents, stored) in together.items()
    ]
    scaling = shape.options.get("rope_scaling")
    if scaling is not None and scaling["rope_type"] == "llama3":
        planned.append(Planned(ROPE_FACTORS, (), (shape.head_dim // 2,), F32))
    return tuple(planned)


def file_bytes(shape: ModelShape, form: Format) -> int:
    """Of all tensors; what a file has beside them is some kilobytes."""
    return sum(planned.nbytes for planned in plan(shape, form))

"""How thoroughly a machine is measured: which sizes, and how long."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_bench.calibrate.stable import Patience
from flexgen_bench.core.compression import Compression
from flexgen_bench.core.model import DType
from flexgen_bench.core.units import GIB, MIB

Format = tuple[DType, Compression | None]

_UNCOMPRESSED = tuple((dtype, None) for dtype in DType)
_BFLOAT16 = tuple((DType.BFLOAT16, Compression(bits)) for bits in (4, 8))
# What a processor multiplies with, and what its attention reads.
CPU_MATRIX: tuple[Format, ...] = (*_UNCOMPRESSED, *_BFLOAT16, (DType.FLOAT32, Compression(4)))
KV_FORMATS: tuple[Format, ...] = (*_UNCOMPRESSED, *_BFLOAT16)
# An accelerator unpacks compressed weights first, so its products are with plain ones.
GPU_MATRIX: tuple[Format, ...] = _UNCOMPRESSED


@dataclass(frozen=True)
class SiteEffort:
    """What is measured of a processor or an accelerator.

    widths: hidden sizes of the OPT layers; rows: of their products; prompts: tokens; heads: query heads per KV head.
    torch_widths, torch_rows: of products that torch computes by itself, in every dtype; none where the layers are
    torch's own products. sequences: at most so many in an attention, as in a micro-batch; prompt_tokens: at most so
    many in all prompts of a prefill attention; cache_tokens: of each sequence in a decode one. heads_of_dim: (KV heads,
    head dim) of attention in which every query head has its own KV head (OPT-1.3B), and of shared ones (Llama 3).
    least_bytes, most_bytes: limits of the memory whose contents take turns, so that caches do not flatter what is read.
    """

    widths: tuple[int, ...]
    rows: tuple[int, ...]
    matrix: tuple[Format, ...]
    kv: tuple[Format, ...] = KV_FORMATS
    prompts: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    sequences: int = 16
    prompt_tokens: int = 2048
    heads: tuple[int, ...] = (1, 4, 8)
    cache_tokens: int = 512
    torch_widths: tuple[int, ...] = ()
    torch_rows: tuple[int, ...] = ()
    heads_of_dim: tuple[tuple[int, int], tuple[int, int]] = ((32, 64), (8, 128))
    least_bytes: int = 256 * MIB
    most_bytes: int = GIB


@dataclass(frozen=True)
class Effort:
    """A whole calibration. link_bytes: sizes of copies, the largest of them counts; disk_bytes: of each of two files
    that are read and written, disk_piece of them at a time (a disk that was idle is slower at first: streams are
    long)."""

    name: str
    patience: Patience
    cpu: SiteEffort
    gpu: SiteEffort
    link_bytes: tuple[int, ...]
    disk_bytes: int
    disk_piece: int
    step_passes: int


_POWERS = tuple(2**n for n in range(11))  # 1 to 1024

QUICK = Effort(
    name="quick",
    patience=Patience(budget_s=13.0, sample_s=0.004, last=3, spread=0.10),
    cpu=SiteEffort(
        widths=(768, 2048),
        rows=_POWERS[:9],
        matrix=CPU_MATRIX,
        prompts=(32, 128, 512),
        torch_widths=(2048,),
        torch_rows=(1, 8, 32, 256),
    ),
    gpu=SiteEffort(
        widths=(2048, 4096),
        rows=(1, 4, 16, 64, 256, 1024, 4096),
        matrix=GPU_MATRIX,
        prompts=(32, 128, 512, 1024),
        sequences=64,
        prompt_tokens=16384,
        cache_tokens=2048,
        most_bytes=8 * GIB,
    ),
    link_bytes=(MIB, 64 * MIB),
    disk_bytes=256 * MIB,
    disk_piece=128 * MIB,
    step_passes=4,
)

FULL = Effort(
    name="full",
    patience=Patience(budget_s=200.0, sample_s=0.02, last=4, spread=0.05),
    cpu=SiteEffort(
        widths=(512, 1024, 2048, 4096),
        rows=_POWERS,
        matrix=CPU_MATRIX,
        torch_widths=(1024, 4096),
        torch_rows=(1, 4, 8, 32, 128, 512),
    ),
    gpu=SiteEffort(
        widths=(1024, 2048, 4096, 8192),
        rows=(*_POWERS, 2048, 4096),
        matrix=GPU_MATRIX,
        sequences=64,
        prompt_tokens=16384,
        cache_tokens=2048,
        most_bytes=8 * GIB,
    ),
    link_bytes=(64 * 1024, MIB, 16 * MIB, 256 * MIB),
    disk_bytes=GIB,
    disk_piece=256 * MIB,
    step_passes=8,
)

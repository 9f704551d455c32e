"""Rates of a layer's matrix products: OPT layers, computed as the engine does, norms and activations included.

One call computes a layer without its attention (PROJECT and OUTPUT); its FLOP are 2 per weight and row, as the planner
counts them. Layers are listed by their hidden size, which is the square root of a twelfth of their weights. Each call
takes another copy of the layer, so that weights come from memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import TYPE_CHECKING

from flexgen_bench.calibrate.effort import SiteEffort
from flexgen_bench.calibrate.site import ProbeMemory
from flexgen_bench.calibrate.stable import Probe
from flexgen_bench.core.compression import Compression
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.rates import number_format
from flexgen_bench.engine.weight_views import plain_views, unpack, views
from flexgen_bench.kernels import ops
from flexgen_bench.memory.weight_store import TORCH_DTYPES
from flexgen_bench.models.formulas import output, project
from flexgen_bench.models.packing import PackedUnit, pack
from flexgen_bench.models.registry import family
from flexgen_bench.schedule.scheduled_job import UnitKind

if TYPE_CHECKING:
    from torch import Tensor

    from flexgen_bench.models.formulas import Weights

FAMILY = "opt"
_TINY = 64  # wide
# The format that is also multiplied with numbers in so many bits (``Lossy.activations``, on processors).
IN_EIGHTHS, _BITS = (DType.BFLOAT16, Compression(4)), 8
# Of the step that unpacks weights for an accelerator.
_UNPACKED = (DType.BFLOAT16, Compression(4))


def layer_shape(width: int) -> ModelShape:
    """An OPT model of one layer and this hidden size."""
    heads = max(1, width // 64)
    return ModelShape(
        name=f"layer-{width}",
        family=FAMILY,
        num_layers=1,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        ffn_size=4 * width,
        vocab_size=64,
        max_positions=64,
        tied_embeddings=True,
    )


def layer_unit(shape: ModelShape, dtype: DType, compression: Compression | None) -> PackedUnit:
    """How the layer is packed."""
    packed = pack(shape, family(FAMILY).inventory(shape), dtype, compression)
    return next(unit for unit in packed.units if unit.kind is UnitKind.LAYER)


def largest_layer(effort: SiteEffort, limit: int) -> int:
    """Bytes of the largest layer that will be measured, of those not above ``limit``."""
    sizes = [
        layer_unit(layer_shape(width), dtype, compression).num_bytes
        for width in effort.widths
        for dtype, compression in effort.matrix
    ]
    return max((size for size in sizes if size <= limit), default=0)


def matrix_probes(memory_of_site: ProbeMemory, effort: SiteEffort) -> Iterator[Probe]:
    """``<tier>.matrix.<format>.<width>.<rows>``. A layer too large for the room is left out."""
    site = memory_of_site.site
    for dtype, compression, activations in _formats(effort):
        number = number_format(dtype, compression, activations)
        for width in effort.widths:
            shape = layer_shape(width)
            unit = layer_unit(shape, dtype, compression)
            copies = memory_of_site.copies(unit.num_bytes)
            if not copies:
                continue
            turns = cycle([views(c, unit, unit.offset, TORCH_DTYPES[dtype], activations) for c in copies])
            for rows in effort.rows:
                x, attended = (memory_of_site.numbers((rows, width), TORCH_DTYPES[dtype]) for _ in range(2))
                yield Probe(
                    f"{site.tier}.matrix.{number}.{width}.{rows}",
                    2 * unit.num_values * rows,
                    _layer(shape, turns.__next__, x, attended),
                    site.settle,
                )


def _formats(effort: SiteEffort) -> Iterator[tuple[DType, Compression | None, int | None]]:
    """Of products, and of those whose other factor is quantized to so many bits, too."""
    for dtype, compression in effort.matrix:
        yield dtype, compression, None
        if (dtype, compression) == IN_EIGHTHS:
            yield dtype, compression, _BITS


def tiny_layer(memory_of_site: ProbeMemory) -> Callable[[], object]:
    """A layer that takes no time to compute: what is left is issuing it."""
    shape, dtype = layer_shape(_TINY), DType.FLOAT16
    unit = layer_unit(shape, dtype, None)
    weights = views(memory_of_site.copies(unit.num_bytes)[0], unit, unit.offset, TORCH_DTYPES[dtype])
    x, attended = (memory_of_site.numbers((1, _TINY), TORCH_DTYPES[dtype]) for _ in range(2))
    return _layer(shape, lambda: weights, x, attended)


def _layer(shape: ModelShape, weights: Callable[[], Weights], x: Tensor, attended: Tensor) -> Callable[[], object]:
    decoder = family(FAMILY).decoder(shape)

    def call() -> Tensor:
        w = weights()
        project(ops, decoder, decoder.layers[0], w, x, ())  # OPT rotates nothing
        return output(ops, decoder.layers[0], w, x, attended)

    return call


def torch_probes(memory_of_site: ProbeMemory, effort: SiteEffort) -> Iterator[Probe]:
    """``<tier>.torch_matrix.<dtype>.<width>.<rows>``: a square product as torch computes it, the weight as checkpoints
    hold it."""
    site = memory_of_site.site
    for dtype in DType if effort.torch_widths else ():
        kind = TORCH_DTYPES[dtype]
        for width in effort.torch_widths:
            pieces = memory_of_site.copies(width * width * dtype.bytes)
            if not pieces:
                continue
            size = width * width * dtype.bytes
            turns = cycle([piece[:size].view(kind).view(width, width) for piece in pieces])
            for rows in effort.torch_rows:
                yield Probe(
                    f"{site.tier}.torch_matrix.{number_format(dtype)}.{width}.{rows}",
                    2 * width * width * rows,
                    functools.partial(_multiply_next, memory_of_site.numbers((rows, width), kind), turns),
                    site.settle,
                )


def _multiply_next(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    from torch.nn.functional import linear

    return linear(x, next(weights))


def unpack_probe(memory_of_site: ProbeMemory, effort: SiteEffort) -> Probe:
    """``<tier>.unpack``: bytes of plain weights, out of a whole unit at a time."""
    dtype, compression = _UNPACKED
    site, width = memory_of_site.site, sorted(effort.widths)[len(effort.widths) // 2]
    unit = layer_unit(layer_shape(width), dtype, compression)
    out = site.device.allocate(site.tier, unit.plain_bytes)
    dequantized = plain_views(out, unit, TORCH_DTYPES[dtype])
    packed = cycle([views(c, unit, unit.offset, TORCH_DTYPES[dtype]) for c in memory_of_site.copies(unit.num_bytes)])
    return Probe(
        f"{site.tier}.unpack",
        unit.plain_bytes,
        functools.partial(_unpack_next, packed.__next__, dequantized),
        site.settle,
    )


def _unpack_next(packed: Callable[[], Weights], dequantized: Weights) -> None:
    unpack(packed(), dequantized)

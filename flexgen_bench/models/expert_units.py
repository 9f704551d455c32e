"""Experts as units of their own: the same packed file, seen as more units.

A layer's extent begins with what every token meets and ends with its experts (``packing.py``), so it falls into two
extents, of which each can be placed, loaded and used by itself. Units that a model has anyway keep their numbers.
"""

from __future__ import annotations

from dataclasses import replace

from flexgen_bench.core.model import DType
from flexgen_bench.models.packing import PackedModel, unpacked_layout
from flexgen_bench.schedule.scheduled_job import UnitKind


def with_experts_apart(packed: PackedModel, dtype: DType) -> PackedModel:
    """Every mixture's experts as a unit behind all others, in the order of their layers."""
    units = list(packed.units)
    for unit in packed.units:
        if unit.experts is None:
            continue
        dense = tuple(e for e in unit.entries if e.tensor.expert is None)
        experts = tuple(e for e in unit.entries if e.tensor.expert is not None)
        offsets, plain_bytes = unpacked_layout(dense, dtype)
        units[unit.index] = replace(
            unit,
            entries=dense,
            num_bytes=unit.dense_bytes,
            home_bytes=unit.dense_bytes,
            num_values=sum(e.tensor.spec.num_values for e in dense),
            plain_offsets=offsets,
            plain_bytes=plain_bytes,
            experts=None,
            companion=len(units),
        )
        offsets, plain_bytes = unpacked_layout(experts, dtype)
        count = unit.num_bytes - unit.dense_bytes
        units.append(
            replace(
                unit,
                index=len(units),
                kind=UnitKind.EXPERTS,
                offset=unit.experts.offset,
                entries=experts,
                num_bytes=count,
                home_bytes=count,
                num_values=sum(e.tensor.spec.num_values for e in experts),
                plain_offsets=offsets,
                plain_bytes=plain_bytes,
                companion=unit.index,
            )
        )
    return replace(packed, units=tuple(units))

"""What a stack of matrices is called, and its shape, where it is stored in MXFP4 (microscaled.py). Without torch."""

from __future__ import annotations

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.microscaling import MXFP4

BLOCKS, SCALES = "_blocks", "_scales"


def packed_shapes(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors that a stack ``name`` (E, in, out) is stored in, with their shapes. UserError where rows are no whole
    groups."""
    count, inputs, outputs = shape
    groups, rest = divmod(inputs, MXFP4.group_size)
    if rest:
        raise UserError("model.options.packing", str(MXFP4), f"null: {name} has {inputs} inputs, no multiple of 32")
    scales = (count, outputs, groups)
    return {name + BLOCKS: (*scales, MXFP4.group_size // 2), name + SCALES: scales}


def is_packed_part(name: str) -> bool:
    """Whether a tensor of this name is blocks or scales."""
    return name.endswith((BLOCKS, SCALES))

"""Weights that are small floats or integers times a scale: fp8 in its forms, and compressed-tensors.

weight = (code - zero point) * scale, with one scale for the whole matrix, for every output, for groups of inputs, or
for blocks of both. What is called ``weight_scale_inv`` (DeepSeek-V3) is the scale to multiply with, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexgen_bench.checkpoints.quantized.bits import unpacked, words_for
from flexgen_bench.checkpoints.quantized.view import ADVICE, DequantizedView
from flexgen_bench.checkpoints.tensors import Tensors
from flexgen_bench.core.errors import StoreError

_CODES = ("int8", "float8_e4m3fn", "float8_e5m2")
_PACKED_BITS = (2, 4, 8)
# Rows that are multiplied at once: what is held beside the weight itself stays small.
_ROWS = 1024
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision")


@dataclass(frozen=True)
class Grid:
    """Which scale a value has. block: outputs and inputs of a block; None: known from the shape of the scales alone.

    bits: of packed codes, as far as it is said.
    """

    block: tuple[int, int] | None = None
    bits: int | None = None


class Scaled(DequantizedView):
    """``weight`` of 8 bits with ``weight_scale`` or ``weight_scale_inv``."""

    roles: ClassVar[tuple[str, ...]] = (
        "weight",
        "weight_scale",
        "weight_scale_inv",
        "weight_zero_point",
        "weight_g_idx",
    )

    def __init__(self, stored: Tensors, config: Mapping[str, Any], where: Path, name: str) -> None:
        self._method = name
        super().__init__(stored, config, where)

    @property
    def scheme(self) -> str:
        block = self._config.get("weight_block_size")
        return f"{self._method} in blocks of {block[0]} x {block[1]}" if block else self._method

    def _is_main(self, name: str) -> bool:
        """A weight of 8 bits, or one of more that has a scale nevertheless (which is refused when it is read)."""
        base, _, role = name.rpartition(".")
        if role != "weight":
            return False
        has_scale = any(f"{base}.{scale}" in self._names for scale in ("weight_scale", "weight_scale_inv"))
        return has_scale or self._stored.header(name)[1] in _CODES

    def shape_of(self, parts: Mapping[str, str], name: str) -> tuple[int, ...]:
        return self._stored.header(parts["weight"])[0]

    def weight(self, parts: Mapping[str, str], name: str) -> Tensor:
        codes = self._part(parts, "weight", name)
        if str(codes.dtype).removeprefix("torch.") not in _CODES or codes.ndim != 2:
            raise self.wrong(
                name,
                f"it has a scale, but is {codes.dtype} of shape {tuple(codes.shape)}: it is not said "
                "whether the scale is in it",
            )
        return self._times_scale(codes.float(), parts, name, self._grid(name))

    def _grid(self, name: str) -> Grid:
        block = self._config.get("weight_block_size")
        return Grid(None if not block else (int(block[0]), int(block[1])))

    def _times_scale(self, codes: Tensor, parts: Mapping[str, str], name: str, grid: Grid) -> Tensor:
        """codes float32 (out, in), changed in place -> the weight."""
        role = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
        scales = self._as_matrix(self._part(parts, role, name).float(), name)
        zeros = self._zeros(parts, name, codes.shape, scales, grid)
        columns = self._columns(parts, name, codes.shape, scales, grid)
        for rows, own in self._rows(codes.shape, scales, name, grid):
            part = codes[rows]
            if zeros is not None:
                part -= _spread(zeros[own], columns)
            part *= _spread(scales[own], columns)
        return codes

    def _as_matrix(self, values: Tensor, name: str) -> Tensor:
        """One number, one for each output, or a grid."""
        if values.numel() == 1:
            return values.reshape(1, 1)
        if values.ndim == 1:
            return values[:, None]
        if values.ndim != 2:
            raise self.wrong(name, f"scales of shape {tuple(values.shape)}")
        return values

    def _zeros(
        self, parts: Mapping[str, str], name: str, shape: torch.Size, scales: Tensor, grid: Grid
    ) -> Tensor | None:
        """Zero points in the shape of the scales, or None."""
        if "weight_zero_point" not in parts:
            return None
        zeros = self._part(parts, "weight_zero_point", name)
        if zeros.dtype == torch.int32 and grid.bits is not None and "weight_packed" in parts:
            zeros = unpacked(zeros, grid.bits, 0)[: shape[0]] - (1 << (grid.bits - 1))
        zeros = self._as_matrix(zeros.float(), name)
        if zeros.shape != scales.shape:
            raise self.wrong(name, f"zero points {tuple(zeros.shape)} beside scales {tuple(scales.shape)}")
        return zeros

    def _columns(
        self, parts: Mapping[str, str], name: str, shape: torch.Size, scales: Tensor, grid: Grid
    ) -> Tensor | None:
        """(in,) which column of the scales an input has; None where there is one."""
        count = scales.shape[1]
        if count == 1:
            return None
        inputs = shape[1]
        order = self._part(parts, "weight_g_idx", name) if "weight_g_idx" in parts else None
        if order is not None and int(order.max()) >= 0:  # all -1: in their natural order
            columns = order.long()
        else:
            size = grid.block[1] if grid.block else -(-inputs // count)
            if not grid.block and inputs % count:
                raise self.wrong(name, f"{count} groups for {inputs} inputs, and no group size")
            columns = torch.arange(inputs) // size
        if columns.shape != (inputs,) or int(columns.min()) < 0 or int(columns.max()) + 1 != count:
            raise self.wrong(name, f"scales {tuple(scales.shape)} for a weight {tuple(shape)}")
        return columns

    def _rows(self, shape: torch.Size, scales: Tensor, name: str, grid: Grid) -> Iterator[tuple[slice, slice]]:
        """Rows of the weight, some at a time, and those of the scales that they have."""
        outputs, count = shape[0], scales.shape[0]
        if count == outputs:
            for first in range(0, outputs, _ROWS):
                rows = slice(first, min(first + _ROWS, outputs))
                yield rows, rows
        elif scales.numel() == 1:
            yield slice(0, outputs), slice(0, 1)
        elif grid.block and count == -(-outputs // grid.block[0]):
            for row in range(count):
                first = row * grid.block[0]
                yield slice(first, min(first + grid.block[0], outputs)), slice(row, row + 1)
        else:
            raise self.wrong(name, f"scales {tuple(scales.shape)} for a weight {tuple(shape)}")


def _spread(values: Tensor, columns: Tensor | None) -> Tensor:
    return values if columns is None else values[:, columns]


class CompressedTensors(Scaled):
    """The formats of the compressed-tensors library that hold one code for each weight."""

    roles: ClassVar[tuple[str, ...]] = (*Scaled.roles, "weight_packed", "weight_shape")

    def __init__(self, stored: Tensors, config: Mapping[str, Any], where: Path) -> None:
        groups = config.get("config_groups") or {}
        self._groups = [group for group in groups.values() if isinstance(group, Mapping)]
        forms = {str(config.get("format") or "")} | {
            str(g.get("format") or config.get("format") or "") for g in self._groups
        }
        sparse = (config.get("sparsity_config") or {}).get("format") or "dense"
        other = sorted(forms - set(_FORMATS)) or ([sparse] if sparse != "dense" else [])
        if (config.get("transform_config") or {}).get("config_groups"):
            other = ["transform_config"]
        if other:
            raise StoreError(
                f"{where}: compressed-tensors quantization in the format {other[0]!r} is not read here, only "
                f"{', '.join(_FORMATS)}. {ADVICE}"
            )
        self._forms = "/".join(sorted(forms - {""}))
        super().__init__(stored, config, where, "compressed-tensors")

    @property
    def scheme(self) -> str:
        return f"compressed-tensors ({self._forms})"

    def _is_main(self, name: str) -> bool:
        return name.endswith(".weight_packed") or super()._is_main(name)

    def shape_of(self, parts: Mapping[str, str], name: str) -> tuple[int, ...]:
        if "weight_packed" not in parts:
            return super().shape_of(parts, name)
        return tuple(int(n) for n in self._part(parts, "weight_shape", name))

    def weight(self, parts: Mapping[str, str], name: str) -> Tensor:
        if "weight_packed" not in parts:
            return super().weight(parts, name)
        grid, words = self._grid(name), self._part(parts, "weight_packed", name)
        outputs, inputs = self.shape_of(parts, name)
        if grid.bits not in _PACKED_BITS:
            raise self.wrong(
                name,
                f"its config_group says {grid.bits} bits; packed codes are read with {_PACKED_BITS} only, "
                "as versions of the library pack other ones in different ways",
            )
        if words.shape != (outputs, words_for(inputs, grid.bits)):
            raise self.wrong(name, f"{grid.bits} bits of {outputs} x {inputs} codes in {tuple(words.shape)} words")
        codes = unpacked(words, grid.bits, 1)[:, :inputs] - (1 << (grid.bits - 1))
        return self._times_scale(codes.float(), parts, name, grid)

    def _grid(self, name: str) -> Grid:
        """What the config says about a weight: its own name counts before the kind of its module."""
        module = name.removesuffix(".weight")
        named = [g for g in self._groups if any(_names(t, module) for t in g.get("targets") or ())]
        kinds = [g for g in self._groups if "Linear" in (g.get("targets") or ())]
        matching = (named or kinds)[:1]
        weights = (matching[0].get("weights") or {}) if matching else {}
        structure, size = weights.get("block_structure"), weights.get("group_size")
        block = None
        if structure:
            block = (int(structure[0]), int(structure[1]))
        elif isinstance(size, int) and size > 0:
            block = (1, size)
        bits = weights.get("num_bits")
        return Grid(block, bits if isinstance(bits, int) else None)


def _names(target: str, module: str) -> bool:
    """Whether a target names a module, by a regular expression or as it is."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module

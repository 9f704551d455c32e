"""MXFP4 (core/microscaling.py) as gpt-oss stores it: of a stack of matrices ``x`` the tensors ``x_blocks`` (E, out,
in / 32, 16), whose bytes hold two neighbours each, and ``x_scales`` (E, out, in / 32)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexgen_bench.checkpoints.quantized.packed_names import BLOCKS, SCALES
from flexgen_bench.checkpoints.tensors import Tensors
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.microscaling import EXPONENT_BIAS, MXFP4
from flexgen_bench.kernels.microscaling import repacked
from flexgen_bench.kernels.quantization import dequantize

_NOT_A_NUMBER = 255  # of an E8M0 scale
# With these 6 is a number yet: 6 * 2^(252 - 127) in float32 and bfloat16, 6 * 2^(140 - 127) in float16.
LARGEST_SCALE, LARGEST_HALF_SCALE = 252, 140


class Microscaled:
    """The tensors of a checkpoint with stacks in MXFP4 under the names, and with the values, that transformers has them
    under: (E, in, out). What is stored is to be had as it is, too."""

    note = ""  # how weights were read: as they are

    def __init__(self, stored: Tensors, config: Mapping[str, Any], where: Path) -> None:
        self._stored, self._where = stored, where
        names = stored.names()
        self._packed = {name.removesuffix(BLOCKS) for name in names if name.endswith(BLOCKS)}
        if not self._packed:
            raise StoreError(
                f"{where}: the quantization config says mxfp4, but no tensor is quantized like this. Remove the entry "
                "from the config, or fetch the checkpoint again."
            )
        for name in sorted(self._packed):
            self._check(name)
        parts = {name + end for name in self._packed for end in (BLOCKS, SCALES)}
        self._names = frozenset(names - parts | self._packed)

    def names(self) -> frozenset[str]:
        return self._names

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._packed:
            return self._stored.header(name)
        count, outputs, groups = self._stored.header(name + SCALES)[0]
        return (count, groups * MXFP4.group_size, outputs), "float32"

    def tensor(self, name: str) -> Tensor:
        packed = self.packed(name)
        if packed is None:
            return self._stored.tensor(name)
        blocks, scales = packed
        codes = torch.stack([repacked(one) for one in blocks])
        values = dequantize(codes, scales, scales.shape[-1] * MXFP4.group_size, MXFP4, torch.float32)
        return values.mT

    def packed(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Blocks and scales of a stack; None for what is no such stack. StoreError for scales that are no number."""
        if name not in self._packed:
            return None
        return self._stored.tensor(name + BLOCKS), self._stored.tensor(name + SCALES)

    def _check(self, name: str) -> None:
        if name + SCALES not in self._stored.names():
            raise StoreError(f"{self._where}: {name + BLOCKS} is in MXFP4, and {name + SCALES} is missing.")
        (blocks, kind), (scales, scale_kind) = (self._stored.header(name + end) for end in (BLOCKS, SCALES))
        if (kind, scale_kind) != ("uint8", "uint8") or len(scales) != 3 or blocks != (*scales, MXFP4.group_size // 2):
            raise StoreError(
                f"{self._where}: {name} in MXFP4 has blocks {kind} {blocks} and scales {scale_kind} {scales}; expected "
                "are uint8 (experts, outputs, groups, 16) and (experts, outputs, groups)."
            )


def check_scales(scales: Tensor, largest: int, name: str, where: Path) -> None:
    """StoreError for scales with which values are, or may be, no numbers in a type that goes up to ``largest``."""
    if scales.numel() and int(scales.max()) > largest:
        found = int(scales.max())
        what = "NaN" if found == _NOT_A_NUMBER else f"numbers times 2^{found - EXPONENT_BIAS}"
        advice = " Use dtype bfloat16 or float32." if largest == LARGEST_HALF_SCALE and found <= LARGEST_SCALE else ""
        raise StoreError(f"tensor {name} in {where} holds {what}, which is beyond the numbers of its type.{advice}")

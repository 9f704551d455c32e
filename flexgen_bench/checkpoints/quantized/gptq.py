"""GPTQ (Frantar et al. 2022) and AWQ (Lin et al. 2023) checkpoints: codes of an (in, out) matrix with scales and zero
points by groups of inputs.

weight[out, in] = scales[group(in), out] * (code[in, out] - zero[group(in), out]). Formats as AutoGPTQ and AutoAWQ write
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexgen_bench.checkpoints.quantized.bits import unpacked
from flexgen_bench.checkpoints.quantized.view import ADVICE, DequantizedView
from flexgen_bench.checkpoints.tensors import Tensors
from flexgen_bench.core.errors import StoreError

# Where AutoAWQ puts column c of every eight: its packing order is 0, 2, 4, 6, 1, 3, 5, 7.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def _number(config: Mapping[str, Any], keys: tuple[str, ...], where: Path, scheme: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise StoreError(f"{where}: its {scheme} quantization config gives no integer {keys[0]}.")


class _Grouped(DequantizedView):
    """Codes, zero points and scales by groups of inputs."""

    def __init__(self, stored: Tensors, config: Mapping[str, Any], where: Path, scheme: str, bits: int) -> None:
        self._method, self._bits = scheme, bits
        self._group = _number(config, ("group_size", "q_group_size"), where, scheme)
        super().__init__(stored, config, where)

    @property
    def scheme(self) -> str:
        size = "one group" if self._group == -1 else f"groups of {self._group}"
        return f"{self._method} ({self._bits} bits, {size})"

    def _groups(self, parts: Mapping[str, str], name: str, inputs: int, count: int) -> Tensor:
        """(in,) the group of every input."""
        if "g_idx" in parts:
            groups = self._part(parts, "g_idx", name).long()
        elif self._config.get("desc_act"):
            raise self.wrong(name, "the order of its inputs (g_idx) is missing")
        else:
            groups = torch.arange(inputs) // (inputs if self._group == -1 else self._group)
        if groups.shape != (inputs,) or int(groups.min()) < 0 or int(groups.max()) >= count:
            raise self.wrong(name, f"{inputs} inputs in groups of {self._group} do not have {count} scales")
        return groups

    def _assembled(self, parts: Mapping[str, str], name: str, codes: Tensor, zeros: Tensor) -> Tensor:
        """codes (in, out) and zeros (groups, out), integers -> float32 (out, in)."""
        inputs, outputs = codes.shape
        scales = self._part(parts, "scales", name).float()
        if scales.ndim != 2 or scales.shape[1] != outputs or zeros.shape != scales.shape:
            raise self.wrong(name, f"{outputs} outputs, scales {tuple(scales.shape)}, zero points {tuple(zeros.shape)}")
        groups = self._groups(parts, name, inputs, scales.shape[0])
        values = (codes - zeros[groups]).float().mul_(scales[groups])
        return values.t().contiguous()


class GPTQ(_Grouped):
    """4 and 8 bits (and 2), with or without ``desc_act``; zero points as in its first format (one less than they are)
    or its second."""

    roles: ClassVar = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, stored: Tensors, config: Mapping[str, Any], where: Path) -> None:
        bits = _number(config, ("bits", "wbits"), where, "GPTQ")
        form = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if config.get("is_marlin_format"):
            form = "marlin"
        if form not in ("gptq", "gptq_v2") or bits not in (2, 4, 8):
            raise StoreError(
                f"{where}: GPTQ quantization with {bits} bits in format {form} is not read here, only 2, 4 "
                f"and 8 bits in formats gptq and gptq_v2. {ADVICE}"
            )
        if any(not str(pattern).startswith("-:") for pattern in config.get("dynamic") or {}):
            raise StoreError(
                f"{where}: GPTQ quantization with other bits for some modules (dynamic) is not read here. {ADVICE}"
            )
        self._stored_less = form == "gptq"
        super().__init__(stored, config, where, "GPTQ", bits)

    def shape_of(self, parts: Mapping[str, str], name: str) -> tuple[int, ...]:
        (rows, outputs), _ = self._stored.header(parts["qweight"])
        return outputs, rows * 32 // self._bits

    def weight(self, parts: Mapping[str, str], name: str) -> Tensor:
        codes = unpacked(self._part(parts, "qweight", name), self._bits, 0)
        zeros = unpacked(self._part(parts, "qzeros", name), self._bits, 1)[:, : codes.shape[1]]
        if self._stored_less:
            zeros = (zeros + 1) & ((1 << self._bits) - 1)
        return self._assembled(parts, name, codes, zeros)


class AWQ(_Grouped):
    """4 bits in AutoAWQ's ``gemm`` format."""

    roles: ClassVar = ("qweight", "qzeros", "scales")

    def __init__(self, stored: Tensors, config: Mapping[str, Any], where: Path) -> None:
        bits = _number(config, ("bits", "w_bit"), where, "AWQ")
        form = str(config.get("version") or config.get("format") or "gemm").lower()
        zero_point = config.get("zero_point", True)
        if bits != 4 or form != "gemm" or not zero_point:
            raise StoreError(
                f"{where}: AWQ quantization with {bits} bits in format {form}, zero_point={zero_point}, is not read "
                "here, "
                f"only 4 bits in format gemm with zero points. {ADVICE}"
            )
        super().__init__(stored, config, where, "AWQ", bits)

    def shape_of(self, parts: Mapping[str, str], name: str) -> tuple[int, ...]:
        (inputs, words), _ = self._stored.header(parts["qweight"])
        return words * 8, inputs

    def weight(self, parts: Mapping[str, str], name: str) -> Tensor:
        codes = self._columns(self._part(parts, "qweight", name))
        return self._assembled(parts, name, codes, self._columns(self._part(parts, "qzeros", name)))

    @staticmethod
    def _columns(words: Tensor) -> Tensor:
        codes = unpacked(words, 4, 1)
        return codes.view(codes.shape[0], -1, 8)[:, :, list(_AWQ_PLACES)].flatten(1)

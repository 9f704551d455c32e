"""What all quantized checkpoints have in common: a weight is several tensors, and some tensors speak of other
things."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from flexgen_bench.checkpoints.tensors import Tensors
from flexgen_bench.core.errors import StoreError

# How a producer's runtime quantizes activations and the KV cache. They say nothing about the weights.
RUNTIME = frozenset(
    {
        "input_scale",
        "input_zero_point",
        "input_scale_ub",
        "output_scale",
        "output_zero_point",
        "act_scale",
        "activation_scale",
        "k_scale",
        "v_scale",
        "q_scale",
        "kv_scale",
        "k_zero_point",
        "v_zero_point",
        "q_zero_point",
        "prob_output_scale",
    }
)
ADVICE = "Use the checkpoint without quantization, or one in fp8, compressed-tensors, GPTQ or AWQ form."


class DequantizedView(ABC):
    """The tensors of a quantized checkpoint under the names, and with the values, of the model's weights.

    Values are computed in float32: codes have at most 8 bits and scales at most 11 in half precision, so products are
    exact there, and are rounded once, by whoever converts them.
    """

    # The last parts of the names of tensors that make up a weight; the first is there in every one.
    roles: ClassVar[tuple[str, ...]]

    def __init__(self, stored: Tensors, config: Mapping[str, Any], where: Path) -> None:
        self._stored, self._config, self._where = stored, config, where
        names = self._names = stored.names()
        mains = {name.rpartition(".")[0] for name in names if self._is_main(name)}
        self._parts: dict[str, dict[str, str]] = {f"{base}.weight": {} for base in mains}
        self._unquantized: set[str] = set()
        self.has_runtime = False
        for name in names:
            base, _, role = name.rpartition(".")
            if base in mains and role in self.roles:
                self._parts[f"{base}.weight"][role] = name
            elif role in RUNTIME:
                self.has_runtime = True
            else:
                self._unquantized.add(name)
        if not self._parts:
            raise StoreError(
                f"{where}: the quantization config says {self.scheme}, but no tensor is quantized "
                f"like this. Remove the entry from the config, or fetch the checkpoint again."
            )

    @property
    @abstractmethod
    def scheme(self) -> str:
        """The scheme in words."""

    @abstractmethod
    def shape_of(self, parts: Mapping[str, str], name: str) -> tuple[int, ...]:
        """(out, in) of a weight, from headers."""

    @abstractmethod
    def weight(self, parts: Mapping[str, str], name: str) -> Tensor:
        """float32 (out, in) of a weight. StoreError if its tensors do not fit each other."""

    def _is_main(self, name: str) -> bool:
        return name.rpartition(".")[2] == self.roles[0]

    @property
    def note(self) -> str:
        """What was done, for whoever reads the results."""
        done = f"weights dequantized from {self.scheme}"
        if self.has_runtime or self._quantizes_activations():
            done += "; the quantization of activations and KV cache that comes with it is not applied"
        return done

    def _quantizes_activations(self) -> bool:
        groups = self._config.get("config_groups") or {}
        of_groups = any(isinstance(g, Mapping) and g.get("input_activations") for g in groups.values())
        keys = ("activation_scheme", "activation_scale_ub", "kv_cache_scheme", "kv_cache_quant_algo")
        return of_groups or any(self._config.get(key) for key in keys)

    def names(self) -> frozenset[str]:
        return frozenset(self._unquantized | self._parts.keys())

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        parts = self._parts.get(name)
        if parts is None:
            return self._stored.header(name)
        return self.shape_of(parts, name), "float32"

    def tensor(self, name: str) -> Tensor:
        parts = self._parts.get(name)
        return self._stored.tensor(name) if parts is None else self.weight(parts, name)

    def _part(self, parts: Mapping[str, str], role: str, name: str) -> Tensor:
        """One of a weight's tensors."""
        if role not in parts:
            base = name.removesuffix(".weight")
            raise self.wrong(name, f"its {role} ({base}.{role}) is missing")
        return self._stored.tensor(parts[role])

    def wrong(self, name: str, what: str) -> StoreError:
        """The error of a weight whose tensors do not fit."""
        return StoreError(f"{self._where}: quantization of {name} by {self.scheme}: {what}.")

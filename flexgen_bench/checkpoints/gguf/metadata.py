"""Values of the namespace of a file's architecture, checked where they are read."""

from __future__ import annotations

import math
from typing import Any

from flexgen_bench.checkpoints.gguf.header import GGUFHeader
from flexgen_bench.checkpoints.gguf.names import architecture_of
from flexgen_bench.core.errors import StoreError


class Metadata:
    """A default of None: the key must be there. Every method raises StoreError naming a key and its value."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.space = header, architecture_of(header).name

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number; a list with one for every layer must hold the same number everywhere."""
        value = self._find(key, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if type(value) is not int or value < 0 or (value == 0 and default != 0):
            raise self.refused(key, "one whole number above 0, the same for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._find(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refused(key, "a number")
        return float(value)

    def decimal(self, key: str, default: float | None = None) -> float:
        """Stored in single precision; the decimal number that was meant."""
        return float(f"{self.number(key, default):.6g}")

    def get(self, key: str) -> Any:
        """The value as it is, None where there is none."""
        return self.header.metadata.get(f"{self.space}.{key}")

    def must_be(self, key: str, value: int, what: str = "the size of a head") -> None:
        if self.count(key, value) != value:
            raise self.refused(key, f"{value}, {what}")

    def vocab_size(self) -> int:
        tokens = self.header.metadata.get("tokenizer.ggml.tokens")
        return self.count("vocab_size", len(tokens) if isinstance(tokens, list) else None)

    def has_tensor(self, part: str, ending: str) -> bool:
        """Whether any layer has a tensor ``blk.<number>.<part>....<ending>``."""
        return any(
            name.startswith("blk.") and name.split(".")[2].startswith(part) and name.endswith(f".{ending}")
            for name in self.header.tensors
        )

    def refused(self, key: str, allowed: str) -> StoreError:
        where = f"{self.header.path}: {self.space}.{key}"
        return StoreError(f"{where} is {self.get(key)!r}; what can be read is {allowed}.")

    def _find(self, key: str, default: Any) -> Any:
        value = self.header.metadata.get(f"{self.space}.{key}", default)
        if value is None:
            raise StoreError(f"{self.header.path} does not state {self.space}.{key}. Fetch or convert it again.")
        return value

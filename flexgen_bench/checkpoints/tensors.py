"""What everything that gives a checkpoint's tensors offers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Tensors(Protocol):
    """Tensors by name, read one at a time."""

    def names(self) -> frozenset[str]: ...

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (torch's name) of a tensor, without reading it."""

    def tensor(self, name: str) -> Tensor: ...

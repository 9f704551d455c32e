"""What steps read and write."""

from __future__ import annotations

from typing import NamedTuple


class Buffer(NamedTuple):
    """A named piece of memory. Staging buffers are numbered and used in turn, so reuse shows as a dependency."""

    name: str
    key: int = 0
    layer: int = 0
    part: int = 0

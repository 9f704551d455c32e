"""The checksum of weight tensors: computed when a store is written, checked when a tensor is first read."""

from __future__ import annotations

import zlib


def checksum(data: memoryview, before: int = 0) -> int:
    """CRC-32 of bytes in host memory, going on from that of the bytes ``before`` them."""
    return zlib.crc32(data, before)

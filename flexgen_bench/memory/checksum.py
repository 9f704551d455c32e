"""CRC-32 of weight tensors: computed when a store is written, checked when a tensor is first read."""

from __future__ import annotations

import zlib

from torch import Tensor


def checksum(data: Tensor, start: int = 0) -> int:
    """CRC-32 of a uint8 tensor in host memory."""
    return zlib.crc32(data.numpy().data, start)

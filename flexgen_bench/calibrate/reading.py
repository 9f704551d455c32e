"""The rate at which a device reads its memory: what bounds every product with few rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from flexgen_bench.calibrate.site import ProbeMemory
from flexgen_bench.calibrate.stable import Probe
from flexgen_bench.core.units import MIB
from flexgen_bench.kernels.native.build import library

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 64 * MIB
# (streams, bytes prefetched ahead): which read loop is fastest differs between machines and numbers of threads.
_READ_LOOPS = ((1, 4096), (4, 1024), (8, 0))


def memory_probe(memory_of_site: ProbeMemory) -> Probe:
    """``<tier>.memory``: bytes/s of the fastest of a few read loops; of a sum where there is no native code for it."""
    size = min(_PIECE, memory_of_site.size // 4)
    turns = memory_of_site.turns(size)
    native = None if memory_of_site.site.device.is_cuda else library("bandwidth")
    read = _summed if native is None else _fastest_loop(native, turns)
    return Probe(f"{memory_of_site.site.tier}.memory", size, lambda: read(next(turns)), memory_of_site.site.settle)


def _summed(piece: Tensor) -> object:
    import torch

    return piece.view(torch.float32).sum()


def _fastest_loop(native: object, turns: Iterator[Tensor]) -> Callable[[Tensor], object]:
    import ctypes

    import torch

    assert isinstance(native, ctypes.CDLL)
    native.read_bytes.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4]

    def loop(streams: int, ahead: int) -> Callable[[Tensor], object]:
        def read(piece: Tensor) -> None:
            native.read_bytes(piece.data_ptr(), piece.numel(), streams, ahead, torch.get_num_threads())

        return read

    loops = [loop(*settings) for settings in _READ_LOOPS]
    return min(loops, key=lambda read: min(_seconds(read, next(turns)) for _ in range(3)))


def _seconds(read: Callable[[Tensor], object], piece: Tensor) -> float:
    start = time.perf_counter()
    read(piece)
    return time.perf_counter() - start

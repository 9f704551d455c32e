"""Rates of the disk: around the page cache, as the engine reads and writes, and through it, as others do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_bench.calibrate.effort import Effort
from flexgen_bench.calibrate.stable import Probe
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.units import MIB, format_bytes
from flexgen_bench.machine import host as machine
from flexgen_bench.memory import host
from flexgen_bench.memory.direct_file import DirectFile, disk_error

if TYPE_CHECKING:
    from torch import Tensor

_SPARE_BYTES = 64 * MIB  # a disk is not filled to the last byte for this
_BLOCK_BYTES = 16 * MIB


def check_folder(folder: Path, effort: Effort) -> Path:
    """A folder that can be written to and has room for the files; UserError otherwise."""
    make_writable(folder, "--disk-dir")
    need, free = 2 * effort.disk_bytes + _SPARE_BYTES, machine.free_disk_bytes(folder)
    if free < need:
        raise UserError(
            "--disk-dir",
            str(folder),
            f"a folder with {format_bytes(need)} free (it has {format_bytes(free)})",
            "Make room, or name the folder that offloaded data will be in.",
        )
    return folder


@contextmanager
def disk_probes(folder: Path, effort: Effort, pinned: bool) -> Iterator[tuple[list[Probe], bool]]:
    """``links.disk_read``, ``links.disk_write``, ``transfers.disk_read_cached``, ``transfers.disk_write_cached``; and
    whether the file system lets the page cache be gone around. The files have no names by then, so nothing is left on
    the disk.

    pinned: read into memory that is registered with CUDA, as it is beside a GPU. Raises StoreError for what the disk
    refuses.
    """
    size, piece = effort.disk_bytes, effort.disk_piece
    with ExitStack() as stack:
        direct, cached = _files(folder, stack)
        memory = host.allocate(size, pinned=pinned)
        _fill(memory)
        direct.reserve(size)
        direct.write(0, memory)
        places = [(start, memory[start : start + piece]) for start in range(0, size, piece)]

        def read(at: int, into: Tensor) -> None:
            _whole(os.preadv, cached, into, at, folder)

        def write(at: int, data: Tensor) -> None:
            _whole(os.pwritev, cached, data, at, folder)

        write(0, memory)
        os.fdatasync(cached)
        yield (
            [
                Probe("links.disk_read", piece, _each(places, direct.read)),
                Probe("links.disk_write", piece, _each(places, direct.write)),
                Probe("transfers.disk_read_cached", piece, _each(places, read)),
                # What was written to the page cache must not go to the disk while others are measured.
                Probe("transfers.disk_write_cached", piece, _each(places, write), after=lambda: os.fdatasync(cached)),
            ],
            direct.direct,
        )


def _files(folder: Path, stack: ExitStack) -> tuple[DirectFile, int]:
    """A file to go around the page cache with, and the descriptor of another one to go through it; closed by the
    stack."""
    try:
        with tempfile.TemporaryDirectory(prefix="calibration-", dir=folder) as named:
            path = Path(named)
            for name in ("direct", "cached"):
                (path / name).touch()
            direct = DirectFile(path / "direct", os.O_RDWR)
            stack.callback(direct.close)
            cached = os.open(path / "cached", os.O_RDWR)
            stack.callback(os.close, cached)
    except OSError as error:
        raise disk_error(error, folder, "make a file") from error
    return direct, cached


def _fill(memory: Tensor) -> None:
    """Something that no disk can make smaller."""
    import torch

    block = torch.frombuffer(bytearray(os.urandom(_BLOCK_BYTES)), dtype=torch.uint8)
    for start in range(0, memory.numel(), _BLOCK_BYTES):
        part = memory[start : start + _BLOCK_BYTES]
        part.copy_(block[: part.numel()])


def _whole(move: Callable[[int, list[memoryview], int], int], file: int, data: Tensor, at: int, folder: Path) -> None:
    """All of ``data`` by ``os.preadv`` or ``os.pwritev``."""
    view: memoryview = data.numpy().data
    done = 0
    try:
        while done < len(view):
            moved = move(file, [view[done:]], at + done)
            assert moved, "the file is as long as what is read of it"
            done += moved
    except OSError as error:
        raise disk_error(error, folder, f"read or write at byte {at + done}") from error


def _each(places: list[tuple[int, Tensor]], work: Callable[[int, Tensor], object]) -> Callable[[], object]:
    """One place after the other, over and over."""
    turns = cycle(places)
    return lambda: work(*next(turns))

"""Checksums of weights: judged once per process for every tensor, while the rest of its unit is still being read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from flexgen_bench.core.errors import StoreError
from flexgen_bench.memory.checksum import checksum
from flexgen_bench.memory.weight_store import WeightStore
from flexgen_bench.models.packing import PackedEntry

# Of which files (path and time of last change) which tensors (offset) were right. A disk that lies later is a disk to
# replace.
_RIGHT: set[tuple[str, int, int]] = set()


class Verification:
    """Compares what is read of a store with the checksums made when it was written."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._file = (str(store.path), store.path.stat().st_mtime_ns)

    def is_right(self, entry: PackedEntry) -> bool:
        """Whether this process has seen the tensor to be right."""
        return (*self._file, entry.offset) in _RIGHT

    def check(self, entry: PackedEntry, memory: Tensor, base: int) -> None:
        """A tensor in host memory that begins at ``base`` in the file; StoreError if it is not what was written."""
        if not self.is_right(entry):
            self.judge(entry, [checksum(memory[o - base :][:n].numpy().data) for o, n in entry.parts])

    def judge(self, entry: PackedEntry, sums: Sequence[int]) -> None:
        """The checksums found of a tensor's parts; StoreError if one is wrong."""
        for (offset, _), part_sum in zip(entry.parts, sums, strict=True):
            if part_sum != self._store.checksums.get(offset):
                path = self._store.path
                raise StoreError(
                    f"{path}: checksum of {', '.join(entry.tensor.sources)} is wrong: the block is corrupt. "
                    f"Delete {path.parent} to convert the checkpoint again."
                )
        _RIGHT.add((*self._file, entry.offset))

    def while_reading(self, entries: Sequence[PackedEntry], memory: Tensor, base: int) -> Callable[[int], None]:
        """To be told how many bytes of ``memory`` have arrived: checks every tensor as soon as it is there."""
        waiting = sorted((e for e in entries if not self.is_right(e)), key=lambda e: -e.offset)

        def arrived(count: int) -> None:
            while waiting and waiting[-1].offset + waiting[-1].num_bytes - base <= count:
                self.check(waiting.pop(), memory, base)

        return arrived

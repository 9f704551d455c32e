"""Scratch space on disk for KV cache and activations of a running job."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import Tensor

from flexgen_bench.core.folders import make_writable
from flexgen_bench.memory.direct_file import DirectFile, disk_error


class SpillFile:
    """A file of fixed size without a name: whatever happens to the process, nothing is left on the disk.

    The space is reserved up front; StoreError on a full disk, UserError if the directory is not writable.
    """

    def __init__(self, directory: Path, num_bytes: int) -> None:
        path = make_writable(directory, "offload_dir")
        try:
            handle, name = tempfile.mkstemp(prefix="spill-", dir=path)
            os.close(handle)
            try:
                self._file = DirectFile(Path(name), os.O_RDWR)
            finally:
                os.unlink(name)
        except OSError as error:
            raise disk_error(error, path, "make a file") from error
        try:
            self._file.reserve(num_bytes)
        except BaseException:
            self._file.close()
            raise
        self.direct = self._file.direct

    def read(self, offset: int, into: Tensor) -> None:
        self._file.read(offset, into)

    def write(self, offset: int, data: Tensor) -> None:
        self._file.write(offset, data)

    def close(self) -> None:
        self._file.close()

"""The tensors of a source checkpoint under the names of the full model: a folder in the style of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.model import DType

if TYPE_CHECKING:
    import torch

    from flexgen_bench.memory.checkpoint import Tensors

_ADVICE = "Fetch the checkpoint again."


class CheckpointReader:
    """Tensors by name. ``safe`` says that the files are safetensors."""

    def __init__(self, tensors: Tensors, where: Path, safe: bool) -> None:
        self._tensors, self.where, self.safe = tensors, where, safe
        self._names = tensors.names()

    def _find(self, name: str) -> str | None:
        """The name it has there. Checkpoints of the bare decoder lack the prefix."""
        bare = name.removeprefix("model.")
        return name if name in self._names else bare if bare in self._names else None

    def get(self, name: str) -> torch.Tensor:
        """The tensor called ``name`` in the full model; ``check`` has found it."""
        found = self._find(name)
        assert found is not None, f"{name} was not checked first"
        return self._tensors.tensor(found)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise StoreError naming what is missing or has the wrong shape."""
        missing = [name for name in expected if self._find(name) is None]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise StoreError(
                f"{self.where} lacks {len(missing)} of {len(expected)} tensors: {shown}. {_ADVICE}"
            )
        for name, shape in expected.items():
            found, _ = self._tensors.header(self._find(name) or name)
            if found != shape:
                raise StoreError(
                    f"{self.where}: tensor {name} has shape {found}, the model needs {shape}"
                )

    def is_plain(self, expected: Mapping[str, tuple[int, ...]], dtype: DType) -> bool:
        """Whether every system can read the files as they are: safetensors, the usual names, this dtype."""
        return self.safe and all(
            name in self._names and self._tensors.header(name)[1] == dtype.value
            for name in expected
        )


def open_folder(folder: Path) -> CheckpointReader:
    """The tensors of a Hugging Face style folder. Safetensors win over pickles where both are there."""
    from flexgen_bench.memory.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    return CheckpointReader(checkpoint, folder, checkpoint.is_safetensors)

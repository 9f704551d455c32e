"""The tensors of a GGUF file under the names of the full model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_bench.core.errors import StoreError

if TYPE_CHECKING:
    import torch

    from flexgen_bench.memory.checkpoint import Tensors

_ADVICE = "Fetch the checkpoint again."


class CheckpointReader:
    """Tensors by name."""

    def __init__(self, tensors: Tensors, where: Path) -> None:
        self._tensors, self.where = tensors, where
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


class _InMemory:
    """Tensors that are all in memory already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        found = self._tensors[name]
        return tuple(found.shape), str(found.dtype).removeprefix("torch.")

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


def open_gguf(path: Path) -> tuple[CheckpointReader, Any]:
    """The tensors of a GGUF file and its config, through transformers, which holds the whole model in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is the only one on the screen
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    except ImportError as error:
        raise StoreError(
            f"reading {path.name} needs two more packages: pip install 'flexgen-bench[gguf]' ({error})"
        ) from error
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise StoreError(
            f"{path} is damaged or of a kind transformers cannot read ({error})"
        ) from error
    config = model.config
    config.architectures = [type(model).__name__]
    # GGUF stores this in single precision; take the decimal number that was meant.
    if hasattr(config, "rms_norm_eps"):
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    return CheckpointReader(_InMemory(dict(model.named_parameters())), path), config

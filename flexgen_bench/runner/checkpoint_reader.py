"""Reading the tensors of a checkpoint folder one at a time: safetensors or pickle, sharded or not, and GGUF."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.model import DType

if TYPE_CHECKING:
    import torch

_ADVICE = "Fetch the checkpoint again."
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what its header says, and how to read it."""

    shape: tuple[int, ...]
    dtype: str  # torch's name
    read: Callable[[], torch.Tensor]


class CheckpointReader:
    """Tensors by name. ``safe`` says that the files are safetensors."""

    def __init__(self, tensors: Mapping[str, StoredTensor], where: Path, safe: bool) -> None:
        self._tensors, self.where, self.safe = dict(tensors), where, safe

    def _find(self, name: str) -> StoredTensor | None:
        # Checkpoints of the bare decoder lack the prefix.
        return self._tensors.get(name) or self._tensors.get(name.removeprefix("model."))

    def get(self, name: str) -> torch.Tensor:
        """The tensor called ``name`` in the full model; ``check`` has found it."""
        found = self._find(name)
        assert found is not None, f"{name} was not checked first"
        return found.read()

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise StoreError naming what is missing or has the wrong shape."""
        missing = [name for name in expected if self._find(name) is None]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise StoreError(
                f"{self.where} lacks {len(missing)} of {len(expected)} tensors: {shown}. {_ADVICE}"
            )
        for name, shape in expected.items():
            found = self._find(name)
            if found is not None and found.shape != shape:
                raise StoreError(
                    f"{self.where}: tensor {name} has shape {found.shape}, the model needs {shape}"
                )

    def is_plain(self, expected: Mapping[str, tuple[int, ...]], dtype: DType) -> bool:
        """Whether every system can read the files as they are: safetensors, the usual names, this dtype."""
        return self.safe and all(
            name in self._tensors and self._tensors[name].dtype == dtype.value for name in expected
        )


def open_folder(folder: Path) -> CheckpointReader:
    """The tensors of a Hugging Face style folder. Safetensors win over pickles where both are there."""
    for single, opener in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickle)):
        index = folder / f"{single}.index.json"
        if index.is_file():
            parts = [opener(folder / part) for part in _parts(index)]
            return CheckpointReader(_merge(parts), folder, opener is _safetensors)
        if (folder / single).is_file():
            return CheckpointReader(opener(folder / single), folder, opener is _safetensors)
    raise StoreError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index"
    )


def _parts(index: Path) -> list[str]:
    try:
        parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise StoreError(f"{index} is not a weight index ({error!r}). {_ADVICE}") from error
    for part in parts:
        if Path(part).name != part:
            raise StoreError(f"{index} names {part!r}, which is not a file of the same folder")
        if not (index.parent / part).is_file():
            raise StoreError(
                f"{index.parent} lacks the shard {part} that its index names. {_ADVICE}"
            )
    return parts


def _merge(parts: Iterable[Mapping[str, StoredTensor]]) -> dict[str, StoredTensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise StoreError(
            f"{path} is truncated or not a safetensors file ({error}). {_ADVICE}"
        ) from error
    return {
        name: StoredTensor(
            tuple(part.get_shape()),
            _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()),
            partial(file.get_tensor, name),
        )
        for name, part in slices.items()
    }


def _in_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(tuple(t.shape), str(t.dtype).removeprefix("torch."), t.detach)
        for name, t in tensors.items()
    }


def _pickle(path: Path) -> dict[str, StoredTensor]:
    """Only tensors are unpickled; anything else in the file is refused, so nothing of it can run."""
    import torch

    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files of before torch 1.6 cannot be mapped
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise StoreError(
            f"{path} holds more than tensors, or is damaged; it was not loaded, because a pickle can run code "
            f"({str(error).splitlines()[0]}). Use a safetensors checkpoint."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise StoreError(
            f"{path} is truncated or not a torch checkpoint ({error}). {_ADVICE}"
        ) from error
    if not isinstance(state, dict):
        raise StoreError(f"{path} holds a {type(state).__name__}, not a state dictionary")
    return _in_memory({n: t for n, t in state.items() if isinstance(t, torch.Tensor)})


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
    return CheckpointReader(_in_memory(dict(model.named_parameters())), path, False), config

"""Checkpoints as people have them: safetensors or .bin, sharded or not, read one tensor at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flexgen_bench.core.errors import StoreError

_ADVICE = "Fetch the checkpoint again."
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensors(Protocol):
    """Tensors by name, read one at a time."""

    def names(self) -> frozenset[str]: ...

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (torch's name) of a tensor, without reading it."""

    def tensor(self, name: str) -> Tensor: ...


class Checkpoint:
    """The tensors of a checkpoint folder by name. Nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise StoreError(f"checkpoint folder {folder} does not exist.")
        self.config = read_config(folder)
        self._where, self._open = self._index()
        self._handles: dict[str, Any] = {}
        self.files = [folder / name for name in sorted(set(self._where.values()))]
        self.is_safetensors = self._open is _open_safetensors

    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (torch's name) of a tensor, without reading it."""
        handle = self._handle(name)
        if hasattr(handle, "get_slice"):
            part = handle.get_slice(name)
            kind = str(part.get_dtype())
            return tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(kind, kind)
        found = self._only_tensor(handle[name], name)
        return tuple(found.shape), str(found.dtype).removeprefix("torch.")

    def tensor(self, name: str) -> Tensor:
        """One tensor in the checkpoint's own dtype; StoreError if it is missing or its file is damaged."""
        handle = self._handle(name)
        try:
            found = handle.get_tensor(name) if hasattr(handle, "get_tensor") else handle[name]
        except Exception as error:
            where = self.folder / self._where[name]
            raise StoreError(f"tensor {name} in {where} cannot be read: {error}") from error
        return self._only_tensor(found, name)

    def close(self) -> None:
        self._handles.clear()

    def _handle(self, name: str) -> Any:
        if name not in self._where:
            raise StoreError(f"tensor {name} is missing in checkpoint {self.folder}.")
        file = self._where[name]
        if file not in self._handles:
            self._handles.clear()  # one shard open at a time
            self._handles[file] = self._open(self.folder / file)
        if name not in self._handles[file].keys():  # noqa: SIM118  (a safetensors file is not a dict)
            raise StoreError(
                f"tensor {name} is not in {self.folder / file}, where the index says it is."
            )
        return self._handles[file]

    def _only_tensor(self, found: Any, name: str) -> Tensor:
        if not isinstance(found, Tensor):
            raise StoreError(f"{name} in {self.folder / self._where[name]} is not a tensor.")
        return found

    def _index(self) -> tuple[dict[str, str], Callable[[Path], Any]]:
        for stem, opener in (
            ("model.safetensors", _open_safetensors),
            ("pytorch_model.bin", _open_bin),
        ):
            index = self.folder / f"{stem}.index.json"
            if index.exists():
                where = _read_index(index)
                for file in sorted(set(where.values())):
                    if not (self.folder / file).exists():
                        raise StoreError(
                            f"{index} names {file}, which is missing in {self.folder}."
                        )
                return where, opener
            if (self.folder / stem).exists():
                handle = opener(self.folder / stem)
                return dict.fromkeys(handle.keys(), stem), opener
        raise StoreError(
            f"{self.folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. StoreError if there is none or it is not one."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StoreError(
            f"{folder} has no config.json, so it is not a checkpoint folder."
        ) from error
    except ValueError as error:
        raise StoreError(f"{path} is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise StoreError(f"{path} does not hold a JSON object.")
    return config


def _read_index(path: Path) -> dict[str, str]:
    try:
        where = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a checkpoint index: {error!r}") from error
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise StoreError(
            f"{path} is not a checkpoint index: weight_map does not map names to files."
        )
    for file in where.values():
        if Path(file).name != file:  # an index must not reach outside its folder
            raise StoreError(f"{path} names {file!r}, which is not a file of the same folder.")
    return dict(where)


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise StoreError(
            f"{path} is truncated or not a safetensors file ({error}). {_ADVICE}"
        ) from error


def _open_bin(path: Path) -> dict[str, Any]:
    """Pickle files load with weights_only: nothing in a checkpoint is ever executed."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        # Without torch's own text: it recommends to load the file in the way that runs code.
        raise StoreError(
            f"{path} holds more than tensors, or is damaged; a pickle of other things can run code, so it is "
            "not loaded. Use a checkpoint in safetensors."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise StoreError(f"{path} is truncated or damaged ({error}). {_ADVICE}") from error
    if not isinstance(loaded, dict):
        raise StoreError(f"{path} holds a {type(loaded).__name__}, not names and tensors.")
    return loaded


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"

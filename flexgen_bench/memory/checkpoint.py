"""Checkpoints as people have them: safetensors or .bin, sharded or not, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexgen_bench.core.errors import StoreError


class Checkpoint:
    """The tensors of a checkpoint folder by name. Nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise StoreError(f"checkpoint folder {folder} does not exist.")
        self.config = self._read_config()
        self._where, self._open = self._index()
        self._handles: dict[str, Any] = {}
        self.files = [folder / name for name in sorted(set(self._where.values()))]

    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def tensor(self, name: str) -> Tensor:
        """One tensor in the checkpoint's own dtype; StoreError if it is missing or its file is damaged."""
        if name not in self._where:
            raise StoreError(f"tensor {name} is missing in checkpoint {self.folder}.")
        file = self._where[name]
        if file not in self._handles:
            self._handles.clear()  # one shard open at a time
            self._handles[file] = self._open(self.folder / file)
        handle = self._handles[file]
        try:
            found = handle.get_tensor(name) if hasattr(handle, "get_tensor") else handle[name]
        except Exception as error:
            raise StoreError(
                f"tensor {name} in {self.folder / file} cannot be read: {error}"
            ) from error
        if not isinstance(found, Tensor):
            raise StoreError(f"{name} in {self.folder / file} is not a tensor.")
        return found

    def close(self) -> None:
        self._handles.clear()

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing: not a checkpoint folder.") from error
        except ValueError as error:
            raise StoreError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise StoreError(f"{path} does not hold a JSON object.")
        return config

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
            f"{self.folder} holds neither model.safetensors nor pytorch_model.bin, whole or sharded."
        )


def _read_index(path: Path) -> dict[str, str]:
    try:
        where = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a checkpoint index: {error!r}") from error
    for file in where.values():
        if Path(file).name != file:  # an index must not reach outside its folder
            raise StoreError(f"{path} names {file!r}, which is not a plain file name.")
    return dict(where)


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is damaged or truncated: {error}") from error


def _open_bin(path: Path) -> dict[str, Any]:
    """Pickle files load with weights_only: nothing in a checkpoint is ever executed."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:
        raise StoreError(f"{path} is damaged, or holds more than tensors: {error}") from error
    if not isinstance(loaded, dict):
        raise StoreError(f"{path} does not hold a mapping of names to tensors.")
    return loaded


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"

"""The weight files of a checkpoint folder, safetensors or .bin, sharded or not: which tensor lies where, read one at a
time."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexgen_bench.core.errors import StoreError

_log = logging.getLogger("flexgen_bench.stage")
_ADVICE = "Fetch the checkpoint again."
# What the format calls its element types, and torch's names for them (safetensors 0.8, "Format").
_SAFETENSORS_DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class CheckpointFiles:
    """Tensors by the names that they have in the files. One file is kept open at a time.

    Which files there are is decided as transformers 5 does: safetensors before pickles, one file before an index, and
    of an index only the names of its shards count: every tensor in them is there.
    """

    def __init__(self, folder: Path) -> None:
        """Raises StoreError for files that are missing or damaged, or that contradict each other."""
        self.folder = folder
        self._handles: dict[str, Any] = {}
        files, self._open, listed = _choose(folder)
        self.files = [folder / name for name in files]
        self.is_safetensors = self._open is _open_safetensors
        self._where: dict[str, str] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in files:
            handle = self._of(file)
            for name in handle.keys():  # noqa: SIM118  (a safetensors file is not a dict)
                if name in self._where:
                    self._check_same(name, self._where[name], file)
                self._where[name] = file
                self._headers[name] = _header(handle, name)
        absent = sorted(listed - set(self._where))
        if absent:
            raise StoreError(
                f"the index in {folder} lists {len(absent)} tensors that no shard holds: {shown(absent)}. {_ADVICE}"
            )

    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def in_order(self) -> list[str]:
        """All names as the files have them, those of the first file first."""
        return list(self._where)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (torch's name) of a tensor, without reading it."""
        if name not in self._headers:
            raise self._missing(name)
        return self._headers[name]

    def tensor(self, name: str) -> Tensor:
        """One tensor in its own dtype; StoreError if it is missing or its file is damaged."""
        if name not in self._where:
            raise self._missing(name)
        handle = self._of(self._where[name])
        try:
            value = _read(handle, name)
        except Exception as error:
            where = self.folder / self._where[name]
            raise StoreError(f"tensor {name} in {where} cannot be read: {error}") from error
        return self._only_tensor(value, name)

    def close(self) -> None:
        self._handles = {}

    def _missing(self, name: str) -> StoreError:
        return StoreError(f"tensor {name} is missing in checkpoint {self.folder}.")

    def _of(self, file: str) -> Any:
        """Several threads may ask: each keeps what it has been given."""
        handle = self._handles.get(file)
        if handle is None:
            handle = self._open(self.folder / file)
            self._handles = {file: handle}
        return handle

    def _check_same(self, name: str, first: str, second: str) -> None:
        """A tensor in two shards must be the same in both: nothing says which one is meant."""
        one = self._only_tensor(_read(self._of(first), name), name).clone()
        two = self._only_tensor(_read(self._of(second), name), name)
        if one.dtype != two.dtype or not torch.equal(one, two):
            raise StoreError(
                f"tensor {name} is in {first} and in {second} of {self.folder}, with different values. {_ADVICE}"
            )

    def _only_tensor(self, value: Any, name: str) -> Tensor:
        if not isinstance(value, Tensor):
            raise StoreError(f"{name} in {self.folder} is a {type(value).__name__}, not a tensor.")
        return value


def shown(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_json(path: Path) -> Any:
    """A JSON file as people have them: also with a byte order mark. Raises OSError, ValueError."""
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _choose(folder: Path) -> tuple[list[str], Callable[[Path], Any], set[str]]:
    """The files, how to open them, and the tensors that an index says they hold."""
    for single, opener in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_bin)):
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            if index.exists() and set(_read_index(index).values()) != {single}:
                _log.warning("%s holds both %s and shards: %s is read", folder, single, single)
            return [single], opener, set()
        if index.exists():
            where = _read_index(index)
            files = sorted(set(where.values()))
            for file in files:
                if not (folder / file).exists():
                    raise StoreError(f"{index} names {file}, which is missing in {folder}.")
            return files, opener, set(where)
    others = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (".safetensors", ".bin", ".pt"))
    raise StoreError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index "
        f"of shards{f' (only {shown(others)}, which nothing names)' if others else ''}."
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        where = read_json(path)["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a checkpoint index: {error!r}") from error
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise StoreError(f"{path} is not a checkpoint index: weight_map does not map names to files.")
    if not where:
        raise StoreError(f"{path} names no tensors. {_ADVICE}")
    for file in where.values():
        if Path(file).name != file:  # an index must not reach outside its folder
            raise StoreError(f"{path} names {file!r}, which is not a file of the same folder.")
    return dict(where)


def _header(handle: Any, name: str) -> tuple[tuple[int, ...], str]:
    """What a pickle holds beside tensors has no shape, and the name of its class for a dtype."""
    if hasattr(handle, "get_slice"):
        part = handle.get_slice(name)
        kind = str(part.get_dtype())
        return tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(kind, kind)
    value = handle[name]
    if not isinstance(value, Tensor):
        return (), type(value).__name__
    return tuple(value.shape), str(value.dtype).removeprefix("torch.")


def _read(handle: Any, name: str) -> Any:
    return handle.get_tensor(name) if hasattr(handle, "get_tensor") else handle[name]


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is truncated or not a safetensors file ({error}). {_ADVICE}") from error


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

"""The header of a GGUF file: its metadata, and which tensors lie where.

Format: the GGUF specification of the ggml project (versions 2 and 3, little-endian). A header of our own, since the
reader of the ``gguf`` package makes a numpy view of every string: 10 s and 170 MB for a vocabulary of 49,152 tokens
(MEASURED on two cores shared with others), where this takes 0.13 s and what the strings take.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import StoreError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where general.alignment does not say otherwise
_MOST_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
# struct's letter for each type of number in the metadata.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. ``shape`` is in the order of numpy and torch: the last dimension is contiguous.

    kind: ggml's number of the way in which its values are stored. offset: in bytes, from the beginning of ``file``.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    file: Path
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file, or all parts of a split one, says about itself."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def parts_of(path: Path) -> list[Path]:
    """All files of a model that is split over ``NAME-00001-of-00003.gguf`` and so on; else the file alone."""
    match = _PART.search(path.name)
    if not match:
        return [path]
    stem, suffix, count = path.name[: match.start()], path.suffix, int(match[2])
    return [path.with_name(f"{stem}-{n:05d}-of-{count:05d}{suffix}") for n in range(1, count + 1)]


def read_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file and of its other parts. StoreError naming what is missing or damaged."""
    first = _read_part(path)
    count = first.metadata.get("split.count", 1)
    if count <= 1:
        return first
    parts = parts_of(path)
    if len(parts) != count:
        raise StoreError(
            f"{path} is part of a model in {count} files, which its name does not say. Give the parts their names back "
            f"(NAME-00001-of-{count:05d}.gguf), or join them with llama-gguf-split --merge."
        )
    if first.metadata.get("split.no") != 0:
        raise StoreError(f"{path} is not the first part of its model. Name {parts[0].name}.")
    tensors = dict(first.tensors)
    for number, part in enumerate(parts[1:], 1):
        header = _read_part(part)
        if header.metadata.get("split.no") != number:
            raise StoreError(f"{part} is not part {number + 1} of {path.name}, as its name says.")
        twice = sorted(tensors.keys() & header.tensors.keys())
        if twice:
            raise StoreError(f"{part} holds tensor {twice[0]}, which an earlier part has, too.")
        tensors |= header.tensors
    stated = first.metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise StoreError(f"the parts of {path} hold {len(tensors)} tensors, not {stated}.")
    return GGUFHeader(path, first.metadata, tensors)


def _read_part(path: Path) -> GGUFHeader:
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise _damaged(path, "it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist.") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (struct.error, _TooShortError) as error:
        raise _damaged(path, "it ends inside its header") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, f"a text in its header is not UTF-8 ({error})") from error


def _parse(path: Path, data: mmap.mmap) -> GGUFHeader:
    if data[:4] != _MAGIC:
        raise StoreError(f"{path} is not a GGUF file: it begins with {data[:4]!r}.")
    scan = _Scan(data)
    version = scan.number("I")
    if version not in _VERSIONS:
        raise StoreError(
            f"{path} is a GGUF file of version {version} (or of a machine with the other byte order); "
            f"versions {_VERSIONS[0]} and {_VERSIONS[1]}, little-endian, can be read. Convert it again."
        )
    num_tensors, num_keys = scan.number("Q"), scan.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key, kind = scan.text(), scan.number("I")
        if key in metadata:
            raise _damaged(path, f"metadata {key} is there twice")
        try:
            metadata[key] = scan.value(kind)
        except _UnknownTypeError as error:
            raise _damaged(path, f"metadata {key} is of an unknown type ({error})") from error
    listed = []
    for _ in range(num_tensors):
        name, rank = scan.text(), scan.number("I")
        if rank > _MOST_DIMENSIONS:
            raise _damaged(path, f"tensor {name} has {rank} dimensions")
        dims = tuple(scan.number("Q") for _ in range(rank))
        kind, offset = scan.number("I"), scan.number("Q")
        listed.append((name, dims[::-1], kind, offset))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _damaged(path, f"general.alignment is {alignment!r}")
    start = math.ceil(scan.at / alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in listed:
        if name in tensors:
            raise _damaged(path, f"tensor {name} is there twice")
        tensors[name] = TensorInfo(name, shape, kind, path, start + offset)
    return GGUFHeader(path, metadata, tensors)


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(f"{path} is damaged or was not fetched whole: {what}. Fetch it again.")


class _TooShortError(Exception):
    """The file ends before what its header announces."""


class _UnknownTypeError(Exception):
    """A metadata value of a type that the specification does not know."""


class _Scan:
    """Reads one value after the other. ``at`` is the next byte."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, len(_MAGIC)

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self._data, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def text(self) -> str:
        return self._bytes(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _NUMBERS:
            raise _UnknownTypeError(kind)
        return self.number(_NUMBERS[kind])

    def _array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            letter = _NUMBERS[kind]
            raw = self._bytes(count * struct.calcsize(f"<{letter}"))
            return [value for (value,) in struct.iter_unpack(f"<{letter}", raw)]
        if kind not in (_STRING, _ARRAY):
            raise _UnknownTypeError(kind)
        if count > len(self._data):  # every entry takes bytes: do not loop for ages
            raise _TooShortError
        return [self.value(kind) for _ in range(count)]

    def _bytes(self, count: int) -> bytes:
        data = self._data[self.at : self.at + count]
        if len(data) != count:
            raise _TooShortError
        self.at += count
        return data

"""Writing a checkpoint folder tensor by tensor: whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.model import DType
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.units import MIB, format_bytes

if TYPE_CHECKING:
    import torch


SHARD_BYTES = 400 * 10**6
MANIFEST = "flexgen_bench.json"
# Element types by torch's name: safetensors' name, and bytes.
_TYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "uint8": ("U8", 1)}


def write_weights(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    dtype: DType,
    get: Callable[[str], torch.Tensor],
    progress: Progress,
    others: Mapping[str, str] = {},
) -> None:
    """Write every expected tensor as ``dtype``, ``others`` as they say by name, one after the other; no more than three
    are in memory."""
    types = {name: others.get(name, dtype.value) for name in expected}
    sizes = {name: math.prod(shape) * _TYPES[types[name]][1] for name, shape in expected.items()}
    shards = plan_shards(sizes)
    total, done = sum(sizes.values()), 0
    where: dict[str, str] = {}
    progress("convert", 0, total)
    with ThreadPoolExecutor(2) as pool:
        made = _ahead(pool, lambda name: _as(get(name), types[name]), expected)
        for number, names in enumerate(shards, 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with (folder / file).open("wb") as out:
                out.write(_shard_header({name: expected[name] for name in names}, types))
                for name in names:
                    _write_tensor(out, name, next(made), expected[name])
                    done += sizes[name]
                    progress("convert", done, total)
            where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _ahead(
    pool: ThreadPoolExecutor, make: Callable[[str], torch.Tensor], names: Iterable[str]
) -> Iterator[torch.Tensor]:
    """What ``make`` makes of every name, in order, two at a time: making a tensor takes longer than writing it."""
    under_way: deque[Future[torch.Tensor]] = deque()
    for name in names:
        under_way.append(pool.submit(make, name))
        if len(under_way) > 2:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _shard_header(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> bytes:
    """The header of a safetensors file (its format: 8 bytes of length, JSON, the tensors without gaps).

    The package itself wants all tensors of a file in memory at once.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        kind, num_bytes = _TYPES[types[name]]
        start, end = end, end + math.prod(shape) * num_bytes
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _write_tensor(out: BinaryIO, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    import torch

    assert tuple(tensor.shape) == tuple(shape), f"{name} has shape {tuple(tensor.shape)}"
    out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def write_repeated(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    dtype: DType,
    get: Callable[[str], torch.Tensor],
    first: Callable[[str], str],
    progress: Progress,
    others: Mapping[str, str] = {},
) -> None:
    """Write every expected tensor as ``dtype``, ``others`` as they say by name, and those with the same ``first`` name
    as one piece of memory in one file.

    Only torch's own format can hold a piece of memory under several names.
    """
    import torch

    types = {name: others.get(name, dtype.value) for name in expected}
    sizes = {name: math.prod(shape) * _TYPES[types[name]][1] for name, shape in expected.items()}
    unique = list(dict.fromkeys(map(first, expected)))
    total, done, made = sum(sizes[name] for name in unique), 0, {}
    with ThreadPoolExecutor(2) as pool:
        as_wanted = pool.map(lambda n: _as(get(n), types[n]), unique)
        for name, tensor in zip(unique, as_wanted, strict=True):
            made[name] = tensor
            done += sizes[name]
            progress("convert", done, total)
    tensors = {name: made[first(name)] for name in expected}
    for name, shape in expected.items():
        assert tuple(tensors[name].shape) == tuple(shape), f"{name} does not repeat {first(name)}"
    torch.save(tensors, folder / "pytorch_model.bin")


def _as(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    import torch

    made = tensor.to(getattr(torch, kind)).contiguous()
    limit = torch.finfo(torch.float16).max
    if kind == "float16" and tensor.dtype is not torch.float16 and float(tensor.abs().max()) > limit:
        raise StoreError(
            f"the checkpoint holds values beyond {limit:g}, the largest of float16. Use dtype=bfloat16 or float32."
        )
    return made


def plan_shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in order, cut so that no shard exceeds SHARD_BYTES unless a single tensor does."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


@contextmanager
def new_folder(target: Path, need_bytes: int) -> Iterator[Path]:
    """A temporary folder that takes the name ``target`` if the block ends well, and vanishes if it does not.

    The caller holds the lock of ``target``, so what an earlier, killed process left is removed first.
    Raises StoreError if the disk is too small or fills up, or cannot be written.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
        free = shutil.disk_usage(part).free
        if free < need_bytes + 16 * MIB:
            raise StoreError(_full(target, need_bytes, free))
        yield part
        write_manifest(part)
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StoreError(_full(target, need_bytes, 0)) from error
        raise StoreError(f"cannot write {target}: {error.strerror or error}. Choose another cache_dir.") from error
    except Exception as error:
        # safetensors reports a full disk as an error of its own.
        if type(error).__name__ == "SafetensorError" and "No space left" in str(error):
            raise StoreError(_full(target, need_bytes, 0)) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _full(target: Path, need_bytes: int, free: int) -> str:
    return (
        f"{target} needs {format_bytes(need_bytes)} of disk and {format_bytes(free)} are free. "
        "Make room, or choose another disk with cache_dir=/path."
    )


def write_manifest(folder: Path) -> None:
    """List the files with their sizes: what ``is_complete`` compares."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def is_complete(folder: Path) -> bool:
    """Whether the folder was finished and every file still has the size it was written with."""
    try:
        listed: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in listed["files"].items())
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return False


def needed_bytes(expected: Mapping[str, Sequence[int]], dtype: DType, others: Mapping[str, str] = {}) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(math.prod(shape) * _TYPES[others.get(name, dtype.value)][1] for name, shape in expected.items())

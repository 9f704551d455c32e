"""The packed weight store: one file with every unit of a model in one extent, and a manifest that makes it valid.

A store is complete exactly when ``manifest.json`` exists, and that is written last. Conversion streams a
checkpoint tensor by tensor into ``weights.partial``; units that are safely on disk are noted in a journal, so
that an interrupted conversion goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexgen_bench.checkpoints.quantized.microscaled import LARGEST_HALF_SCALE, LARGEST_SCALE, check_scales
from flexgen_bench.checkpoints.reader import Checkpoint
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import Compression
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.microscaling import Microscaling
from flexgen_bench.core.model import DType
from flexgen_bench.core.units import PAGE, aligned
from flexgen_bench.memory.direct_file import DirectFile, disk_error
from flexgen_bench.memory.importance import IMPORTANCE, check_importance, importance_of, is_calibrated
from flexgen_bench.memory.repeated_file import Repeat, RepeatedFile
from flexgen_bench.memory.stored_tensor import StoredTensor, write_microscaled, write_tensor

FORMAT_VERSION = 1
COMPRESSED_VERSION = 2  # of codes and parameters; plain stores stay valid when it changes
TORCH_DTYPES = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16}


@dataclass(frozen=True)
class StorePlan:
    """What a store holds: groups of tensors (written and noted as one), total size, dtype, name prefixes.

    compression: of the tensors that have one; part of the fingerprint.
    """

    groups: tuple[tuple[StoredTensor, ...], ...]
    file_bytes: int
    dtype: DType
    prefixes: tuple[str, ...]
    description: Mapping[str, Any]
    compression: Compression | None = None


@dataclass(frozen=True)
class WeightStore:
    """A complete store: the packed file, and checksums by offset (of a tensor, or of its codes and its parameters)."""

    path: Path
    checksums: Mapping[int, int]
    repeats: tuple[Repeat, ...] = ()

    def open(self) -> DirectFile:
        """The packed file, to read from."""
        return RepeatedFile(self.path, self.repeats) if self.repeats else DirectFile(self.path)


def fingerprint(plan: StorePlan, files: list[Path], quantization: Mapping[str, Any] | None = None) -> str:
    """Changes whenever the checkpoint's files, what it says about its quantization, the model, the format or the
    compression do."""
    stamp = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    what: list[Any] = [FORMAT_VERSION, plan.dtype, plan.description, stamp]
    if quantization is not None:
        what.append(["dequantized", quantization])
    if plan.compression is not None:
        what += [COMPRESSED_VERSION, to_json(plan.compression)]
    text = json.dumps(what, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def open_or_convert(
    checkpoint: Checkpoint,
    plan: StorePlan,
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WeightStore:
    """The store for this checkpoint, converted first if it does not exist yet.

    progress is called with (bytes done, bytes in all). Raises StoreError if a tensor is missing, misshapen, not
    finite, or (compressed) outside float16, or if the disk is full; what was converted until then is kept and used by
    the next attempt.
    """
    if is_calibrated(plan.compression):
        check_importance(checkpoint.folder)
    stamp = fingerprint(plan, _files(checkpoint, plan), checkpoint.quantization)
    folder = make_writable(cache, "cache_dir") / stamp
    with _locked(folder):
        if not (folder / "manifest.json").exists():
            _convert(checkpoint, plan, folder, progress)
        return _open(folder, plan)


def is_complete(checkpoint: Checkpoint, plan: StorePlan, cache: Path) -> bool:
    """Whether the store for this checkpoint exists."""
    files = _files(checkpoint, plan)
    if not files[-1].exists():
        return False
    stamp = fingerprint(plan, files, checkpoint.quantization)
    return (cache / stamp / "manifest.json").exists()


def _files(checkpoint: Checkpoint, plan: StorePlan) -> list[Path]:
    """What the store is made of."""
    calibrated = is_calibrated(plan.compression)
    return checkpoint.files + ([checkpoint.folder / IMPORTANCE] if calibrated else [])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, then finds the store complete
        yield


def _open(folder: Path, plan: StorePlan) -> WeightStore:
    path = folder / "weights.bin"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        checksums = {int(k): int(v) for k, v in manifest["checksums"].items()}
        repeats = tuple(Repeat(*extent) for extent in manifest.get("repeats", []))
        size = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"weight store {folder} is damaged ({error!r}). Delete it to convert again.") from error
    if size != plan.file_bytes or manifest.get("file_bytes") != plan.file_bytes:
        raise StoreError(
            f"{path} has {size} bytes instead of {plan.file_bytes}: it is truncated or of another model. "
            f"Delete {folder} to convert again."
        )
    return WeightStore(path, checksums, repeats)


def _convert(checkpoint: Checkpoint, plan: StorePlan, folder: Path, progress: Callable[[int, int], None]) -> None:
    partial, journal = folder / "weights.partial", folder / "journal.jsonl"
    # A journal speaks of the partial file beside it, and of no other.
    done = _read_journal(journal) if partial.exists() else {}
    total = sum(t.num_bytes for group in plan.groups for t in group)
    written = 0
    same_as = _same_groups(checkpoint, plan)
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if same_as:
                os.ftruncate(fd, plan.file_bytes)  # what is repeated stays a hole
            else:
                os.posix_fallocate(fd, 0, plan.file_bytes)
            with journal.open("a" if done else "w") as notes:
                for number, group in enumerate(plan.groups):
                    if number in same_as:
                        first = same_as[number]
                        moved = group[0].offset - plan.groups[first][0].offset
                        done[number] = {str(int(at) + moved): v for at, v in done[first].items()}
                    elif number not in done:
                        done[number] = _write_group(fd, checkpoint, plan, group)
                        os.fdatasync(fd)  # the note may only follow what it notes
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                        notes.write(json.dumps([number, done[number]]) + "\n")
                        notes.flush()
                    written += sum(t.num_bytes for t in group)
                    progress(written, total)
        finally:
            os.close(fd)
        os.rename(partial, folder / "weights.bin")
        checksums = {str(k): v for sums in done.values() for k, v in sums.items()}
        manifest = {
            "format_version": FORMAT_VERSION,
            "dtype": plan.dtype.value,
            "file_bytes": plan.file_bytes,
            "description": dict(plan.description),
            "compression": plan.compression and to_json(plan.compression),
            "checksums": checksums,
            "repeats": [_extent(plan, number, first) for number, first in same_as.items()],
        }
        _write_durably(folder / "manifest.json", json.dumps(manifest))
    except OSError as error:
        raise disk_error(error, partial, "write packed weights") from error
    journal.unlink()


def _same_groups(checkpoint: Checkpoint, plan: StorePlan) -> dict[int, int]:
    """Groups whose tensors are, one by one, the same memory as an earlier group's: its number by theirs.

    Only one file in torch's own format can hold a piece of memory under several names (large dummy models do).
    """
    if checkpoint.is_safetensors or len(checkpoint.files) != 1:
        return {}
    seen: dict[tuple[int, ...], int] = {}
    same_as: dict[int, int] = {}
    for number, group in enumerate(plan.groups):
        if len(group) > 1 and group[0].offset % PAGE == 0:  # a layer: it has its pages for itself
            sources = [_find(checkpoint, plan, name) for stored in group for name in stored.sources]
            first = seen.setdefault(tuple(tensor.data_ptr() for tensor in sources), number)
            if first != number:
                same_as[number] = first
    return same_as


def _extent(plan: StorePlan, number: int, first: int) -> tuple[int, int, int]:
    """Start and stop of a group, and where the group it repeats starts."""
    group = plan.groups[number]
    stop = group[-1].offset + group[-1].num_bytes
    return group[0].offset, aligned(stop), plan.groups[first][0].offset


def _read_journal(path: Path) -> dict[int, dict[str, int]]:
    """Groups noted as complete. A line cut short by a crash is the end of the journal."""
    done: dict[int, dict[str, int]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                number, sums = json.loads(line)
            except ValueError:
                break
            done[int(number)] = sums
    return done


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def _write_group(fd: int, checkpoint: Checkpoint, plan: StorePlan, group: tuple[StoredTensor, ...]) -> dict[str, int]:
    """Write the tensors of one group; returns checksums by offset."""
    sums: dict[str, int] = {}
    for stored in group:
        if isinstance(stored.compression, Microscaling):
            checksums = write_microscaled(fd, stored, _microscaled(checkpoint, plan, stored))
        else:
            weights: list[Tensor] = []
            if is_calibrated(stored.compression):
                weights = [_importance(checkpoint, plan, stored, name) for name in stored.sources]
            sources = _sources(checkpoint, plan, stored)
            checksums = write_tensor(fd, stored, sources, TORCH_DTYPES[stored.dtype or plan.dtype], weights)
        sums |= {str(offset): value for offset, value in checksums.items()}
    return sums


def _sources(checkpoint: Checkpoint, plan: StorePlan, stored: StoredTensor) -> Iterator[Tensor]:
    """The checkpoint tensors that one packed tensor is made of, checked, one at a time."""
    for number, source in enumerate(stored.sources):
        tensor = _find(checkpoint, plan, source)
        _check(tensor, stored.source_shape(number), source, checkpoint)
        if (stored.dtype or plan.dtype) is DType.FLOAT16:
            _check_half(tensor, source, checkpoint)
        if stored.compression is not None:
            _check_range(tensor, source, checkpoint)
        yield stored.own(number, tensor.detach())  # some .bin files hold parameters that want gradients


def _microscaled(checkpoint: Checkpoint, plan: StorePlan, stored: StoredTensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks and scales in MXFP4 of what one packed tensor is made of, checked."""
    for number, source in enumerate(stored.sources):
        packed = checkpoint.microscaled(_name_of(checkpoint, plan, source))
        if packed is None:
            raise StoreError(f"tensor {source} in {checkpoint.folder} is not in MXFP4, as config.json says it is.")
        largest = LARGEST_HALF_SCALE if plan.dtype is DType.FLOAT16 else LARGEST_SCALE
        check_scales(packed[1], largest, source, checkpoint.folder)
        blocks, scales = (stored.own(number, one, Microscaling.group_size) for one in packed)
        yield blocks, scales


def _importance(checkpoint: Checkpoint, plan: StorePlan, stored: StoredTensor, source: str) -> Tensor:
    names = checkpoint.names()
    whole = next((prefix + source for prefix in plan.prefixes if prefix + source in names), source)
    return stored.own_inputs(importance_of(checkpoint.folder, whole, stored.source_shape(0)[1]))


def _find(checkpoint: Checkpoint, plan: StorePlan, source: str) -> Tensor:
    return checkpoint.tensor(_name_of(checkpoint, plan, source))


def _name_of(checkpoint: Checkpoint, plan: StorePlan, source: str) -> str:
    names = checkpoint.names()
    for prefix in plan.prefixes:
        if prefix + source in names:
            return prefix + source
    raise StoreError(
        f"tensor {source} is missing in checkpoint {checkpoint.folder} "
        f"(looked for {', '.join(prefix + source for prefix in plan.prefixes)})."
    )


def _check(tensor: Tensor, expected: tuple[int, ...], source: str, checkpoint: Checkpoint) -> None:
    if tuple(tensor.shape) != expected:
        raise StoreError(
            f"tensor {source} in {checkpoint.folder} has shape {tuple(tensor.shape)}; config.json implies {expected}."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise StoreError(f"tensor {source} in {checkpoint.folder} holds NaN or infinite values.")


def _check_half(tensor: Tensor, source: str, checkpoint: Checkpoint) -> None:
    """Values beyond float16 would become infinite."""
    limit = torch.finfo(torch.float16).max
    if tensor.dtype is not torch.float16 and float(tensor.abs().max()) > limit:
        raise StoreError(
            f"tensor {source} in {checkpoint.folder} holds values beyond {limit:g}, the largest of float16. "
            "Use dtype bfloat16 or float32."
        )


def _check_range(tensor: Tensor, source: str, checkpoint: Checkpoint) -> None:
    """A group's smallest value and scale are kept in float16."""
    limit = torch.finfo(torch.float16).max
    least, most = (float(v) for v in tensor.aminmax())
    if max(-least, most) > limit:
        raise StoreError(
            f"tensor {source} in {checkpoint.folder} holds values from {least:g} to {most:g}; compressed weights lie "
            f"within {limit:g} of zero (float16). Use this model without policy.lossy.weights."
        )

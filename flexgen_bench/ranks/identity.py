"""What ranks must have in common to compute one model: the program, torch, the model and its packed weights."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

import flexgen_bench
from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import Compression
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import DType
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.machine.environment import cpu_model


@dataclass(frozen=True)
class Identity:
    """What decides a rank's results: versions, the program's text, the shape of the model, its dtype and
    compression."""

    flexgen_bench: str
    code: str
    torch: str
    python: str
    model: str
    dtype: str
    compression: str


@dataclass(frozen=True)
class Hello:
    """The first word of a rank. host: the name of its machine; device, threads: what it computes on, and with."""

    rank: int
    identity: Identity
    host: str
    device: str
    threads: int


def hello(
    rank: int, checkpoint: Path, dtype: DType, compression: Compression | None, threads: int | None = None
) -> Hello:
    """Of this process. threads: None for those that torch has here. Reads the shape of the model, no weights."""
    with open_source(checkpoint) as source:
        shape = source.shape
    identity = Identity(
        flexgen_bench=str(flexgen_bench.__version__),
        code=_code(),
        torch=torch.__version__,
        python=platform.python_version(),
        model=f"{shape.family}, {shape.num_layers} layers, {_digest({**to_json(shape), 'name': ''})}",
        dtype=str(dtype),
        compression="none" if compression is None else _digest(to_json(compression)),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model()
    return Hello(rank, identity, socket.gethostname(), device, torch.get_num_threads() if threads is None else threads)


def check_alike(own: Hello, others: Mapping[int, Hello], shared: bool = False) -> None:
    """UserError that names the ranks that differ from ``own``, and in what. shared: they share every layer, so each
    chooses the tokens for itself and must come to the same bits: on such a device, with as many threads."""
    mine = _compared(own, shared)
    differing = [
        (name, f"rank {rank} ({one.host}) has {name} {value!r}")
        for rank, one in sorted(others.items())
        for name, value in _compared(one, shared).items()
        if value != mine[name]
    ]
    if differing:
        names = sorted({name for name, _ in differing})
        raise UserError(
            "ranks",
            "; ".join(words for _, words in differing),
            f"all like rank 0 ({own.host}): {', '.join(f'{name} {mine[name]!r}' for name in names)}",
            "Install the same versions on every machine, and open the same model with the same settings. Ranks that "
            "share layers also need devices of one kind and as many threads.",
        )


def _compared(one: Hello, shared: bool) -> dict[str, str | int]:
    compared: dict[str, str | int] = {field.name: getattr(one.identity, field.name) for field in fields(Identity)}
    return compared | ({"device": one.device, "threads": one.threads} if shared else {})


def weights_digest(weights: PackedWeights) -> str:
    """Of the packed weights that all ranks have alike, by their checksums: of slices, of what comes before the layers
    in the file."""
    end = weights.packed.file_bytes if weights.part is None else weights.packed.units[1].offset
    return _digest({str(offset): value for offset, value in weights.store.checksums.items() if offset < end})


@cache
def _code() -> str:
    """Of the program's text: two checkouts of one version may differ."""
    root = Path(flexgen_bench.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]

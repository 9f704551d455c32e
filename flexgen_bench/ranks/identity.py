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
    """The first word of a rank. host: the name of its machine; device: of what it computes on."""

    rank: int
    identity: Identity
    host: str
    device: str


def hello(rank: int, checkpoint: Path, dtype: DType, compression: Compression | None) -> Hello:
    """Of this process. Reads the shape of the model, no weights."""
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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Hello(rank, identity, socket.gethostname(), device)


def check_alike(own: Hello, others: Mapping[int, Hello]) -> None:
    """UserError that names the ranks that differ from ``own``, and in what."""
    differing = [
        f"rank {rank} ({one.host}) has {field.name} {getattr(one.identity, field.name)!r}"
        for rank, one in sorted(others.items())
        for field in fields(Identity)
        if getattr(one.identity, field.name) != getattr(own.identity, field.name)
    ]
    if differing:
        names = {word for line in differing for word in [line.split(" has ")[1].split(" ")[0]]}
        mine = ", ".join(f"{name} {getattr(own.identity, name)!r}" for name in sorted(names))
        raise UserError(
            "ranks",
            "; ".join(differing),
            f"all like rank 0 ({own.host}): {mine}",
            "Install the same versions on every machine, and open the same model with the same settings.",
        )


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

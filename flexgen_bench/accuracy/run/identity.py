"""What makes two runs the same run: the names under which records are found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from flexgen_bench.checkpoints.packages import PACKAGES
from flexgen_bench.config.build import model_spec
from flexgen_bench.config.paths import list_models
from flexgen_bench.core.accuracy import Subject
from flexgen_bench.core.cell import WeightSource
from flexgen_bench.core.codec import to_json

# Part of every key: a change of how items are scored must change it.
SCORING_VERSION = 1
# Of each file of weights this much is read, from its start and its end: a model of 350 GB is known by its files in a
# second.
_READ = 1 << 20


def task_key(
    subject: Subject, task: str, version: str, data: Mapping[str, str], metric: str, max_length: int | None
) -> str:
    """Equal for runs that must give equal results for the items that both have: the first so many of a fixed order."""
    return _digest([SCORING_VERSION, to_json(subject), task, version, dict(data), metric, max_length])


def mode_key(subject: Subject, text: str, text_tokens: int, loss_text: str, loss_tokens: int) -> str:
    """Of what a mode does to a model's numbers. text, loss_text: hashes."""
    of_loss = [loss_text, loss_tokens] if loss_tokens else []
    return _digest([SCORING_VERSION, to_json(subject), text, text_tokens, *of_loss])


def model_fingerprint(source: str, folder_of: Callable[[], Path]) -> str:
    """Of a model's weights. Models of packages are known by their package's hash, whatever dtype they were written in;
    others by their files' names, sizes, beginnings and ends, and their config.json. folder_of: the checkpoint, made if
    need be."""
    if source in list_models():
        spec = model_spec(source)
        if spec.weights is WeightSource.PACKAGE and spec.location in PACKAGES:
            return PACKAGES[spec.location].sha256[:16]
    digest, folder = hashlib.sha256(), folder_of()
    files = [folder] if folder.is_file() else sorted(folder.glob("*"))
    for path in files:
        if path.name == "config.json" or path.suffix.lower() in (".safetensors", ".bin", ".gguf"):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}:".encode())
            with path.open("rb") as file:
                digest.update(file.read(_READ))
                file.seek(max(0, size - _READ))
                digest.update(file.read(_READ))
    return digest.hexdigest()[:16]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]

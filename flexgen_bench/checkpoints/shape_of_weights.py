"""The shape of a model from the files that hold its weights, without reading a weight."""

from __future__ import annotations

from pathlib import Path

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.folders import is_gguf
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.registry import shape_from_config


def shape_at(location: Path) -> ModelShape:
    """Of a checkpoint folder or a .gguf file, named after it: what the library would run. StoreError if nothing can be
    read there, UserError if no family here knows it."""
    if is_gguf(location):
        from flexgen_bench.checkpoints.gguf_shape import gguf_shape

        return gguf_shape(location)
    if location.is_dir():
        return _of_folder(location)
    kind = "is neither a checkpoint folder nor a .gguf file"
    raise StoreError(f"{location} {kind if location.exists() else 'does not exist'}")


def _of_folder(folder: Path) -> ModelShape:
    from flexgen_bench.checkpoints.reader import read_config
    from flexgen_bench.checkpoints.source import open_source

    if not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        # Enough to plan with, before the weights are fetched.
        return shape_from_config(read_config(folder), folder.resolve().name)
    with open_source(folder) as source:  # stored tensors decide what a config leaves open
        return source.shape

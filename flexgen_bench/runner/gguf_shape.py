"""The shape of a model in a GGUF file that no conf/model entry describes."""

from __future__ import annotations

from pathlib import Path

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.registry import shape_from_config
from flexgen_bench.runner.checkpoint_reader import open_gguf


def gguf_shape(file: Path) -> ModelShape:
    """Read the file once through transformers and translate its config. StoreError if it is not there."""
    if not file.is_file():
        raise StoreError(f"{file} does not exist.")
    _, config = open_gguf(file)
    return shape_from_config(config.to_dict(), file.stem)

"""The shape of a model in a GGUF file that no conf/model entry describes."""

from __future__ import annotations

from pathlib import Path

from flexgen_bench.checkpoints.gguf.config import config_from_gguf
from flexgen_bench.checkpoints.gguf.header import read_header
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.registry import shape_from_config


def gguf_shape(file: Path) -> ModelShape:
    """Read the header and translate what it says. StoreError if the file is not there or cannot be run."""
    try:
        return shape_from_config(config_from_gguf(read_header(file)), file.stem)
    except UserError as error:
        raise StoreError(f"{file} holds a model that cannot be run: {error}") from error

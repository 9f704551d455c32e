"""The shape of a model from the files that hold its weights, without reading a weight: ``config.json``, or the header of a GGUF file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.registry import of_model_type, shape_from_config


def shape_at(location: Path) -> ModelShape:
    """Of a checkpoint folder or a .gguf file, named after it. StoreError if nothing can be read there, UserError if no family here knows it."""
    if location.suffix.lower() == ".gguf":
        return shape_from_config(_gguf_config(location), location.stem)
    if location.is_dir():
        from flexgen_bench.memory.checkpoint import read_config

        return shape_from_config(read_config(location), location.resolve().name)
    kind = "is neither a checkpoint folder nor a .gguf file"
    raise StoreError(f"{location} {kind if location.exists() else 'does not exist'}")


def _gguf_config(file: Path) -> dict[str, Any]:
    """What the file's metadata say, in the words of transformers."""
    if not file.is_file():
        raise StoreError(f"{file} does not exist")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise StoreError(
            f"reading {file.name} needs two more packages: pip install 'flexgen-bench[gguf]' ({error})"
        ) from error
    except (ValueError, OSError, LookupError, TypeError, struct.error) as error:
        raise StoreError(
            f"{file} is damaged or of a kind transformers cannot read ({error})"
        ) from error
    found: dict[str, Any] = config.to_dict()
    known = of_model_type(config.model_type)
    if known is None:
        raise UserError(
            "location", str(file), f"of a family that is known here, not {config.model_type}"
        )
    found["architectures"] = [known.architecture]
    if "rms_norm_eps" in found:  # stored in single precision: the decimal number that was meant
        found["rms_norm_eps"] = float(f"{found['rms_norm_eps']:.6g}")
    return found

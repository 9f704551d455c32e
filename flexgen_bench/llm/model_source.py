"""A model, however it is named, as a checkpoint folder and the dtype to use."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from flexgen_bench.checkpoints.gguf_shape import gguf_shape
from flexgen_bench.checkpoints.hub import hub_folder
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.checkpoints.reader import Checkpoint
from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.config.build import model_spec
from flexgen_bench.config.paths import list_models
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.folders import expanded, is_gguf
from flexgen_bench.core.model import DType
from flexgen_bench.core.progress import Progress

# owner/name, the letters that the hub allows. Whatever else has a slash in it is a path.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def checkpoint_of(
    model: str | Path | ModelSpec, dtype: str | DType | None, cache: Path, progress: Progress, plain: bool = False
) -> tuple[Path, DType]:
    """The checkpoint folder of a model, made if need be, and the dtype to use.

    model: a name from conf/model, a checkpoint folder, a .gguf file, a hub id or a ModelSpec. plain: a folder that
    other programs are to read, too, so one that this engine alone understands (a quantized checkpoint) is written out.
    Raises UserError for what is none of these, StoreError for what cannot be had.
    """
    if not isinstance(model, ModelSpec):
        model = _name(model)
    if isinstance(model, str | Path) and (Path(model) / "config.json").exists():
        return _folder(Path(model), dtype, cache, progress, plain)
    if isinstance(model, ModelSpec):
        spec = model
    elif str(model) in list_models():
        spec = model_spec(str(model))
    elif is_gguf(str(model)):
        spec = ModelSpec(gguf_shape(Path(model)), WeightSource.PATH, str(Path(model).absolute()))
    elif Path(model).exists():
        raise UserError("model", str(model), "a checkpoint folder (with config.json) or a .gguf file")
    elif "/" in str(model) and not _HUB_ID.fullmatch(str(model)):
        raise UserError(
            "model",
            str(model),
            "a folder or file that exists",
            "A hub id is written owner/name, a model of conf/model by its name alone.",
        )
    elif "/" in str(model):
        return _folder(hub_folder(str(model)), dtype, cache, progress, plain)
    else:
        raise unknown_choice("model", str(model), list_models())
    own = None
    if spec.weights is WeightSource.PATH and (Path(spec.location) / "config.json").exists():
        own = Path(spec.location)
    chosen = _dtype(dtype, own)
    return prepare_checkpoint(spec, chosen, cache, progress), chosen


def _name(model: Any) -> str:
    """A name or path as it was given, the home folder in place of ``~``; UserError for what is neither."""
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise UserError(
            "model", model, "a name from conf/model, a checkpoint folder, a .gguf file, a hub id or a ModelSpec"
        )
    return str(expanded(os.fspath(model), "model")) if "~" in str(model) else os.fspath(model)


def _folder(
    folder: Path, dtype: str | DType | None, cache: Path, progress: Progress, plain: bool
) -> tuple[Path, DType]:
    chosen = _dtype(dtype, folder)
    if not plain:
        return folder, chosen
    with open_source(folder) as source:
        if source.checkpoint.quantization is None:
            return folder, chosen
        spec = ModelSpec(source.shape, WeightSource.PATH, str(folder.absolute()))
    return prepare_checkpoint(spec, chosen, cache, progress), chosen


def _dtype(requested: str | DType | None, folder: Path | None) -> DType:
    """What was asked for, else what the checkpoint is stored in, else bfloat16."""
    named = requested
    if named is None and folder is not None:
        checkpoint = Checkpoint(folder)
        named = checkpoint.own_dtype
        checkpoint.close()
    named = str(named or DType.BFLOAT16)
    if named not in [str(d) for d in DType]:
        action = "" if requested else f"It is what {folder} says or holds: give another one."
        raise UserError("dtype", named, f"one of {', '.join(DType)}", action)
    return DType(named)

"""A model, however it is named, as a checkpoint folder and the dtype to use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexgen_bench.config import list_models, model_spec
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.model import DType
from flexgen_bench.memory.checkpoint import read_config
from flexgen_bench.runner.checkpoints import prepare_checkpoint
from flexgen_bench.runner.gguf_shape import gguf_shape
from flexgen_bench.runner.hub import hub_folder

Progress = Callable[[str, int, int], None]


def checkpoint_of(
    model: str | Path | ModelSpec, dtype: str | DType | None, cache: Path, progress: Progress
) -> tuple[Path, DType]:
    """The checkpoint folder of a model, made if need be, and the dtype to use.

    model: a name from conf/model, a checkpoint folder, a .gguf file, a hub id or a ModelSpec. Raises UserError for what is none of these,
    StoreError for what cannot be had.
    """
    if isinstance(model, str | Path) and (Path(model) / "config.json").exists():
        folder = Path(model)
        return folder, _dtype(dtype, read_config(folder))
    chosen = _dtype(dtype, {})
    if isinstance(model, ModelSpec):
        spec = model
    elif str(model) in list_models():
        spec = model_spec(str(model))
    elif str(model).endswith(".gguf"):
        spec = ModelSpec(gguf_shape(Path(model)), WeightSource.PATH, str(Path(model).absolute()))
    elif Path(model).exists():
        raise UserError(
            "model", str(model), "a checkpoint folder (with config.json) or a .gguf file"
        )
    elif "/" in str(model):
        folder = hub_folder(str(model))
        return folder, _dtype(dtype, read_config(folder))
    else:
        raise unknown_choice("model", str(model), list_models())
    return prepare_checkpoint(spec, chosen, cache, progress), chosen


def _dtype(asked: str | DType | None, config: dict[str, Any]) -> DType:
    """What was asked for, else what the checkpoint is stored in, else bfloat16."""
    named = asked or config.get("dtype") or config.get("torch_dtype") or DType.BFLOAT16
    if named not in [str(d) for d in DType]:
        raise unknown_choice("dtype", str(named), [str(d) for d in DType])
    return DType(named)

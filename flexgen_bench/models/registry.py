"""Families found by scanning this folder: a new family is one new file that ends with ``FAMILIES = (...,)``, several if
they differ little."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.models.family import ModelFamily

# Entries that change what a model computes, with the values that change nothing: refused by families that do not read
# them.
_FOREIGN: Mapping[str, tuple[Any, ...]] = {
    "attention_chunk_size": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "clip_qkv": (None,),
}


@cache
def _families() -> dict[str, ModelFamily]:
    families: dict[str, ModelFamily] = {}
    for module_info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"flexgen_bench.models.{module_info.name}")
        families |= {one.name: one for one in getattr(module, "FAMILIES", ())}
    return families


def family(name: str) -> ModelFamily:
    """The family with this name; UserError lists the known ones."""
    families = _families()
    if name not in families:
        raise unknown_choice("model.family", name, families)
    return families[name]


def weight_bytes(shape: ModelShape, dtype: DType) -> int:
    """Bytes of all parameters as a checkpoint of this type has them; tied embeddings count once."""
    return family(shape.family).inventory(shape).num_bytes(dtype)


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape described by a checkpoint's ``config.json``; UserError if no family here knows it."""
    model_family = _family_of(config)
    try:
        shape = model_family.shape_from_config(config, name)
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            "config.json", repr(error), f"a config of {model_family.architecture} with values of the right type"
        ) from error
    _check_foreign(config, model_family, shape)
    return shape


def _family_of(config: Mapping[str, Any]) -> ModelFamily:
    """By ``architectures`` (the model with its head, or the bare decoder, in any case), or where there are none by
    ``model_type``."""
    given, kind = config.get("architectures"), config.get("model_type")
    if not isinstance(given, str | list | None):
        raise UserError("config.json: architectures", given, "a list of names, or null")
    names = [given] if isinstance(given, str) else list(given or ())
    known = _families().values()
    for candidate in known:
        whole = candidate.architecture.lower()
        own = {whole, whole.replace("forcausallm", "model")}
        own |= {one.lower() for others in candidate.other_types.values() for one in others}
        by_type = str(kind).lower() in (candidate.model_type, *candidate.other_types)
        if by_type if not names else any(str(name).lower() in own for name in names):
            # transformers goes by the model_type, whatever the architectures say
            if kind is not None and not by_type:
                raise UserError("config.json: model_type", kind, f"{candidate.model_type!r} for architectures {names}")
            return candidate
    allowed = f"one of {', '.join(sorted(f.architecture for f in known))}"
    if names or kind is None:
        raise UserError("config.json: architectures", given, allowed)
    raise UserError("config.json: model_type", kind, f"one of {', '.join(sorted(f.model_type for f in known))}")


def _check_foreign(config: Mapping[str, Any], model_family: ModelFamily, shape: ModelShape) -> None:
    for key, neutral in _FOREIGN.items():
        if key not in model_family.reads and config.get(key) not in neutral:
            raise UserError(f"config.json: {key}", config[key], f"{neutral[-1]!r} for a {model_family.name} model")
    window = None if "sliding_window" in model_family.reads else config.get("sliding_window")
    if window is not None and not (isinstance(window, int) and window >= shape.max_positions):
        raise UserError("config.json: sliding_window", window, f"null, or not below {shape.max_positions} positions")
    others = [kind for kind in config.get("layer_types") or () if kind != "full_attention"]
    if others and "layer_types" not in model_family.reads:
        raise UserError("config.json: layer_types", others[0], "full_attention for every layer")

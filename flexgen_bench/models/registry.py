"""Families found by scanning this folder: a new family is one new file that ends with ``FAMILY = ...``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.family import ModelFamily

_NOT_FAMILIES = {"family", "registry"}


@cache
def _scan() -> tuple[dict[str, ModelFamily], dict[str, ModelFamily]]:
    families: dict[str, ModelFamily] = {}
    architectures: dict[str, ModelFamily] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name in _NOT_FAMILIES:
            continue
        loaded = importlib.import_module(f"flexgen_bench.models.{module.name}")
        families[loaded.FAMILY.name] = loaded.FAMILY
        architectures[loaded.FAMILY.architecture] = loaded.FAMILY
    return families, architectures


def family(name: str) -> ModelFamily:
    """The family with this name; UserError lists the known ones."""
    families, _ = _scan()
    if name not in families:
        raise unknown_choice("model.family", name, families)
    return families[name]


def of_model_type(name: str) -> ModelFamily | None:
    """The family that transformers calls ``name``; None if none is known here."""
    families, _ = _scan()
    return next((kind for kind in families.values() if kind.model_type == name), None)


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape described by a checkpoint's ``config.json``; UserError if no family here knows it."""
    _, architectures = _scan()
    for architecture in config.get("architectures") or ():
        if architecture in architectures:
            try:
                return architectures[architecture].shape_from_config(config, name)
            except (TypeError, ValueError, KeyError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    "config.json",
                    repr(error),
                    f"a config of {architecture} with values of the right type",
                ) from error
    raise UserError(
        "config.json: architectures",
        config.get("architectures"),
        f"one of {', '.join(sorted(architectures))}",
    )

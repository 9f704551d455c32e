"""Configuration checked against its schema: a YAML file or what Hydra composed as an instance of a dataclass."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from flexgen_bench.config.paths import choice_file
from flexgen_bench.config.schema import AppConf
from flexgen_bench.core.errors import UserError, unknown_choice

# What OmegaConf raises, for those who may not know it.
ConfError = OmegaConfBaseException


def as_written(words: Any) -> list[str]:
    """A composed list of texts without what ``${...}`` in them stands for."""
    given = OmegaConf.to_container(words, resolve=False)
    return [str(word) for word in given] if isinstance(given, list) else []


def app_conf(composed: Any) -> AppConf:
    """Check a composed configuration against the schema. Raises UserError naming the key at fault."""
    conf: AppConf = _typed(AppConf, composed, "")
    return conf


def load_typed(schema: type[Any], path: Path, prefix: str) -> Any:
    """A YAML file as an instance of ``schema``. Raises UserError naming the file, and the key at fault under
    ``prefix``."""
    try:
        node = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(prefix.rstrip("."), str(path), f"a readable YAML file ({reason})") from error
    try:
        return _typed(schema, node, prefix)
    except UserError as error:
        raise UserError(f"{path.name}: {error.field}", error.value, error.allowed, error.action) from error


def load_choice(schema: type[Any], group: str, name: str) -> Any:
    """``conf/<group>/<name>.yaml`` as an instance of ``schema``. Raises UserError listing the names for an unknown one,
    and naming what is wrong with a file."""
    return load_typed(schema, choice_file(group, name), f"{group}.")


def typed_conf(schema: type[Any], composed: Any) -> Any:
    """A composed configuration as an instance of ``schema``. Raises UserError naming the key at fault."""
    return _typed(schema, composed, "")


def _typed(schema: Any, node: Any, prefix: str) -> Any:
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), node)
        assert isinstance(merged, DictConfig)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise conf_error(schema, error, prefix) from error


def conf_error(schema: Any, error: OmegaConfBaseException, prefix: str = "") -> UserError:
    """What OmegaConf objects to in a configuration of a schema, naming the key at fault."""
    key = f"{prefix}{error.full_key or error.key or 'configuration'}"
    reason = (error.msg or str(error)).splitlines()[0]
    if isinstance(error, ConfigKeyError):
        owner: Any = error.object_type
        owner = owner if hasattr(owner, "__dataclass_fields__") else schema
        return unknown_choice(
            f"key of {key.rpartition('.')[0] or 'the configuration'}", str(error.key), [f.name for f in fields(owner)]
        )
    if isinstance(error, InterpolationResolutionError | GrammarParseError):
        quoted = re.search(r'"(.*)"', reason)
        return UserError(
            key,
            None,
            f"free of ${{...}} that mean nothing ({quoted.group(1) if quoted else reason})",
            r"Set what it asks for; where ${ is part of a name, write \${ for the sign itself.",
        )
    if isinstance(error, MissingMandatoryValue):
        return UserError(key, None, "given", "The YAML file leaves it out.")
    if isinstance(error, ValidationError):
        return UserError(key, getattr(error, "value", None), f"of the right type ({reason})")
    return UserError(key, None, f"readable ({reason})")

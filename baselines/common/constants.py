"""The constants of a system's model, from its configuration into a dataclass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from flexgen_bench.core.errors import UserError

T = TypeVar("T")


def read_constants(kind: type[T], given: Mapping[str, float]) -> T:
    """An instance of the frozen dataclass ``kind``, all of whose fields are positive numbers.

    Raises UserError naming a constant that is missing, unknown or not above zero.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in [*names, *given]:
        if name not in names:
            raise UserError(f"system.constants.{name}", given[name], f"one of {', '.join(names) or 'none'}")
        if name not in given:
            raise UserError(f"system.constants.{name}", None, "given in conf/system")
        if not (math.isfinite(float(given[name])) and float(given[name]) > 0):
            raise UserError(f"system.constants.{name}", given[name], "a number above zero")
    return kind(**{name: float(given[name]) for name in names})


def read_count(options: Mapping[str, Any], name: str) -> int | None:
    """The option ``name``, a whole number of at least 1, or None. Raises UserError for anything else."""
    value = options.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UserError(f"system.options.{name}", value, "an integer of at least 1, or null")
    return value


def only_options(options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises UserError for an option that the system does not have."""
    for name in options:
        if name not in known:
            raise UserError(f"system.options.{name}", options[name], f"one of {', '.join(known) or 'none'}")

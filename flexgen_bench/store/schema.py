"""A record as JSON values and back: every field is written, every field is required when reading."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from flexgen_bench.core.codec import from_json, hints_of, to_json, without_none
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.record import SCHEMA_VERSION, Record

Kind = TypeVar("Kind")

# No figure of a record comes near it: bytes, tokens, seconds and their rates are below 1e20, seeds below 2**64.
LEAST, MOST = 1e-30, 1e30
# Nothing is computed of them, so they may be any numbers.
_ANY_NUMBERS = "record.spec.system_options"
# From version n to n + 1. A change of the schema adds one entry, so records of every age stay readable.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda data: data | {"trace": ""},
    2: lambda data: data | {"prediction": {}},
}


def encode(record: Record) -> dict[str, Any]:
    """The record as JSON values; fields in declared order, free mappings sorted by key.

    Raises StoreError naming the field that holds something JSON cannot carry.
    """
    return encode_as(record, "record")


def encode_as(value: Any, at: str) -> dict[str, Any]:
    """A dataclass as JSON values. A number that is not finite is null where the field may be empty. Raises StoreError
    naming the field under ``at`` that JSON cannot carry."""
    checked = decode_as(to_json(value, sort_keys=True), type(value), at)
    encoded: dict[str, Any] = to_json(checked, sort_keys=True)
    return encoded


def decode_as(data: Any, kind: type[Kind], at: str) -> Kind:
    """What ``encode_as`` wrote. Raises StoreError saying which field is missing, unknown or of the wrong type."""
    try:
        return from_json(kind, data, at, complete=True)
    except UserError as error:
        raise StoreError(str(error)) from error


def parse(text: str | bytes) -> Any:
    """The JSON document in a record's file.

    Raises ValueError or RecursionError for what is none, StoreError for a number that is none in JSON or infinite.
    """
    return json.loads(text, parse_constant=_no_constant, parse_float=_float)


def bounded(data: Any, at: str = "record") -> Any:
    """A record's JSON values for computing with them: what is closer to 0 than any figure, such as an underflow, is 0.

    Raises StoreError naming the field beyond what any figure of a run can be: what is computed of it may be infinite,
    and would hide the other records. Options of the system, of which nothing is computed, stay as they are.
    """
    if at == _ANY_NUMBERS:
        return data
    if isinstance(data, dict):
        return {key: bounded(item, f"{at}.{key}") for key, item in data.items()}
    if isinstance(data, list):
        return [bounded(item, at) for item in data]
    if not isinstance(data, int | float):
        return data
    if abs(data) >= MOST:
        _beyond(str(data), at)
    return 0.0 if 0 < abs(data) <= LEAST else data


def _no_constant(text: str) -> NoReturn:
    raise StoreError(f"holds {text}, which is not JSON. Delete it and measure the cell again.")


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _beyond(text, "a field")


def _beyond(text: str, at: str) -> NoReturn:
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    raise StoreError(
        f"{at[:200]} holds the number {shown}, which no figure of a run is (below {MOST:.0e}). "
        "Delete the record and measure the cell again."
    )


def decode(data: Any) -> Record:
    """The record that ``encode`` wrote, of this schema version or an older one.

    Raises StoreError saying which field is missing, unknown, of the wrong type or negative, and what to do.
    """
    record = decode_as(_current(data), Record, "record")
    _check_counts(record, Record, "record")
    for name in ("started_utc", "ended_utc"):
        parse_utc(getattr(record, name), f"record.{name}")
    return record


def parse_utc(text: str, at: str) -> datetime:
    """A record's time. Raises StoreError naming the field ``at`` if it is not ISO 8601."""
    try:
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time
        time.astimezone(UTC)  # of the first and the last days of all years there may be none
    except (ValueError, OverflowError) as error:
        raise StoreError(f"{at} is {text!r}, not a time in ISO 8601") from error
    return time


def _current(data: Any) -> dict[str, Any]:
    """``data`` brought to the present schema version, one version at a time."""
    if not isinstance(data, dict):
        raise StoreError(f"holds {repr(data)[:80]}, not a record (a JSON object)")
    upgraded: dict[str, Any] = data
    version = data.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise StoreError("has no integer field schema_version, so it is not a record of this project")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"has schema version {version}, this flexgen-bench knows up to {SCHEMA_VERSION}. "
            "Update flexgen-bench to read it."
        )
    for step in range(version, SCHEMA_VERSION):
        if step not in UPGRADES:
            raise StoreError(
                f"has schema version {version}, and nothing here upgrades version {step}. "
                "Measure the cell again, or read it with the version that wrote it."
            )
        upgraded = UPGRADES[step](upgraded) | {"schema_version": step + 1}
    return upgraded


def _check_counts(value: Any, hint: Any, at: str) -> None:
    """Raises StoreError for a number below zero: all that a record's own fields count are seconds, bytes, tokens. What
    it holds as free mappings (hint Any) may be anything."""
    hint = without_none(hint)
    if value is None or hint is Any:
        return
    if is_dataclass(hint) and isinstance(hint, type):
        types = hints_of(hint)
        for f in fields(hint):
            _check_counts(getattr(value, f.name), types[f.name], f"{at}.{f.name}")
    elif get_origin(hint) in (tuple, Sequence):
        for index, item in enumerate(value):
            _check_counts(item, get_args(hint)[0], f"{at}[{index}]")
    elif get_origin(hint) is Mapping:
        for key, item in value.items():
            _check_counts(item, get_args(hint)[1], f"{at}.{key}")
    elif hint in (int, float) and value < 0:
        raise StoreError(f"{at} must be at least 0, but is {value!r}. Delete the record and measure the cell again.")

"""A record as JSON values and back, driven by the dataclasses themselves.

Every field is written, every field is required when reading, unknown fields are refused. A number that is not
finite has no JSON form: it becomes null where the field may be empty, and an error where it may not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.record import SCHEMA_VERSION, Record

Kind = TypeVar("Kind")

# From version n to n + 1. A change of the schema adds one entry, so records of every age stay readable.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda data: data | {"trace": ""},
    2: lambda data: data | {"prediction": {}},
}


def encode(record: Record) -> dict[str, Any]:
    """The record as JSON values; fields in declared order, free mappings sorted by key.

    Raises StoreError naming the field that holds something JSON cannot carry.
    """
    return encode_as(record, Record, "record")


def encode_as(value: Any, kind: type, at: str) -> dict[str, Any]:
    """A dataclass of type ``kind`` as JSON values. Raises StoreError naming the field under ``at`` that JSON cannot
    carry."""
    encoded: dict[str, Any] = _encode(value, kind, at)
    return encoded


def decode_as(data: Any, kind: type[Kind], at: str) -> Kind:
    """What ``encode_as`` wrote. Raises StoreError saying which field is missing, unknown or of the wrong type."""
    decoded: Kind = _decode(data, kind, at)
    return decoded


def decode(data: Any) -> Record:
    """The record that ``encode`` wrote, of this schema version or an older one.

    Raises StoreError saying which field is missing, unknown, of the wrong type or negative, and what to do.
    """
    record: Record = _decode(_current(data), Record, "record")
    _check_counts(record, Record, "record")
    for name in ("started_utc", "ended_utc"):
        parse_utc(getattr(record, name), f"record.{name}")
    return record


def parse_utc(text: str, at: str) -> datetime:
    """A record's time. Raises StoreError naming the field ``at`` if it is not ISO 8601."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise StoreError(f"{at} is {text!r}, not a time in ISO 8601") from error
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


def _current(data: Any) -> dict[str, Any]:
    """``data`` brought to the present schema version, one version at a time."""
    if not isinstance(data, dict):
        raise StoreError(f"holds {_kind(data)}, not a record (a JSON object)")
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


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _encode(value: Any, hint: Any, at: str) -> Any:
    inner = _without_none(hint)
    if inner is not hint:  # the field may be empty
        unknown = value is None or (isinstance(value, float) and not math.isfinite(value))
        return None if unknown else _encode(value, inner, at)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, hint):
            raise _wrong(at, hint.__name__, value)
        types = _hints(hint)
        return {f.name: _encode(getattr(value, f.name), types[f.name], f"{at}.{f.name}") for f in fields(hint)}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _member(value, hint, at).value
    origin = get_origin(hint)
    if origin in (tuple, Sequence):
        item = get_args(hint)[0]
        return [_encode(v, item, f"{at}[{i}]") for i, v in enumerate(_items(value, at))]
    if origin is Mapping:
        item = get_args(hint)[1]
        return {k: _encode(value[k], item, f"{at}.{k}") for k in _keys(value, at)}
    return _free(value, at) if hint is Any else _scalar(value, hint, at)


def _decode(value: Any, hint: Any, at: str) -> Any:
    inner = _without_none(hint)
    if inner is not hint:
        return None if value is None else _decode(value, inner, at)
    if is_dataclass(hint) and isinstance(hint, type):
        known = [f.name for f in fields(hint)]
        given = set(_keys(value, at))
        for problem, names in (
            ("lacks", [n for n in known if n not in given]),
            ("has unknown", sorted(given - set(known))),
        ):
            if names:
                raise StoreError(f"{at} {problem} field(s) {', '.join(names)}")
        types = _hints(hint)
        return hint(**{n: _decode(value[n], types[n], f"{at}.{n}") for n in known})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _member(value, hint, at)
    origin = get_origin(hint)
    if origin in (tuple, Sequence):
        item = get_args(hint)[0]
        return tuple(_decode(v, item, f"{at}[{i}]") for i, v in enumerate(_items(value, at)))
    if origin is Mapping:
        item = get_args(hint)[1]
        return {k: _decode(value[k], item, f"{at}.{k}") for k in _keys(value, at)}
    return _free(value, at) if hint is Any else _scalar(value, hint, at)


def _check_counts(value: Any, hint: Any, at: str) -> None:
    """Raises StoreError for a number below zero: all that a record's own fields count are seconds, bytes, tokens. What
    it holds as free mappings (hint Any) may be anything."""
    hint = _without_none(hint)
    if value is None or hint is Any:
        return
    if is_dataclass(hint) and isinstance(hint, type):
        types = _hints(hint)
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


def _without_none(hint: Any) -> Any:
    """``X`` for ``X | None``; the hint itself otherwise."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    rest = [a for a in get_args(hint) if a is not NoneType]
    assert len(rest) == 1, f"records hold no unions but with None, found {hint}"
    return rest[0]


def _free(value: Any, at: str) -> Any:
    """A tree of JSON values; tuples become lists, enums their value, not-finite numbers null."""
    if isinstance(value, Enum):
        return _free(value.value, at)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _free(value[k], f"{at}.{k}") for k in _keys(value, at)}
    if isinstance(value, list | tuple):
        return [_free(v, f"{at}[{i}]") for i, v in enumerate(value)]
    raise _wrong(at, "text, a number, true/false, null, a list or a mapping", value)


def _scalar(value: Any, hint: Any, at: str) -> Any:
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(at, "a number", value)
        if not math.isfinite(value):
            raise _wrong(at, "a finite number", value)
        return float(value)
    assert hint in (int, str, bool), f"no JSON form is known for {hint} at {at}"
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _wrong(at, {int: "an integer", str: "text", bool: "true or false"}[hint], value)
    return value


def _member(value: Any, kind: type[Enum], at: str) -> Enum:
    try:
        return kind(value)
    except ValueError:
        raise _wrong(at, f"one of {', '.join(str(m.value) for m in kind)}", value) from None


def _items(value: Any, at: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong(at, "a list", value)
    return value


def _keys(value: Any, at: str) -> list[str]:
    if not isinstance(value, Mapping):
        raise _wrong(at, "a mapping", value)
    for key in value:
        if not isinstance(key, str):
            raise _wrong(at, "a mapping whose keys are text", value)
    return sorted(value)


def _wrong(at: str, allowed: str, value: Any) -> StoreError:
    return StoreError(f"{at} must be {allowed}, but is {_kind(value)}: {repr(value)[:80]}")


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"

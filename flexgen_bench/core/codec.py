"""Dataclasses as JSON values and back, driven by the dataclasses themselves.

A field is written under its name, in the order of declaration; enums as their value, paths as text. What is read is
checked against the types of the fields. Where a stored form has it otherwise, the field says so:

- ``metadata=OMITTED``: left out while it has its default, so that documents from before the field read, and hash, as
  they always did;
- ``metadata=inlined("gpu", "cpu")``: a mapping whose items stand beside the other fields, under these names;
- ``Annotated[T, check]``: ``check(value, at)`` returns the value to read as a ``T``, or raises UserError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from flexgen_bench.core.errors import UserError, unknown_choice

Kind = TypeVar("Kind")

OMITTED: Mapping[str, Any] = {"omitted": True}
_SCALARS = {int: "an integer", str: "text", bool: "true or false"}


def inlined(*names: str) -> Mapping[str, Any]:
    """Metadata of a field; see the module."""
    return {"inlined": names}


def to_json(value: Any, *, sort_keys: bool = False) -> Any:
    """A value as JSON has it: dictionaries, lists, numbers, texts. What has no such form stays as it is.

    sort_keys: of mappings; fields stand in the order of declaration.
    """
    return _written(value, Any, sort_keys)


def from_json(kind: type[Kind], data: Any, at: str, *, complete: bool = False) -> Kind:
    """What ``to_json`` wrote of a ``kind``. A field with a default may be missing, but for ``complete`` documents.

    at: what errors call the value. Raises UserError naming the field that is missing, unknown or of the wrong type, and
    whatever the dataclasses themselves raise.
    """
    value: Kind = _read(data, kind, at, complete)
    return value


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A part of a document that another version may have written; an empty one if it is not there, or is no
    mapping."""
    return value if isinstance(value, Mapping) else {}


def without_none(hint: Any) -> Any:
    """``X`` for ``X | None``; the hint itself otherwise."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    rest = [a for a in get_args(hint) if a is not NoneType]
    assert len(rest) == 1, f"no unions but with None are known: {hint}"
    return rest[0]


@cache
def hints_of(kind: type) -> Mapping[str, Any]:
    """The types of a dataclass' fields by name, ``Annotated`` included."""
    return get_type_hints(kind, include_extras=True)


def default_of(field: Field[Any]) -> Any:
    """The default of a field, made anew where it has a factory; ``dataclasses.MISSING`` where there is none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _written(value: Any, hint: Any, sort_keys: bool) -> Any:
    hint = without_none(hint)
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if is_dataclass(value) and not isinstance(value, type):
        data: dict[str, Any] = {}
        for f in fields(value):
            item = getattr(value, f.name)
            if "omitted" in f.metadata and item == default_of(f):
                continue
            written = _written(item, hints_of(type(value))[f.name], sort_keys)
            data |= written if "inlined" in f.metadata else {f.name: written}
        return data
    if isinstance(value, Enum):
        return value.value
    of_items = get_args(hint) or (Any,)
    if isinstance(value, Mapping):
        is_free = hint is Any
        keys = sorted(value, key=str) if sort_keys else value
        return {_key(k, is_free): _written(value[k], of_items[-1], sort_keys) for k in keys}
    if isinstance(value, list | tuple):
        return [_written(item, of_items[0], sort_keys) for item in value]
    if hint is float and type(value) is int:  # so that what is equal is written alike
        return float(value)
    return str(value) if hint is Path else value


def _key(key: Any, is_free: bool) -> Any:
    key = key.value if isinstance(key, Enum) else key
    return key if is_free else str(key)


def _read(data: Any, hint: Any, at: str, complete: bool) -> Any:
    if get_origin(hint) is Annotated:
        hint, check = get_args(hint)[:2]
        data = check(data, at)
    bare = without_none(hint)
    if bare is not hint:  # a number that is not finite has no JSON form: it is unknown
        is_unknown = data is None or (isinstance(data, float) and not math.isfinite(data))
        return None if is_unknown else _read(data, bare, at, complete)
    if hint is Any:
        return _free(data, at)
    if is_dataclass(hint):
        return _read_fields(data, hint, at, complete)
    return _scalar(data, hint, at) if get_origin(hint) is None else _read_items(data, hint, at, complete)


def _read_items(data: Any, hint: Any, at: str, complete: bool) -> Any:
    kind, of_items = get_origin(hint), get_args(hint)
    if kind in (dict, Mapping):
        key, item = of_items
        return {_read(k, key, at, complete): _read(v, item, f"{at}.{k}", complete) for k, v in _items(data, at)}
    if not isinstance(data, list | tuple):
        raise UserError(at, data, "a list")
    items = [_read(item, of_items[0], f"{at}[{i}]", complete) for i, item in enumerate(data)]
    return items if kind is list else tuple(items)


def _read_fields(data: Any, kind: Any, at: str, complete: bool) -> Any:
    known = [name for f in fields(kind) for name in f.metadata.get("inlined", (f.name,))]
    given = dict(_items(data, at, f"a mapping of {', '.join(known)}"))
    for key, item in given.items():
        if key not in known:
            raise UserError(f"{at}.{key}", item, f"left out: {at} has {', '.join(sorted(known))}")
    values = {}
    for f in fields(kind):
        hint = hints_of(kind)[f.name]
        may_be_missing = default_of(f) is not MISSING and not (complete and "omitted" not in f.metadata)
        if "inlined" in f.metadata:
            inside = {name: given[name] for name in f.metadata["inlined"] if given.get(name) is not None}
            values[f.name] = _read(inside, hint, at, complete)
        elif given.get(f.name) is not None or (f.name in given and (without_none(hint) is not hint or hint is Any)):
            values[f.name] = _read(given[f.name], hint, f"{at}.{f.name}", complete)
        elif f.name in given or not may_be_missing:
            needed = [g.name for g in fields(kind) if default_of(g) is MISSING]
            raise UserError(f"{at}.{f.name}", None, "given", f"{at} states all of {', '.join(needed)}.")
    return kind(**values)


def _items(data: Any, at: str, allowed: str = "a mapping") -> Any:
    if not isinstance(data, Mapping):
        raise UserError(at, data, allowed)
    return data.items()


def _free(data: Any, at: str) -> Any:
    """A tree of JSON values; tuples become lists, enums their value, numbers that are not finite null."""
    if data is None or type(data) in (bool, int, str):
        return data
    if isinstance(data, float):
        return float(data) if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {_scalar(k, str, at): _free(v, f"{at}.{k}") for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_free(item, f"{at}[{i}]") for i, item in enumerate(data)]
    if isinstance(data, Enum):
        return _free(data.value, at)
    raise UserError(at, data, "text, a number, true/false, null, a list or a mapping")


def _scalar(data: Any, kind: type, at: str) -> Any:
    if issubclass(kind, Enum):
        if data not in [member.value for member in kind]:
            raise unknown_choice(at, data, [str(member.value) for member in kind])
        return kind(data)
    if kind is float:
        if isinstance(data, bool) or not isinstance(data, int | float):
            raise UserError(at, data, "a number")
        if not math.isfinite(data):
            raise UserError(at, data, "a finite number")
        return float(data)
    if kind is Path:
        return Path(_scalar(data, str, at))
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise UserError(at, data, _SCALARS[kind])
    return data

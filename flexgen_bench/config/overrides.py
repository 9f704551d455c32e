"""Words of a command line as Hydra must see them: a path may hold signs that mean something in Hydra's grammar.

A person, or a shell that completes names, writes ``location=/data/OPT (copy), v=2#1``. What a key of plain text is
given can mean only that text, so it is quoted here before Hydra parses it, where Hydra would read something else: an
error, several values, a number, a name without its spaces. Untouched stays what Hydra reads as text already, what is
quoted, null, interpolations (``${oc.env:HOME}/x``), and with --multirun several values.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from flexgen_bench.core.errors import UserError, unknown_choice

MULTIRUN = ("-m", "--multirun")
# What Hydra takes for a key: a name with dots, what adds or deletes before it, a package behind it.
_KEY = re.compile(r"[+~]{0,2}[A-Za-z0-9_][A-Za-z0-9_./:@-]*")


def readable(words: Sequence[str], schema: type[Any], *, several: bool = False, skip: Sequence[str] = ()) -> list[str]:
    """The words, values of text quoted for Hydra where they need it.

    schema: of the configuration, which says what is text. several: with --multirun, where a comma may stand between two
    values. skip: words that belong to options, no overrides. Raises UserError for an override of anything else that
    Hydra cannot read, with the command that it could.
    """
    return [
        word if word in skip or "=" not in word or word.startswith("-") else _readable(word, schema, several)
        for word in words
    ]


def quoted(text: str, quote: Quote = Quote.single) -> str:
    """A text in quotes, as Hydra's grammar has them; Hydra reads exactly ``text``."""
    return str(QuotedString(text=text, quote=quote).with_quotes())


def text_of(value: str) -> str:
    """What Hydra reads where it reads a text in quotes; else the value as it is."""
    override = _parsed(f"value={value}")
    given = None if override is None else override._value
    return str(given.text) if isinstance(given, QuotedString) else value


def _readable(word: str, schema: type[Any], several: bool) -> str:
    key, _, value = word.partition("=")
    override = _parsed(word)
    if not is_text(key.lstrip("+"), schema):
        if override is None:
            raise _unreadable(word, schema)
        return word
    return word if _is_read(override, value, several) else f"{key}={_quoted(value, several)}"


def _is_read(override: Override | None, value: str, several: bool) -> bool:
    """Whether Hydra reads what was meant."""
    if override is None:
        return False
    if override.is_sweep_override():
        return several and not os.path.exists(value)
    if isinstance(override._value, QuotedString):
        return True
    read = override.value()
    # A backslash that Hydra understands was written by somebody who knows its grammar.
    return read is None or (isinstance(read, str) and (read == value or "\\" in value))


def _quoted(value: str, several: bool) -> str:
    if several and "," in value and not os.path.exists(value):
        return ",".join(quoted(part) for part in value.split(","))
    return quoted(value)


def is_text(key: str, schema: type[Any]) -> bool:
    """Whether a key of the schema holds text and nothing else; so do the values of a mapping of texts."""
    hint: Any = schema
    for name in key.split("."):
        arguments = get_args(hint)
        if is_dataclass(hint):
            hint = _bare(get_type_hints(hint).get(name))
        elif get_origin(hint) is dict and len(arguments) == 2:
            hint = _bare(arguments[1])
        else:
            return False
    return hint is str


def _bare(hint: Any) -> Any:
    """``str | None`` -> ``str``."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    rest = [part for part in get_args(hint) if part is not NoneType]
    return rest[0] if len(rest) == 1 else hint


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _unreadable(word: str, schema: type[Any]) -> UserError:
    key, _, value = word.partition("=")
    if _KEY.fullmatch(key) is None:
        return unknown_choice("key", key, [field.name for field in fields(schema)])
    command = shlex.quote(f"{key}={quoted(value, Quote.double)}")
    return UserError(
        key,
        value,
        "a value that Hydra can read",
        f"If it is one text, quote it for Hydra, and all of it for the shell: {command}",
    )

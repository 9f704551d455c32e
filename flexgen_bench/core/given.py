"""What callers give, of whatever library: text, integers, lists of token ids, and nothing that only
looks like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from flexgen_bench.core.errors import UserError

_WANTED = "text, or token ids as integers (a list, or a one-dimensional array or tensor)"


def check_text(text: Any, field: str) -> None:
    """UserError for what is no text, and for surrogates in it: half of a character, which no tokenizer can read. It
    does not repeat the text, which may be a line of somebody's data."""
    if not isinstance(text, str):
        raise UserError(field, type(text).__name__, "text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            field,
            f"U+{ord(text[error.start]):04X} at character {error.start}",
            "text that can be written as UTF-8",
            "A surrogate is half of a character: decode its source with errors='replace', or as UTF-16.",
        ) from error


def whole_number(value: Any) -> int | None:
    """``value`` as an int where it is one, of whatever library; None for all else, bool and 3.0
    too."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a scalar of numpy or torch
    is_number = isinstance(value, Integral) and not isinstance(value, bool)
    return int(value) if is_number else None


def token_ids(value: Any, field: str) -> list[int]:
    """The ids in ``value``. UserError for what holds none, or something else beside them."""
    if isinstance(value, str):
        raise UserError(field, value, _WANTED.removeprefix("text, or "))
    ids = as_list(value, field, _WANTED)
    if all(type(item) is int for item in ids):
        return ids
    numbers = [whole_number(item) for item in ids]
    wrong = [item for item, number in zip(ids, numbers, strict=True) if number is None]
    if wrong:
        raise UserError(field, wrong[:5], _WANTED)
    return [number for number in numbers if number is not None]


def as_list(value: Any, field: str, wanted: str) -> list[Any]:
    """The items of a list, a tuple, or a one-dimensional array; UserError, with what to do, for all
    else."""
    if isinstance(value, bytes | bytearray | memoryview):
        raise UserError(field, value, wanted, "Bytes are neither: decode them to text first.")
    dimensions = getattr(value, "ndim", None)
    if dimensions and hasattr(value, "tolist"):
        if dimensions > 1:
            raise UserError(
                field,
                f"an array of shape {tuple(value.shape)}",
                wanted,
                "Rows of an array are padded: give a list with each prompt's ids, without padding.",
            )
        return list(value.tolist())
    if isinstance(value, Mapping):
        raise UserError(field, value, wanted, "Of a mapping, give the value that is meant.")
    if not isinstance(value, Sequence):
        is_iterable = hasattr(value, "__iter__") and dimensions is None
        raise UserError(field, value, wanted, "Make a list of it." if is_iterable else "")
    return list(value)

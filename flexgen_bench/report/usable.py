"""Which records tables and pictures can be made of. One that is readable and yet odd must not hide the others."""

from __future__ import annotations

from collections.abc import Callable

from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.metrics import metrics
from flexgen_bench.core.record import Record
from flexgen_bench.report.rows import build_rows
from flexgen_bench.store.reader import StoredRecord

# What comes of a record whose free fields (its spec, its environment, what it wrote) hold what nobody writes there.
ODD = (UserError, StoreError, KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)
_ADVICE = "Measure the cell again, or read it with the version that wrote it."


def what_is_odd(stored: StoredRecord, also: Callable[[Record], object] = lambda record: None) -> str:
    """Why no table can be made of this record alone, and what to do; "" if one can. also: what else is made of it."""
    try:
        build_rows([stored])
        metrics(stored.record)
        _check_outputs(stored.record)
        also(stored.record)
    except ODD as error:
        return f"holds what no cell of this version has ({error_text(error)}). {_ADVICE}"
    return ""


def error_text(error: Exception) -> str:
    """``KeyError: 'shape'``: what is wrong with an odd record."""
    return f"{type(error).__name__}: {error}"


def _check_outputs(record: Record) -> None:
    tokens = record.outputs.get("token_ids")
    if tokens is not None and not all(isinstance(ids, list | tuple) for ids in tokens):
        raise UserError("record.outputs.token_ids", tokens, "a list of token ids for each prompt")
